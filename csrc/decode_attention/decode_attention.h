// SPDX-License-Identifier: MIT
// One new token against a cache: text keys shared by batch / text_batch samples, image keys in rings where raster index
// r lives in slot r % ring_len. The token's own key and value are written too. Its position is an integer, or lies in
// the memory of the device, where nobody can check it beforehand: outside of the pattern, or a text position where
// samples share their text, makes `out` NaN and leaves the caches alone.
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
  const int64_t* position_at;  // if set, holds the position
  float scale;
  Pattern pattern;
  DType dtype;
  Device device;
};

DF_HD bool is_possible(const Params& p, int64_t position) {
  return position >= (p.text_batch == p.batch ? 0 : p.pattern.text_len) && position < p.pattern.length();
}

DF_CPU_LAUNCHER(forward, Params)
DF_BF16_LAUNCHER(forward, Params)
void forward_cuda(const Params& params, void* stream);

}  // namespace dalle_fast::decode_attention
