// SPDX-License-Identifier: MIT
// One AdamW update with the mean in 1-6-9 and the variance in 0-6-10 (paper section 2.4, appendix D):
//   g = grad * inverse_grad_scale;  m = beta1 m + (1 - beta1) g;  v = min(beta2 v + (1 - beta2) g^2, variance_clip)
//   p = p (1 - lr weight_decay) - step_size m / (sqrt(v) * inverse_root_correction + eps);  ema += (p - ema) ema_weight
// m saturates at the largest finite code. The update uses m and v before they are rounded.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"

namespace dalle_fast::adamw16 {

// The memory of one parameter: `count` elements of each, in the same order.
struct Segment {
  float* param;
  const void* grad;  // float32 or bfloat16
  uint16_t* mean;
  uint16_t* variance;
  float* ema;  // or null
  int64_t count;
  bool grad_is_bf16;
};

// The share of one task: elements [begin, end) of a segment.
struct Chunk {
  int32_t segment;
  int64_t begin, end;
};

inline constexpr int64_t kChunk = 1 << 14;

struct Params {
  const Segment* segments;
  int64_t num_segments;
  const Chunk* chunks;
  int64_t num_chunks;
  float inverse_grad_scale;
  float beta1, beta2;
  float decay;                    // 1 - lr * weight_decay
  float step_size;                // lr / (1 - beta1^t)
  float inverse_root_correction;  // 1 / sqrt(1 - beta2^t)
  float eps;
  float variance_clip;
  float ema_weight;  // 1 - ema_decay
  Device device;
};

DF_CPU_LAUNCHER(step, Params)
void step_cuda(const Params& params, void* stream);

}  // namespace dalle_fast::adamw16
