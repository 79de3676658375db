// SPDX-License-Identifier: MIT
// Attention under a Pattern, one softmax over text and image keys. Queries and keys are the first `length` positions of
// the stream. Tensors are [B, H, L, D] with dense rows of D and any other strides, in elements.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"
#include "../scalar/pattern.h"

namespace dalle_fast::sparse_attention {

struct Tensor4 {
  void* data;
  int64_t stride_b, stride_h, stride_l;
};

struct Params {
  Tensor4 q, k, v, out;
  float* lse;                // [B, H, L], ln of the softmax's denominator
  Tensor4 dout, dq, dk, dv;  // backward only
  void* terms;               // backward in CUDA only: [B, H, L, 2] float32 between its two kernels
  int64_t batch;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t length;
  int64_t head_dim;
  float scale;
  Pattern pattern;
  DType dtype;
  Device device;
};

struct MaskParams {
  uint8_t* mask;  // [L, L]
  int64_t length;
  Pattern pattern;
};

DF_CPU_LAUNCHER(forward, Params)
DF_CPU_LAUNCHER(backward, Params)
DF_BF16_LAUNCHER(forward, Params)
DF_BF16_LAUNCHER(backward, Params)
DF_CPU_LAUNCHER(mask, MaskParams)
void forward_cuda(const Params& params, void* stream);
void backward_cuda(const Params& params, void* stream);

}  // namespace dalle_fast::sparse_attention
