// SPDX-License-Identifier: MIT
// Many tensors a launch: their pointers travel as a kernel argument, and a block finds its tensor by its number. Floor:
// 12 bytes read and 8 written an element (8 more with an average).
#include "../core/device_math.cuh"
#include "adamw16.h"

namespace dalle_fast::adamw16 {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlockCount = kThreads * 16;  // elements of a block
constexpr int kTable = 48;                      // segments of a launch: the argument stays below 4 KiB

struct Update {
  float inverse_grad_scale, beta1, beta2, decay, step_size, inverse_root_correction, eps, variance_clip, ema_weight;
};

using Table = LaunchTable<Segment, kTable>;
static_assert(sizeof(Table) + sizeof(Update) <= 4096, "kernel arguments");

__device__ __forceinline__ float load_grad(const Segment& s, int64_t i) {
  if (!s.grad_is_bf16) return static_cast<const float*>(s.grad)[i];
  return to_float(static_cast<const bf16_t*>(s.grad)[i]);
}

__global__ void __launch_bounds__(kThreads) update_all(const Table table, const Update u) {
  const int mine = table.of_block(blockIdx.x);
  const Segment& s = table.item[mine];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_block[mine]) * kBlockCount;
  const int64_t end = begin + kBlockCount < s.count ? begin + kBlockCount : s.count;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const float g = load_grad(s, i) * u.inverse_grad_scale;
    float m = u.beta1 * minifloat_decode<true>(s.mean[i]) + (1.0f - u.beta1) * g;
    m = m > 15.984375f ? 15.984375f : m;  // comparisons with NaN are false: NaN stays
    m = m < -15.984375f ? -15.984375f : m;
    float v = u.beta2 * minifloat_decode<false>(s.variance[i]) + (1.0f - u.beta2) * g * g;
    v = v > u.variance_clip ? u.variance_clip : v;
    s.mean[i] = minifloat_encode<true>(m);
    s.variance[i] = minifloat_encode<false>(v);
    const float x = s.param[i] * u.decay - u.step_size * m / (sqrtf(v) * u.inverse_root_correction + u.eps);
    s.param[i] = x;
    if (s.ema) s.ema[i] += (x - s.ema[i]) * u.ema_weight;
  }
}

}  // namespace

void step_cuda(const Params& p, void* stream) {
  if (p.num_segments == 0) return;
  const DeviceGuard guard(p.device.index);
  const Update u{p.inverse_grad_scale,      p.beta1, p.beta2,         p.decay,     p.step_size,
                 p.inverse_root_correction, p.eps,   p.variance_clip, p.ema_weight};
  Table table{};
  const auto flush = [&] {
    if (table.blocks > 0) DF_LAUNCH(update_all, table.blocks, kThreads, 0, stream, table, u);
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

}  // namespace dalle_fast::adamw16
