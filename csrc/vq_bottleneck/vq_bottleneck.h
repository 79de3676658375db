// SPDX-License-Identifier: MIT
// The part of the discrete bottleneck between the matrix products, on a chunk of rows of logits l = W x [num_rows, V]:
//   relax:    l += b;  y = softmax((l + g) / tau);  q = softmax(l);  kl = sum q ln q + ln V
//   gradient: y again;  dl = y (dy - sum y dy) / tau + dkl q (ln q - sum q ln q)
// Noise g: key = seed, counter = (c / 4, first_row + r, offset), word c % 4, as gumbel_softmax draws it. The products
// themselves are torch's; see dalle_fast/ops/vq_bottleneck/op.py.
// Matrices are dense [num_rows, stride] with stride >= V a multiple of 16; what is behind a row's V codes may be written.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"

namespace dalle_fast::vq_bottleneck {

// Both distributions of a row: y = exp((l + g - largest) / tau) * inverse_sum, ln q = l - largest_logit - log_sum.
struct RowStats {
  float largest, inverse_sum, largest_logit, log_sum;
};

struct Params {
  void* y;              // [num_rows, stride], dtype; float32 may be the logits themselves
  float* kl;            // [num_rows]
  RowStats* stats;      // [num_rows]
  const float* logits;  // [num_rows, stride], without the bias
  const float* bias;    // [V] or null
  int64_t num_rows;
  int64_t num_codes;
  int64_t stride;
  float inverse_tau;
  uint64_t seed;
  uint64_t offset;
  uint32_t first_row;
  DType dtype;  // float32 or bfloat16
  Device device;
};

struct GradientParams {
  void* y;               // [num_rows, stride], dtype; float32 may be dy itself
  void* dlogits;         // [num_rows, stride], dtype; float32 may be the logits themselves
  const float* logits;   // [num_rows, stride], without the bias
  const float* bias;     // [V] or null
  const float* dy;       // [num_rows, stride]
  const float* kl;       // [num_rows]
  const float* dkl;      // [num_rows]
  const RowStats* stats;  // [num_rows]
  int64_t num_rows;
  int64_t num_codes;
  int64_t stride;
  float inverse_tau;
  uint64_t seed;
  uint64_t offset;
  uint32_t first_row;
  DType dtype;
  Device device;
};

DF_CPU_LAUNCHER(relax, Params)
DF_CPU_LAUNCHER(gradient, GradientParams)
void relax_cuda(const Params& params, void* stream);
void gradient_cuda(const GradientParams& params, void* stream);

}  // namespace dalle_fast::vq_bottleneck
