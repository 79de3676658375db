// SPDX-License-Identifier: MIT
// One new token against a cache: text keys shared by batch / text_batch samples, image keys in rings where raster index
// r lives in slot r % ring_len. The token's own key and value are written first.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"
#include "../scalar/pattern.h"

namespace dalle_fast::decode_attention {

struct Tensor3 {  // [B, H, D], rows dense
  void* data;
  int64_t stride_b, stride_h;
};

struct Tensor4 {  // [B, H, slots, D], rows dense
  void* data;
  int64_t stride_b, stride_h, stride_l;
};

struct Params {
  Tensor3 q, k, v, out;
  Tensor4 text_k, text_v, image_k, image_v;
  int64_t batch;
  int64_t text_batch;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t ring_len;
  int64_t position;
  float scale;
  Pattern pattern;
  DType dtype;
  Device device;
};

DF_CPU_LAUNCHER(forward, Params)
void forward_cuda(const Params& params, void* stream);

}  // namespace dalle_fast::decode_attention
