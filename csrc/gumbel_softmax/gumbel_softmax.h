// SPDX-License-Identifier: MIT
// Gumbel-softmax over [outer, V, inner], contiguous; row r = outer index * inner + inner index. With inner = 1 the
// codes are dense, otherwise neighbouring rows are. Noise: key = seed, counter = (c / 4, row_offset + r, offset), word
// c % 4. Where `kl` is given, so is the KL to a uniform prior of the softmax without noise (core/kl.h).
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/kl.h"
#include "../core/tensor.h"

namespace dalle_fast::gumbel_softmax {

struct Params {
  void* y;             // soft: [outer, V, inner], the dtype of logits
  int64_t* index;      // hard: [outer * inner]
  float* kl;           // [outer * inner] or null
  float* stats;        // [2, outer * inner] with kl: the largest logit of each row, then log_sum
  const void* logits;  // [outer, V, inner]
  int64_t outer;
  int64_t num_codes;
  int64_t inner;
  float inverse_tau;
  uint64_t seed;
  uint64_t offset;
  uint32_t row_offset;
  DType dtype;
  Device device;
};

struct BackwardParams {
  void* dlogits;
  const void* y;  // with dy; or both null
  const void* dy;
  const void* logits;  // with all that follow; or null
  const float* kl;
  const float* stats;
  const float* dkl;  // [outer * inner]
  int64_t outer;
  int64_t num_codes;
  int64_t inner;
  float inverse_tau;
  DType dtype;
  Device device;
};

DF_CPU_LAUNCHER(forward, Params)
DF_CPU_LAUNCHER(argmax, Params)
DF_CPU_LAUNCHER(backward, BackwardParams)
void forward_cuda(const Params& params, void* stream);
void argmax_cuda(const Params& params, void* stream);
void backward_cuda(const BackwardParams& params, void* stream);

}  // namespace dalle_fast::gumbel_softmax
