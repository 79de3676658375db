// SPDX-License-Identifier: MIT
// Many tensors a launch: their pointers travel as a kernel argument, and a block finds its tensor by its number. A
// thread has two times four elements in flight (16 bytes of floats, 8 of codes a load). What changes from step to step
// can be read from memory, so that a CUDA graph can be replayed. Floor: 12 bytes read and 8 written an element (8 more
// with an average); about 70 instructions an element, half of what the floor leaves time for.
#include "../core/device_math.cuh"
#include "adamw16.h"

namespace dalle_fast::adamw16 {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;                         // at least, on a multiprocessor
constexpr int64_t kBlockCount = kThreads * 4 * 4;  // elements of a block
constexpr int kTable = 48;                         // segments of a launch: the argument stays below 4 KiB
constexpr int kSteps = 448;                        // step numbers of a launch, likewise

// What is the same for all segments.
struct Common {
  Scalars scalars;
  const float* found_inf;
  float beta1, beta2, eps, variance_clip, ema_weight;
};

using Table = LaunchTable<Segment, kTable>;
static_assert(sizeof(Table) + sizeof(Common) <= 4096, "kernel arguments");

struct Steps {
  int64_t* at[kSteps];
};
static_assert(sizeof(Steps) + sizeof(AdvanceParams) + 2 * sizeof(int) <= 4096, "kernel arguments");

template <bool kEma>
__device__ __forceinline__ void update(const Common& c, const Scalars& s, float g, float& param, uint16_t& mean,
                                       uint16_t& variance, float& ema) {
  g *= s.inverse_grad_scale;
  float m = c.beta1 * minifloat_decode<true>(mean) + (1.0f - c.beta1) * g;
  m = m > 15.984375f ? 15.984375f : m;  // comparisons with NaN are false: NaN stays
  m = m < -15.984375f ? -15.984375f : m;
  float v = c.beta2 * minifloat_decode<false>(variance) + (1.0f - c.beta2) * g * g;
  v = v > c.variance_clip ? c.variance_clip : v;
  mean = minifloat_encode<true>(m);
  variance = minifloat_encode<false>(v);
  param = param * s.decay - fast_divide(s.step_size * m, fast_sqrt(v) * s.inverse_root_correction + c.eps);
  if (kEma) ema += (param - ema) * c.ema_weight;
}

template <bool kEma, typename G>
struct Vectors {
  Four<float> param, ema;
  Four<G> grad;
  Four<uint16_t> mean, variance;

  __device__ __forceinline__ void load(const Segment& s, int64_t i) {
    param = reinterpret_cast<const Four<float>*>(s.param)[i];
    grad = static_cast<const Four<G>*>(s.grad)[i];
    mean = reinterpret_cast<const Four<uint16_t>*>(s.mean)[i];
    variance = reinterpret_cast<const Four<uint16_t>*>(s.variance)[i];
    if (kEma) ema = reinterpret_cast<const Four<float>*>(s.ema)[i];
  }
  __device__ __forceinline__ void update_and_store(const Common& common, const Scalars& scalars, const Segment& s,
                                                   int64_t i) {
    DF_UNROLL
    for (int k = 0; k < 4; ++k)
      update<kEma>(common, scalars, to_float(grad.at[k]), param.at[k], mean.at[k], variance.at[k], ema.at[k]);
    reinterpret_cast<Four<float>*>(s.param)[i] = param;
    reinterpret_cast<Four<uint16_t>*>(s.mean)[i] = mean;
    reinterpret_cast<Four<uint16_t>*>(s.variance)[i] = variance;
    if (kEma) reinterpret_cast<Four<float>*>(s.ema)[i] = ema;
  }
};

// Elements [begin, end) of a segment; `begin` is a multiple of four.
template <bool kEma, typename G>
__device__ __forceinline__ void update_range(const Common& common, const Scalars& scalars, const Segment& s,
                                             int64_t begin, int64_t end) {
  const uintptr_t floats = reinterpret_cast<uintptr_t>(s.param) | reinterpret_cast<uintptr_t>(s.ema);
  const uintptr_t codes = reinterpret_cast<uintptr_t>(s.mean) | reinterpret_cast<uintptr_t>(s.variance);
  const bool aligned = floats % 16 == 0 && codes % 8 == 0 && reinterpret_cast<uintptr_t>(s.grad) % sizeof(Four<G>) == 0;
  const int64_t wide = aligned ? end / 4 : begin / 4;  // where vectors end
  for (int64_t i = begin / 4 + threadIdx.x; i < wide; i += 2 * kThreads) {
    const bool both = i + kThreads < wide;
    Vectors<kEma, G> first, second;
    first.load(s, i);
    if (both) second.load(s, i + kThreads);
    first.update_and_store(common, scalars, s, i);
    if (both) second.update_and_store(common, scalars, s, i + kThreads);
  }
  for (int64_t i = wide * 4 + threadIdx.x; i < end; i += kThreads) {
    float param = s.param[i], ema = kEma ? s.ema[i] : 0.0f;
    uint16_t mean = s.mean[i], variance = s.variance[i];
    update<kEma>(common, scalars, to_float(static_cast<const G*>(s.grad)[i]), param, mean, variance, ema);
    s.param[i] = param;
    s.mean[i] = mean;
    s.variance[i] = variance;
    if (kEma) s.ema[i] = ema;
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks) update_all(const Table table, const Common common) {
  if (common.found_inf && *common.found_inf != 0.0f) return;
  const int mine = table.of_block(blockIdx.x);
  const Segment& s = table.item[mine];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_block[mine]) * kBlockCount;
  const int64_t end = begin + kBlockCount < s.count ? begin + kBlockCount : s.count;
  const Scalars scalars = s.scalars ? *s.scalars : common.scalars;
  if (s.grad_is_bf16)
    s.ema ? update_range<true, bf16_t>(common, scalars, s, begin, end)
          : update_range<false, bf16_t>(common, scalars, s, begin, end);
  else
    s.ema ? update_range<true, float>(common, scalars, s, begin, end)
          : update_range<false, float>(common, scalars, s, begin, end);
}

__global__ void __launch_bounds__(kThreads)
    advance_all(const Steps steps, const AdvanceParams p, int first, int count) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= count || (p.found_inf && *p.found_inf != 0.0f)) return;
  p.scalars[first + i] = scalars_at(++*steps.at[i], rates_of(p));
}

}  // namespace

void step_cuda(const Params& p, void* stream) {
  if (p.num_segments == 0) return;
  const DeviceGuard guard(p.device.index);
  const Common common{p.scalars, p.found_inf, p.beta1, p.beta2, p.eps, p.variance_clip, p.ema_weight};
  Table table{};
  const auto flush = [&] {
    if (table.blocks > 0) DF_LAUNCH(update_all, table.blocks, kThreads, 0, stream, table, common);
    table.count = 0;
    table.blocks = 0;
  };
  for (int64_t i = 0; i < p.num_segments; ++i) {
    const int64_t needed = (p.segments[i].count + kBlockCount - 1) / kBlockCount;
    if (needed == 0) continue;
    table.add(p.segments[i], needed);
    if (table.full()) flush();
  }
  flush();
}

void advance_cuda(const AdvanceParams& p, void* stream) {
  const DeviceGuard guard(p.device.index);
  for (int64_t first = 0; first < p.num_steps; first += kSteps) {
    Steps steps{};
    const int count = static_cast<int>(p.num_steps - first < kSteps ? p.num_steps - first : kSteps);
    for (int i = 0; i < count; ++i) steps.at[i] = p.steps[first + i];
    const unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
    DF_LAUNCH(advance_all, blocks, kThreads, 0, stream, steps, p, static_cast<int>(first), count);
  }
}

}  // namespace dalle_fast::adamw16
