// SPDX-License-Identifier: MIT
// One AdamW update with the mean in 1-6-9 and the variance in 0-6-10 (paper section 2.4, appendix D):
//   g = grad * inverse_grad_scale;  m = beta1 m + (1 - beta1) g;  v = min(beta2 v + (1 - beta2) g^2, variance_clip)
//   p = p (1 - lr weight_decay) - step_size m / (sqrt(v) * inverse_root_correction + eps);  ema += (p - ema) ema_weight
// m saturates at the largest finite code. The update uses m and v before they are rounded.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"
#include "../scalar/hd.h"

namespace dalle_fast::adamw16 {

// What an update needs besides constants, for one step number.
struct alignas(16) Scalars {
  float inverse_grad_scale;
  float decay;                    // 1 - lr * weight_decay
  float step_size;                // lr / (1 - beta1^step)
  float inverse_root_correction;  // 1 / sqrt(1 - beta2^step)
};

struct Rates {
  double lr, beta1, beta2, weight_decay, grad_scale;
};

// by squaring, so that every back end has the same factors
DF_HD double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2) result *= base;
    base *= base;
  }
  return result;
}

DF_HD Scalars scalars_at(int64_t step, const Rates& r) {
  return {static_cast<float>(1.0 / r.grad_scale), static_cast<float>(1.0 - r.lr * r.weight_decay),
          static_cast<float>(r.lr / (1.0 - power(r.beta1, step))),
          static_cast<float>(1.0 / sqrt(1.0 - power(r.beta2, step)))};
}

// The memory of one parameter: `count` elements of each, in the same order.
struct Segment {
  float* param;
  const void* grad;  // float32 or bfloat16
  uint16_t* mean;
  uint16_t* variance;
  float* ema;              // or null
  const Scalars* scalars;  // or null: those of Params
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
  const float* found_inf;  // or null; not zero: nothing changes
  Scalars scalars;
  float beta1, beta2;
  float eps;
  float variance_clip;
  float ema_weight;  // 1 - ema_decay
  Device device;
};

// Counts the update that follows, where step numbers live in memory (a CUDA graph replays it), and writes its scalars.
struct AdvanceParams {
  int64_t* const* steps;  // pointers on the host
  Scalars* scalars;       // [num_steps]
  int64_t num_steps;
  const float* found_inf;   // or null; not zero: nothing changes
  const void* lr;           // float64 or float32
  const float* grad_scale;  // or null: one
  double beta1, beta2, weight_decay;
  bool lr_is_double;
  Device device;
};

DF_HD Rates rates_of(const AdvanceParams& p) {
  const double lr = p.lr_is_double ? *static_cast<const double*>(p.lr) : *static_cast<const float*>(p.lr);
  return {lr, p.beta1, p.beta2, p.weight_decay, p.grad_scale ? *p.grad_scale : 1.0};
}

DF_CPU_LAUNCHER(step, Params)
DF_CPU_LAUNCHER(advance, AdvanceParams)
void step_cuda(const Params& params, void* stream);
void advance_cuda(const AdvanceParams& params, void* stream);

}  // namespace dalle_fast::adamw16
