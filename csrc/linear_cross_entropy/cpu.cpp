// SPDX-License-Identifier: MIT
// A row is read from memory once and written once: 8192 logits fit the first-level cache, so its three passes (max;
// exp and sum; scale) cost arithmetic only. bfloat16 rows keep their exponentials in a float32 scratch row.
// Parallel over rows; the column sums for the bias over blocks of columns. Both orders are fixed.
#include "linear_cross_entropy.h"

#include "../core/parallel.h"
#include "../core/simd.h"

namespace dalle_fast::linear_cross_entropy {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;

// The first n lanes of p; the others -Inf, which neither raise a maximum nor add to a sum of exponentials.
template <typename T>
DF_INLINE VecF load_tail(const T* p, int n) {
  return lane_index() < splat_i(n) ? load_n(p, n) : splat(-__builtin_inff());
}

template <typename T>
DF_INLINE float row_max(const T* x, int64_t n) {
  VecF best[kUnroll];
  for (int k = 0; k < kUnroll; ++k) best[k] = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int k = 0; k < kUnroll; ++k) best[k] = vmax(loadu(x + i + k * kLanes), best[k]);
  for (; i < n; i += kLanes) {
    const VecF v = n - i >= kLanes ? loadu(x + i) : load_tail(x + i, static_cast<int>(n - i));
    best[0] = vmax(v, best[0]);
  }
  return hmax(vmax(vmax(best[0], best[1]), vmax(best[2], best[3])));
}

// Sum of exp(x - shift); the exponentials go to `out` (which may be x) when kStore.
template <bool kStore, typename T>
DF_INLINE float row_exp_sum(float* out, const T* x, int64_t n, float shift) {
  VecF sum[kUnroll] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int k = 0; k < kUnroll; ++k) {
      const VecF e = exp(loadu(x + i + k * kLanes) - splat(shift));
      if (kStore) storeu(out + i + k * kLanes, e);
      sum[k] += e;
    }
  for (; i < n; i += kLanes) {
    const int rest = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    const VecF v = rest == kLanes ? loadu(x + i) : load_tail(x + i, rest);
    const VecF e = exp(v - splat(shift));
    if (kStore) rest == kLanes ? storeu(out + i, e) : store_n(out + i, e, rest);
    sum[0] += e;
  }
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <typename T>
DF_INLINE void row_scale(T* out, const float* e, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) storeu(out + i, loadu(e + i) * splat(factor));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_n(out + i, load_n(e + i, rest) * splat(factor), rest);
  }
}

template <typename T>
DF_INLINE void row_zero(T* out, int64_t n) {
  __builtin_memset(out, 0, static_cast<std::size_t>(n) * sizeof(T));  // zero bits are zero in both dtypes
}

DF_INLINE float* exponentials(float* row, int64_t) { return row; }  // in place
DF_INLINE float* exponentials(bf16*, int64_t n) {
  static thread_local ThreadScratch scratch;
  return scratch.floats(n);
}

template <typename T>
void row_pass(const Params& p, int64_t row) {
  T* x = static_cast<T*>(p.logits) + row * p.row_stride;
  const int64_t target = p.target[row * p.target_stride];
  const int64_t n = p.num_codes;
  if (target == p.ignore_index) {
    p.row_loss[row] = 0.0f;
    if (p.write_grad) row_zero(x, n);
    return;
  }
  const float at_target = load1(x + target);
  const float shift = row_max(x, n);
  float sum;
  if (p.write_grad) {
    float* e = exponentials(x, n);
    sum = row_exp_sum<true>(e, x, n, shift);
    const float factor = p.scale / sum;
    const float hit = e[target] * factor - p.scale;  // before the row is written: in one rounding
    row_scale(x, e, n, factor);
    store1(x + target, hit);
  } else {
    sum = row_exp_sum<false>(static_cast<float*>(nullptr), x, n, shift);
  }
  p.row_loss[row] = log(splat(sum))[0] + (shift - at_target);
}

template <typename T>
void column_sums(const Params& p) {
  const T* grad = static_cast<const T*>(p.logits);
  parallel_chunks(p.num_codes, kStep, [&](int64_t begin, int64_t end) {
    if (end - begin == kStep) {
      VecF sum[kUnroll] = {};
      for (int64_t row = 0; row < p.num_rows; ++row)
        for (int k = 0; k < kUnroll; ++k) sum[k] += loadu(grad + row * p.row_stride + begin + k * kLanes);
      for (int k = 0; k < kUnroll; ++k) {
        float* to = p.dbias + begin + k * kLanes;
        storeu(to, loadu(to) + sum[k]);
      }
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      float sum = 0.0f;
      for (int64_t row = 0; row < p.num_rows; ++row) sum += load1(grad + row * p.row_stride + i);
      p.dbias[i] += sum;
    }
  });
}

template <typename T>
void run(const Params& p) {
  parallel_for(p.num_rows, [&](int64_t row) { row_pass<T>(p, row); });
  double sum = 0.0;
  for (int64_t row = 0; row < p.num_rows; ++row) sum += static_cast<double>(p.row_loss[row]);
  *p.loss_sum += sum;
  if (p.write_grad && p.dbias) column_sums<T>(p);
}

}  // namespace

void check(const CheckParams& p) {
  int64_t count = 0;
  int64_t bad = -1;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t target = p.target[row * p.target_stride];
    if (target == p.ignore_index) continue;
    ++count;
    if (bad < 0 && (target < 0 || target >= p.num_codes)) bad = row;
  }
  p.stats[0] = count;
  p.stats[1] = bad;
}

void loss_and_grad(const Params& p) {
  if (p.dtype == DType::kFloat32)
    run<float>(p);
  else
    run<bf16>(p);
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::linear_cross_entropy
