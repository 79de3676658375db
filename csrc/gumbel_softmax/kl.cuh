// SPDX-License-Identifier: MIT
// The KL of the softmax without noise (core/kl.h), from logits as they are read: two sums forward, a term backward.
#pragma once

#include "../core/rows.cuh"
#include "gumbel_softmax.h"

namespace dalle_fast::gumbel_softmax {
namespace {

// Sums of e^d and e^d d, d = logit - largest. NaN or Inf spoil them, as in torch.softmax.
struct KlSums {
  float largest, sum, sum_d;

  __device__ __forceinline__ void raise(float top) {
    const float step = fmaxf(largest - top, kLeastLog), scale = fast_exp(step);
    sum_d = (sum_d + sum * step) * scale;
    sum *= scale;
    largest = top;
  }
  template <int kCount>
  __device__ __forceinline__ void add(const float (&logits)[kCount]) {
    float top = largest;
    DF_UNROLL
    for (int i = 0; i < kCount; ++i) top = fmaxf(top, logits[i]);
    if (top > largest) raise(top);
    DF_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float d = logits[i] - largest, e = fast_exp(d);
      sum += e;
      sum_d = fmaf(e, fmaxf(d, kLeastLog), sum_d);
    }
  }
  __device__ __forceinline__ void store(const Params& p, int64_t row) const {
    const float log_sum = logf(sum);
    p.kl[row] = sum_d / sum - log_sum + logf(static_cast<float>(p.num_codes));
    p.stats[row] = largest;
    p.stats[p.outer * p.inner + row] = log_sum;
  }
};
constexpr KlSums kNoKl{-FLT_MAX, 0.0f, 0.0f};  // -Inf - largest is -Inf, not NaN

__device__ __forceinline__ KlSums operator+(KlSums a, KlSums b) {
  const float top = fmaxf(a.largest, b.largest);
  a.raise(top);
  b.raise(top);
  return {top, a.sum + b.sum, a.sum_d + b.sum_d};
}
__device__ __forceinline__ KlSums over_lanes(KlSums s, unsigned from = 1) {
  using dalle_fast::over_lanes;
  s.raise(over_lanes(s.largest, Larger{}, from));
  return {s.largest, over_lanes(s.sum, Add{}, from), over_lanes(s.sum_d, Add{}, from)};
}

// dkl * q (ln q + ln V - kl) of a row's logits
struct KlGradient {
  float largest, log_sum, dkl, entropy;

  KlGradient() = default;
  __device__ __forceinline__ KlGradient(const BackwardParams& p, int64_t row)
      : largest(p.stats[row]),
        log_sum(p.stats[p.outer * p.inner + row]),
        dkl(p.dkl[row]),
        entropy(logf(static_cast<float>(p.num_codes)) - p.kl[row]) {}
  __device__ __forceinline__ float operator()(float logit) const {
    const float log_q = fmaxf(logit - largest - log_sum, kLeastLog);
    return dkl * fast_exp(log_q) * (log_q + entropy);
  }
};

}  // namespace
}  // namespace dalle_fast::gumbel_softmax
