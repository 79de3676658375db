// SPDX-License-Identifier: MIT
// One vector of results is two of each of two rows, told apart into the four pixels of a window. Floor: bandwidth.
#include "../core/parallel.h"
#include "../core/simd.h"
#include "max_pool2d.h"

namespace dalle_fast::max_pool2d {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int64_t kTaskRows = 64;

// The pixels of kLanes windows: left and right of the upper row, then of the lower one.
template <typename T>
DF_INLINE void load_windows(VecF (&pixel)[4], const T* upper, int64_t width, int64_t x) {
  VecI even = {};
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  for (int row = 0; row < 2; ++row) {
    const T* const from = upper + row * 2 * width + 2 * x;
    const int64_t n = 2 * (width - x);
    const VecF a = load_part(from, n), b = load_part(from + kLanes, n - kLanes);
    pixel[2 * row] = __builtin_shuffle(a, b, even);
    pixel[2 * row + 1] = __builtin_shuffle(a, b, even + 1);
  }
}

DF_INLINE VecI replaces(VecF next, VecF best) { return (VecI)(next > best) | (VecI)(next != next); }  // as in torch

// f(row of results, first window) for every vector
template <typename F>
void for_each_vector(const Params& p, F f) {
  parallel_chunks(p.planes * p.height, kTaskRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t x = 0; x < p.width; x += kLanes) f(row, x);
  });
}

template <typename T>
void run_forward(const Params& p) {
  for_each_vector(p, [&](int64_t row, int64_t x) {
    VecF pixel[4];
    load_windows(pixel, static_cast<const T*>(p.x) + row * 4 * p.width, p.width, x);
    VecF best = pixel[0];
    for (int k = 1; k < 4; ++k) best = replaces(pixel[k], best) ? pixel[k] : best;
    store_part(static_cast<T*>(p.out) + row * p.width + x, best, p.width - x);
  });
}

template <typename T>
void run_backward(const Params& p) {
  VecI low = {};
  for (int i = 0; i < kLanes; ++i) low[i] = i / 2 + i % 2 * kLanes;
  for_each_vector(p, [&](int64_t row, int64_t x) {
    VecF pixel[4];
    load_windows(pixel, static_cast<const T*>(p.x) + row * 4 * p.width, p.width, x);
    VecF best = pixel[0];
    VecI which = {};
    for (int k = 1; k < 4; ++k) {
      const VecI better = replaces(pixel[k], best);
      best = better ? pixel[k] : best;
      which = better ? splat_i(k) : which;
    }
    const VecF d = load_part(static_cast<const T*>(p.dout) + row * p.width + x, p.width - x);
    for (int k = 0; k < 4; k += 2) {
      const VecF left = which == k ? d : VecF{}, right = which == k + 1 ? d : VecF{};
      T* const to = static_cast<T*>(p.out) + (2 * row + k / 2) * 2 * p.width + 2 * x;
      const int64_t n = 2 * (p.width - x);
      store_part(to, __builtin_shuffle(left, right, low), n);
      store_part(to + kLanes, __builtin_shuffle(left, right, low + kLanes / 2), n - kLanes);
    }
  });
}

}  // namespace

void forward(const Params& p) {
  if (p.dtype == DType::kFloat32) return run_forward<float>(p);
  run_forward<bf16>(p);
}
void backward(const Params& p) {
  if (p.dtype == DType::kFloat32) return run_backward<float>(p);
  run_backward<bf16>(p);
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::max_pool2d
