// SPDX-License-Identifier: MIT
// 256 threads own one row with dense codes, or 32 neighbouring rows. A thread takes groups of four codes: one Philox
// call. The noise is drawn twice (statistics, then values), never stored. Floor: one read and one write of the tensor.
#include "../core/device_math.cuh"
#include "../scalar/philox.h"
#include "gumbel_softmax.h"

namespace dalle_fast::gumbel_softmax {
namespace {

constexpr unsigned kThreads = 256;

// Rows and codes of a block.
struct Work {
  unsigned rows, groups;  // rows * groups == kThreads
  int64_t row, base, stride;
  int64_t first;  // group of four codes this thread begins with
  bool there;
};

__device__ __forceinline__ Work work_of(int64_t outer, int64_t num_codes, int64_t inner) {
  Work w;
  w.rows = inner == 1 ? 1 : 32;
  w.groups = kThreads / w.rows;
  w.row = static_cast<int64_t>(blockIdx.x) * w.rows + threadIdx.x % w.rows;
  w.there = w.row < outer * inner;
  w.base = w.row / inner * num_codes * inner + w.row % inner;
  w.stride = inner;
  w.first = threadIdx.x / w.rows;
  return w;
}

__device__ __forceinline__ Philox4 words_of(const Params& p, int64_t group, int64_t row) {
  return philox4x32(static_cast<uint32_t>(group), p.row_offset + static_cast<uint32_t>(row),
                    static_cast<uint32_t>(p.offset), static_cast<uint32_t>(p.offset >> 32),
                    static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
}
// -ln(-ln u). Near 1, where float32 cannot hold u, ln u comes from the exact 1 - u.
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float rest = (static_cast<float>(0xffffffu - (word >> 8)) + 0.5f) * 0x1p-24f;
  return -logf(rest < 0.29289f ? -log1pf(-rest) : -logf(philox_uniform(word)));
}

// f(code, perturbed logit) of this thread's codes
template <typename T, typename F>
__device__ __forceinline__ void for_each_code(const Params& p, const Work& w, F f) {
  const T* x = static_cast<const T*>(p.logits) + w.base;
  for (int64_t group = w.first; group * 4 < p.num_codes; group += w.groups) {
    const Philox4 words = words_of(p, group, w.row);
    for (int k = 0; k < 4; ++k) {
      const int64_t c = group * 4 + k;
      if (c < p.num_codes) f(c, to_float(x[c * w.stride]) + gumbel(words.word[k]));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) soft(const Params p) {
  DF_SHARED(SoftmaxState, part, kThreads);
  const Work w = work_of(p.outer, p.num_codes, p.inner);
  SoftmaxState state{-INFINITY, 0.0f};
  if (w.there)
    for_each_code<T>(p, w, [&](int64_t, float v) { state = softmax_merge(state, {v, 1.0f}, p.inverse_tau); });
  const float factor = p.inverse_tau;
  state = reduce_groups(state, &part[0], w.rows, w.groups,
                        [factor](SoftmaxState a, SoftmaxState b) { return softmax_merge(a, b, factor); });
  if (!w.there) return;
  const float inverse = 1.0f / state.sum;
  T* y = static_cast<T*>(p.y) + w.base;
  for_each_code<T>(p, w, [&](int64_t c, float v) {
    from_float(&y[c * w.stride], expf((v - state.largest) * p.inverse_tau) * inverse);
  });
}

struct Best {
  float value;
  int32_t code;  // -1: none yet
};

// The larger; the first of equals; the first NaN before all, as in torch.argmax.
__device__ __forceinline__ Best better(Best a, Best b) {
  if (a.code < 0) return b;
  if (b.code < 0) return a;
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan || b_nan) {
    if (a_nan && b_nan) return a.code < b.code ? a : b;
    return a_nan ? a : b;
  }
  if (a.value != b.value) return a.value > b.value ? a : b;
  return a.code < b.code ? a : b;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) hard(const Params p) {
  DF_SHARED(Best, part, kThreads);
  const Work w = work_of(p.outer, p.num_codes, p.inner);
  Best best{0.0f, -1};
  if (w.there) for_each_code<T>(p, w, [&](int64_t c, float v) { best = better(best, {v, static_cast<int32_t>(c)}); });
  best = reduce_groups(best, &part[0], w.rows, w.groups, [](Best a, Best b) { return better(a, b); });
  if (w.there && threadIdx.x < w.rows) p.index[w.row] = best.code;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) soft_backward(const BackwardParams p) {
  DF_SHARED(float, part, kThreads);
  const Work w = work_of(p.outer, p.num_codes, p.inner);
  const T* y = static_cast<const T*>(p.y) + w.base;
  const T* dy = static_cast<const T*>(p.dy) + w.base;
  float sum = 0.0f;
  if (w.there)
    for (int64_t c = w.first; c < p.num_codes; c += w.groups)
      sum += to_float(y[c * w.stride]) * to_float(dy[c * w.stride]);
  sum = reduce_groups(sum, &part[0], w.rows, w.groups, [](float a, float b) { return a + b; });
  if (!w.there) return;
  T* out = static_cast<T*>(p.dlogits) + w.base;
  for (int64_t c = w.first; c < p.num_codes; c += w.groups) {
    const int64_t at = c * w.stride;
    from_float(&out[at], to_float(y[at]) * (to_float(dy[at]) - sum) * p.inverse_tau);
  }
}

template <typename P>
unsigned blocks_of(const P& p) {
  const int64_t rows = p.outer * p.inner, each = p.inner == 1 ? 1 : 32;
  return static_cast<unsigned>((rows + each - 1) / each);
}
template <typename P>
bool nothing(const P& p) {
  return p.outer * p.inner == 0 || p.num_codes == 0;
}

}  // namespace

void forward_cuda(const Params& p, void* stream) {
  if (nothing(p)) return;
  const DeviceGuard guard(p.device.index);
  with_element_type(p.dtype, [&](auto x) { DF_LAUNCH(soft<decltype(x)>, blocks_of(p), kThreads, 0, stream, p); });
}

void argmax_cuda(const Params& p, void* stream) {
  if (nothing(p)) return;
  const DeviceGuard guard(p.device.index);
  with_element_type(p.dtype, [&](auto x) { DF_LAUNCH(hard<decltype(x)>, blocks_of(p), kThreads, 0, stream, p); });
}

void backward_cuda(const BackwardParams& p, void* stream) {
  if (nothing(p)) return;
  const DeviceGuard guard(p.device.index);
  with_element_type(p.dtype,
                    [&](auto x) { DF_LAUNCH(soft_backward<decltype(x)>, blocks_of(p), kThreads, 0, stream, p); });
}

}  // namespace dalle_fast::gumbel_softmax
