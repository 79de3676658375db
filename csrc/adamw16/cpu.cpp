// SPDX-License-Identifier: MIT
// Bound by memory: reads 4 + 4 + 2 + 2 bytes an element and writes 4 + 2 + 2 (and 8 more with an average).
#include "adamw16.h"

#include "../core/minifloat_simd.h"
#include "../core/parallel.h"

namespace dalle_fast::adamw16 {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int64_t kChunk = 1 << 14;

template <typename T>
DF_INLINE VecF load_part(const T* p, int n) {
  return n == kLanes ? loadu(p) : load_n(p, n);
}
DF_INLINE void store_part(float* p, VecF x, int n) { n == kLanes ? storeu(p, x) : store_n(p, x, n); }

template <typename G>
DF_INLINE void update(const Params& p, int64_t i, int n) {
  const VecF g = load_part(static_cast<const G*>(p.grad) + i, n) * splat(p.inverse_grad_scale);
  const VecF old_m = minifloat_decode<true>(load_h(p.mean + i, n));
  const VecF old_v = minifloat_decode<false>(load_h(p.variance + i, n));
  const VecF limit = splat(15.984375f);
  VecF m = splat(p.beta1) * old_m + splat(1.0f - p.beta1) * g;
  m = m > limit ? limit : m;  // comparisons with NaN are false: NaN stays
  m = m < -limit ? -limit : m;
  VecF v = splat(p.beta2) * old_v + splat(1.0f - p.beta2) * g * g;
  v = v > splat(p.variance_clip) ? splat(p.variance_clip) : v;
  store_h(p.mean + i, minifloat_encode<true>(m), n);
  store_h(p.variance + i, minifloat_encode<false>(v), n);
  const VecF denominator = vsqrt(v) * splat(p.inverse_root_correction) + splat(p.eps);
  const VecF x = load_part(p.param + i, n) * splat(p.decay) - splat(p.step_size) * m / denominator;
  store_part(p.param + i, x, n);
  if (p.ema) {
    const VecF average = load_part(p.ema + i, n);
    store_part(p.ema + i, average + (x - average) * splat(p.ema_weight), n);
  }
}

template <typename G>
void run(const Params& p) {
  parallel_chunks(p.count, kChunk, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) update<G>(p, i, kLanes);
    if (i < end) update<G>(p, i, static_cast<int>(end - i));
  });
}

}  // namespace

void step(const Params& p) { p.grad_dtype == DType::kBFloat16 ? run<bf16>(p) : run<float>(p); }

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::adamw16
