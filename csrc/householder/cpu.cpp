// SPDX-License-Identifier: MIT
// Blocked Householder QR (LAPACK's geqrf and orgqr): panels of 16 columns, whose reflections are gathered into
// I - V T V^T, so that all but the panels is matrix products. A panel is kept by columns: one pass over its rows
// applies a reflection and adds up the inner products of the next. R is never stored.
//
// About 4 m r^2 operations. One task is one matrix; where there are fewer matrices than threads, tasks are blocks of
// its columns, and the first of them to be updated is factored meanwhile.
#include "householder.h"

#include <atomic>

#include "../core/gemm.h"
#include "../core/minifloat_simd.h"
#include "../core/parallel.h"

namespace dalle_fast::householder {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int kPanel = 16;
constexpr int64_t kBlock = 2 * kPanel;  // columns of a task

struct Workspace {
  float* a;       // [rows, columns], padded to whole panels: P, then Q
  float* v;       // [panels][kPanel, stride]: the columns of V, unit lower trapezoids
  float* t;       // [panels][kPanel, kPanel]: -T
  float *w, *tw;  // [kPanel, columns]
  int64_t rows, columns, stride;
};

DF_INLINE Workspace carve(const Batch& b) {
  static thread_local ThreadScratch scratch;
  Workspace w;
  w.columns = round_up(b.columns, kPanel);
  w.rows = round_up(b.rows, kPanel);
  w.stride = w.rows | kPanel;  // an odd number of cache lines: columns fall into different sets
  float* at = scratch.floats((w.rows + w.stride + 3 * kPanel) * w.columns);
  const auto take = [&at](int64_t n) {
    float* taken = at;
    at += n;
    return taken;
  };
  w.a = take(w.rows * w.columns);
  w.v = take(w.columns * w.stride);
  w.t = take(w.columns * kPanel);
  w.w = take(kPanel * w.columns);
  w.tw = take(kPanel * w.columns);
  return w;
}

// Columns [begin, end), at most kBlock, of P + eps I; scaled by powers of two where squares could overflow or vanish.
// Whether all of them are finite.
bool load(const Workspace& w, const Batch& b, int64_t index, float eps, bool codes, int64_t begin, int64_t end) {
  const int vecs = static_cast<int>((end - begin) / kLanes);
  float* const at = w.a + begin;
  VecF largest[kBlock / kLanes] = {}, zeros = {};
  for (int64_t i = 0; i < w.rows; ++i) {
    const int64_t from = index * b.stride + i * b.row_stride + begin * b.column_stride;
    const float* values = static_cast<const float*>(b.p) + from;
    const uint16_t* halves = static_cast<const uint16_t*>(b.p) + from;
    for (int v = 0; v < vecs; ++v) {
      const int64_t c = v * kLanes, left = i < b.rows ? b.columns - begin - c : 0;
      const int n = static_cast<int>(left < 0 ? 0 : left < kLanes ? left : kLanes);
      VecF x = {};
      if (b.column_stride == 1)
        x = codes         ? minifloat_decode<true>(load_h(halves + c, n))
            : n == kLanes ? loadu(values + c)
                          : load_n(values + c, n);
      else
        for (int k = 0; k < n; ++k)
          x[k] = codes ? ::dalle_fast::minifloat_decode<true>(halves[(c + k) * b.column_stride])
                       : values[(c + k) * b.column_stride];
      storeu(at + i * w.columns + c, x);
      largest[v] = vmax(vabs(x), largest[v]);
      zeros += x - x;  // of Inf and NaN: NaN
    }
  }
  for (int64_t i = begin; i < end && i < b.columns; ++i) {
    const int64_t lane = i - begin, v = lane / kLanes;
    float* const row = at + i * w.columns;
    row[lane] += eps;
    largest[v] = vmax(vabs(loadu(row + v * kLanes)), largest[v]);
  }
  for (int v = 0; v < vecs; ++v) {
    const VecF safe = splat(0x1p32f), inverse = splat(0x1p-32f);
    if (!any_greater(largest[v], safe) && !any_greater(inverse, largest[v])) continue;
    VecF scale;
    for (int k = 0; k < kLanes; ++k) scale[k] = column_scale(largest[v][k]);
    float* const column = at + v * kLanes;
    for (int64_t i = 0; i < b.rows; ++i) storeu(column + i * w.columns, loadu(column + i * w.columns) * scale);
  }
  return !any(zeros != zeros);
}

// Column j >= 0 takes its reflection, v = x * inverse from its diagonal down, and the kRest columns behind it take
// x -= weight v. dot: inner products of the first of these, below its own diagonal, with each of them. j = -1: no
// reflection, only the inner products.
template <int kRest>
DF_INLINE void panel_pass(float* v, int64_t stride, int64_t depth, float inverse, const float* weight, float* dot) {
  constexpr int j = kPanel - 1 - kRest;
  float* const own = v + j * stride;
  float* const behind = own + stride;
  VecF acc[kRest > 0 ? kRest : 1] = {};
  const auto rows = [&](int64_t i, auto has_diagonal) {
    constexpr bool kDiagonal = decltype(has_diagonal)::value;
    const VecI row = lane_index() + static_cast<int32_t>(i);
    VecF vi = {}, lead = {};
    if constexpr (j >= 0) {
      vi = loadu(own + i) * splat(inverse);
      if (kDiagonal) vi = select(row > splat_i(j), vi, select(row == splat_i(j), splat(1.0f), VecF{}));
      storeu(own + i, vi);
    }
    for (int c = 0; c < kRest; ++c) {
      VecF x = loadu(behind + c * stride + i);
      if constexpr (j >= 0) {
        x -= splat(weight[c]) * vi;
        storeu(behind + c * stride + i, x);
      }
      if (c == 0) lead = kDiagonal ? select(row > splat_i(j + 1), x, VecF{}) : x;
      acc[c] += lead * x;
    }
  };
  for (int64_t i = 0; i < kPanel; i += kLanes) rows(i, std::true_type());
  for (int64_t i = kPanel; i < depth; i += kLanes) rows(i, std::false_type());
  for (int c = 0; c < kRest; ++c) dot[c] = hsum(acc[c]);
}

// Reflections of the columns behind which kRest are left; dot: of the first of them with itself and these.
template <int kRest>
void factor_columns(float* v, int64_t stride, int64_t depth, float* tau, const float* dot) {
  constexpr int j = kPanel - 1 - kRest;
  float weight[kPanel], next[kPanel];
  const Reflection h = reflection_of(v[j * stride + j], dot[0]);
  tau[j] = h.tau;
  for (int c = 1; c <= kRest; ++c) weight[c - 1] = h.tau * (v[(j + c) * stride + j] + dot[c] * h.inverse);
  panel_pass<kRest>(v, stride, depth, h.inverse, weight, next);
  if constexpr (kRest > 0) factor_columns<kRest - 1>(v, stride, depth, tau, next);
}

// gram[i, c] of the columns of V, i < c, tile by tile: 16 accumulators, or 8 where there are 16 registers
void gram_of(float (&gram)[kPanel][kPanel], const float* v, int64_t stride, int64_t depth) {
  constexpr int kTall = kLanes == 16 ? 4 : 2, kWide = 4;
  for (int i = 0; i < kPanel; i += kTall)
    for (int c = i / kWide * kWide; c < kPanel; c += kWide) {
      VecF acc[kTall][kWide] = {};
      for (int64_t k = 0; k < depth; k += kLanes)
        for (int x = 0; x < kTall; ++x) {
          const VecF row = loadu(v + (i + x) * stride + k);
          for (int y = 0; y < kWide; ++y) acc[x][y] += row * loadu(v + (c + y) * stride + k);
        }
      for (int x = 0; x < kTall; ++x)
        for (int y = 0; y < kWide; ++y) gram[i + x][c + y] = hsum(acc[x][y]);
    }
}

// V and -T of the panel whose first column is j. A column of zeros, as behind the last one, has tau = 0.
void factor(const Workspace& w, int64_t j) {
  float* const v = w.v + j * w.stride + j;
  float* const t = w.t + j * kPanel;
  const int64_t depth = w.rows - j;
  for (int64_t i = 0; i < depth; i += kLanes)
    for (int c = 0; c < kPanel; c += kLanes)
      transpose_block(v + c * w.stride + i, w.stride, w.a + (j + i) * w.columns + j + c, w.columns);
  float tau[kPanel], dot[kPanel], gram[kPanel][kPanel];
  panel_pass<kPanel>(v, w.stride, depth, 0.0f, nullptr, dot);
  factor_columns<kPanel - 1>(v, w.stride, depth, tau, dot);
  gram_of(gram, v, w.stride, depth);
  for (int c = 0; c < kPanel; ++c) {  // column c of -T: T[:c, c] = -tau T[:c, :c] gram[:c, c]
    for (int i = 0; i < kPanel; ++i) {
      float sum = 0.0f;
      for (int k = i; k < c; ++k) sum += t[i * kPanel + k] * gram[k][c];
      t[i * kPanel + c] = i < c ? -tau[c] * sum : i == c ? -tau[c] : 0.0f;
    }
  }
}

// Columns [begin, end) of A become (I - V T^T V^T) A, with V of panel j.
void reflect(const Workspace& w, int64_t j, int64_t begin, int64_t end) {
  const float* const v = w.v + j * w.stride + j;
  float* const at = w.a + j * w.columns + begin;
  const int64_t n = w.columns, depth = w.rows - j, width = end - begin;
  gemm<false, false>(w.w + begin, n, v, w.stride, at, kLanes, n, kPanel, width, depth);
  gemm<true, false>(w.tw + begin, n, w.t + j * kPanel, kPanel, w.w + begin, kLanes, n, kPanel, width, kPanel);
  gemm<true, true>(at, n, v, w.stride, w.tw + begin, kLanes, n, depth, width, kPanel);
}

// Columns [begin, end) of Q, from the last panel to the first: of I those of the panel itself, and zero above it.
void form(const Workspace& w, float* q, int64_t begin, int64_t end) {
  const int64_t n = w.columns;
  for (int64_t i = 0; i < w.rows; ++i) zero(q + i * n + begin, end - begin);
  for (int64_t j = end - kPanel; j >= 0; j -= kPanel) {
    const float* const v = w.v + j * w.stride + j;
    const int64_t depth = w.rows - j, first = j > begin ? j : begin, right = j >= begin ? j + kPanel : begin;
    float* const rows = q + j * n;
    if (j >= begin)
      for (int c = 0; c < kPanel; ++c) __builtin_memcpy(w.w + c * n + j, v + c * w.stride, kPanel * sizeof(float));
    if (right < end)
      gemm<false, false>(w.w + right, n, v, w.stride, rows + right, kLanes, n, kPanel, end - right, depth);
    gemm<false, false>(w.tw + first, n, w.t + j * kPanel, kPanel, w.w + first, kLanes, n, kPanel, end - first, kPanel);
    gemm<true, true>(rows + first, n, v, w.stride, w.tw + first, kLanes, n, depth, end - first, kPanel);
    if (j >= begin)
      for (int i = 0; i < kPanel; ++i) rows[i * n + j + i] += 1.0f;
  }
}

// Columns [begin, end) of Q, to where they belong.
void store(const Workspace& w, const Batch& b, int64_t index, bool codes, int64_t begin, int64_t end) {
  if (end > b.columns) end = b.columns;
  for (int64_t i = 0; i < b.rows; ++i) {
    const float* row = w.a + i * w.columns;
    const int64_t to = (index * b.rows + i) * b.columns;
    if (!codes) {
      __builtin_memcpy(static_cast<float*>(b.q) + to + begin, row + begin,
                       static_cast<std::size_t>(end - begin) * sizeof(float));
      continue;
    }
    for (int64_t c = begin; c < end; c += kLanes)
      store_h(static_cast<uint16_t*>(b.q) + to + c, minifloat_encode<true>(loadu(row + c)),
              static_cast<int>(end - c < kLanes ? end - c : kLanes));
  }
}

// `threads`: of one matrix. Which columns share a task changes no bit.
void orthonormalize_one(const Batch& b, int64_t index, float eps, bool codes, bool threads) {
  const Workspace w = carve(b);
  const int64_t n = w.columns;
  const auto blocks = [&](auto&& f) {  // the last columns, of which form() has most to do, first
    parallel_for_dynamic((n + kBlock - 1) / kBlock,
                         [&](int64_t task) {
                           const int64_t end = n - task * kBlock;
                           f(end < kBlock ? 0 : end - kBlock, end);
                         },
                         threads);
  };
  const bool in_place = !codes && n == b.columns && w.rows == b.rows;
  float* const q = in_place ? static_cast<float*>(b.q) + index * w.rows * n : w.a;
  std::atomic<bool> finite{true};
  blocks([&](int64_t begin, int64_t end) {
    if (!load(w, b, index, eps, codes, begin, end)) finite.store(false, std::memory_order_relaxed);
  });
  if (!finite.load()) {
    for (int64_t i = 0; i < w.rows * n; ++i) q[i] = __builtin_nanf("");
    if (!in_place) store(w, b, index, codes, 0, n);
    return;
  }
  factor(w, 0);
  for (int64_t j = 0; j + kPanel < n; j += kPanel) {
    const int64_t next = j + kPanel, rest = (n - next - kPanel + kBlock - 1) / kBlock;
    parallel_for_dynamic(
        1 + rest,
        [&](int64_t task) {
          const int64_t begin = next + (task ? kPanel + (task - 1) * kBlock : 0);
          const int64_t width = task ? kBlock : kPanel;
          reflect(w, j, begin, begin + width < n ? begin + width : n);
          if (task == 0) factor(w, next);
        },
        threads);
  }
  blocks([&](int64_t begin, int64_t end) {
    form(w, q, begin, end);
    if (!in_place) store(w, b, index, codes, begin, end);
  });
}

}  // namespace

void orthonormalize(const Params& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.num_batches; ++i) total += p.batches[i].count;
  const bool split = total < max_threads();
  parallel_for_dynamic(
      total,
      [&](int64_t task) {
        int64_t batch = 0;
        while (task >= p.batches[batch].count) task -= p.batches[batch++].count;
        const Batch& b = p.batches[batch];
        orthonormalize_one(b, task, p.eps, p.codes, split && b.rows * b.columns >= kSerialBelow);
      },
      !split);
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::householder
