// SPDX-License-Identifier: MIT
// Bound by memory: reads 4 + 4 + 2 + 2 bytes an element and writes 4 + 2 + 2 (and 8 more with an average).
#include "adamw16.h"

#include "../core/minifloat_simd.h"
#include "../core/parallel.h"

namespace dalle_fast::adamw16 {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int64_t kAhead = 512;  // elements; four or five streams are more than the hardware follows by itself

// What an update needs, by value: stores may alias *Params as far as the compiler knows, and it would read and
// broadcast every number again for every vector.
struct Update {
  float inverse_grad_scale, beta1, one_less_beta1, beta2, one_less_beta2, decay, step_size, inverse_root_correction,
      eps;
  float variance_clip, ema_weight;
};

DF_INLINE Update update_of(const Params& p, const Scalars& s) {
  return {s.inverse_grad_scale,      p.beta1, 1.0f - p.beta1,  p.beta2,     1.0f - p.beta2, s.decay, s.step_size,
          s.inverse_root_correction, p.eps,   p.variance_clip, p.ema_weight};
}

template <bool kEma, typename G>
DF_INLINE void update(const Update u, float* param, const G* grad, uint16_t* mean, uint16_t* variance, float* ema,
                      int n) {
  const VecF g = load_part(grad, n) * splat(u.inverse_grad_scale);
  const VecF old_m = minifloat_decode<true>(load_h(mean, n));
  const VecF old_v = minifloat_decode<false>(load_h(variance, n));
  const VecF limit = splat(15.984375f);
  VecF m = splat(u.beta1) * old_m + splat(u.one_less_beta1) * g;
  m = vmax(-limit, vmin(limit, m));  // NaN stays
  VecF v = splat(u.beta2) * old_v + splat(u.one_less_beta2) * g * g;
  v = vmin(splat(u.variance_clip), v);
  store_h(mean, minifloat_encode<true>(m), n);
  store_h(variance, minifloat_encode<false>(v), n);
  const VecF denominator = vsqrt(v) * splat(u.inverse_root_correction) + splat(u.eps);
  const VecF x = load_part(param, n) * splat(u.decay) - splat(u.step_size) * m / denominator;
  store_part(param, x, n);
  if (kEma) {
    const VecF average = load_part(ema, n);
    store_part(ema, average + (x - average) * splat(u.ema_weight), n);
  }
}

template <bool kEma, typename G>
void run(const Update u, const Segment& segment, int64_t begin, int64_t end) {
  float* const param = segment.param;
  const G* const grad = static_cast<const G*>(segment.grad);
  uint16_t* const mean = segment.mean;
  uint16_t* const variance = segment.variance;
  float* const ema = segment.ema;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    // may point past the end: a prefetch never faults
    __builtin_prefetch(grad + i + kAhead);
    __builtin_prefetch(param + i + kAhead, 1);
    __builtin_prefetch(mean + i + kAhead, 1);
    __builtin_prefetch(variance + i + kAhead, 1);
    if (kEma) __builtin_prefetch(ema + i + kAhead, 1);
    update<kEma, G>(u, param + i, grad + i, mean + i, variance + i, ema + i, kLanes);
  }
  if (i < end) update<kEma, G>(u, param + i, grad + i, mean + i, variance + i, ema + i, static_cast<int>(end - i));
}

template <typename G>
void run_grad(const Update& u, const Segment& segment, int64_t begin, int64_t end) {
  segment.ema ? run<true, G>(u, segment, begin, end) : run<false, G>(u, segment, begin, end);
}

}  // namespace

void step(const Params& p) {
  if (p.found_inf && *p.found_inf != 0.0f) return;
  int64_t count = 0;
  for (int64_t i = 0; i < p.num_chunks && count < kSerialBelow; ++i) count += p.chunks[i].end - p.chunks[i].begin;
  parallel_for(
      p.num_chunks,
      [&](int64_t i) {
        const Chunk& chunk = p.chunks[i];
        const Segment& segment = p.segments[chunk.segment];
        const Update u = update_of(p, segment.scalars ? *segment.scalars : p.scalars);
        segment.grad_is_bf16 ? run_grad<bf16>(u, segment, chunk.begin, chunk.end)
                             : run_grad<float>(u, segment, chunk.begin, chunk.end);
      },
      count >= kSerialBelow);
}

void advance(const AdvanceParams& p) {
  if (p.found_inf && *p.found_inf != 0.0f) return;
  const Rates rates = rates_of(p);
  for (int64_t i = 0; i < p.num_steps; ++i) p.scalars[i] = scalars_at(++*p.steps[i], rates);
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::adamw16
