// SPDX-License-Identifier: MIT
// Blocked Householder QR (LAPACK's geqrf and orgqr): panels of 16 columns, whose reflections are gathered into
// I - V T V^T, so that all but the panels is matrix products. In a panel one pass over the rows applies a reflection
// and adds up the inner products of the next. R is never stored.
//
// One task is one matrix, about 4 m r^2 operations; its copy and V stay in the second-level cache.
#include "householder.h"

#include "../core/gemm.h"
#include "../core/minifloat_simd.h"
#include "../core/parallel.h"

namespace dalle_fast::householder {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int kPanel = 16;
constexpr int kVecs = kPanel / kLanes;
constexpr int kUnroll = 4;

struct Workspace {
  float* a;       // [rows, columns], padded: P, then Q
  float* v;       // [panels][rows, kPanel]: reflections, unit lower trapezoids
  float* t;       // [panels][kPanel, kPanel]: -T
  float *w, *tw;  // [kPanel, columns]
  int64_t rows, columns;
};

DF_INLINE Workspace carve(const Batch& b) {
  static thread_local ThreadScratch scratch;
  Workspace w;
  w.columns = round_up(b.columns, kPanel);
  w.rows = b.rows > w.columns ? b.rows : w.columns;
  float* at = scratch.floats(2 * w.rows * w.columns + w.columns * kPanel + 2 * kPanel * w.columns);
  const auto take = [&at](int64_t n) {
    float* taken = at;
    at += n;
    return taken;
  };
  w.a = take(w.rows * w.columns);
  w.v = take(w.rows * w.columns);
  w.t = take(w.columns * kPanel);
  w.w = take(kPanel * w.columns);
  w.tw = take(kPanel * w.columns);
  return w;
}

// P + eps I, columns scaled by powers of two
void load(const Workspace& w, const Batch& b, int64_t index, float eps, bool codes) {
  for (int64_t i = 0; i < b.rows; ++i) {
    float* row = w.a + i * w.columns;
    const int64_t at = index * b.stride + i * b.row_stride;
    const float* values = static_cast<const float*>(b.p) + at;
    const uint16_t* halves = static_cast<const uint16_t*>(b.p) + at;
    for (int64_t c = 0; c < w.columns; c += kLanes) {
      const int n = static_cast<int>(b.columns - c < kLanes ? (b.columns > c ? b.columns - c : 0) : kLanes);
      VecF x = {};
      if (b.column_stride == 1)
        x = codes         ? minifloat_decode<true>(load_h(halves + c, n))
            : n == kLanes ? loadu(values + c)
                          : load_n(values + c, n);
      else
        for (int k = 0; k < n; ++k)
          x[k] = codes ? ::dalle_fast::minifloat_decode<true>(halves[(c + k) * b.column_stride])
                       : values[(c + k) * b.column_stride];
      storeu(row + c, x);
    }
    if (i < b.columns) row[i] += eps;
  }
  zero(w.a + b.rows * w.columns, (w.rows - b.rows) * w.columns);
  for (int64_t c = 0; c < w.columns; c += kLanes) {
    VecF largest = {};
    for (int64_t i = 0; i < b.rows; ++i) largest = vmax(vabs(loadu(w.a + i * w.columns + c)), largest);
    VecF scale;
    for (int k = 0; k < kLanes; ++k) scale[k] = column_scale(largest[k]);
    for (int64_t i = 0; i < b.rows; ++i) storeu(w.a + i * w.columns + c, loadu(w.a + i * w.columns + c) * scale);
  }
}

// Rows begin <= i < end of a panel: row(i) -= v_i w, with v_i = inverse * x_i written to column j; adds
// row(i)[j + 1] * row(i) to `sum`. The leading dimension is kPanel.
template <bool kReflect>
DF_INLINE void panel_pass(float* v, int64_t begin, int64_t end, int j, float inverse, const float* w,
                          VecF (&sum)[kVecs]) {
  VecF acc[kUnroll][kVecs] = {};
  VecF weight[kVecs];
  VecI here[kVecs];
  for (int k = 0; k < kVecs; ++k) {
    weight[k] = loadu(w + k * kLanes);
    here[k] = lane_index() + k * kLanes == splat_i(j);
  }
  const int next = kReflect ? j + 1 : j;
  const float next_weight = kReflect && next < kPanel ? w[next] : 0.0f;
  const auto one = [&](float* row, VecF(&to)[kVecs]) {
    const VecF vi = splat(kReflect ? row[j] * inverse : 0.0f);
    const VecF lead = next < kPanel ? splat(row[next]) - vi * splat(next_weight) : VecF{};
    for (int k = 0; k < kVecs; ++k) {
      VecF x = loadu(row + k * kLanes);
      if (kReflect) {
        x = select(here[k], vi, x - vi * weight[k]);
        storeu(row + k * kLanes, x);
      }
      to[k] += lead * x;
    }
  };
  int64_t i = begin;
  for (; i + kUnroll <= end; i += kUnroll)
    for (int u = 0; u < kUnroll; ++u) one(v + (i + u) * kPanel, acc[u]);
  for (; i < end; ++i) one(v + i * kPanel, acc[0]);
  for (int k = 0; k < kVecs; ++k) sum[k] = (acc[0][k] + acc[1][k]) + (acc[2][k] + acc[3][k]);
}

// Reflections of the panel whose first row and column are `first`; rows from there to `rows`.
void factor_panel(float* v, int64_t first, int64_t rows, int columns, float* tau) {
  VecF sum[kVecs];
  float dot[kPanel], w[kPanel] = {};
  panel_pass<false>(v, first + 1, rows, 0, 0.0f, w, sum);
  for (int j = 0; j < columns; ++j) {
    for (int k = 0; k < kVecs; ++k) storeu(dot + k * kLanes, sum[k]);
    float* pivot = v + (first + j) * kPanel;
    const Reflection h = reflection_of(pivot[j], dot[j]);
    tau[j] = h.tau;
    for (int c = 0; c < kPanel; ++c) w[c] = c > j ? h.tau * (pivot[c] + dot[c] * h.inverse) : 0.0f;
    for (int c = j; c < kPanel; ++c) pivot[c] = c == j ? 1.0f : 0.0f;
    if (first + j + 1 >= rows) continue;
    // the next pivot row takes the reflection, but is no part of the next inner products
    panel_pass<true>(v, first + j + 1, first + j + 2, j, h.inverse, w, sum);
    panel_pass<true>(v, first + j + 2, rows, j, h.inverse, w, sum);
  }
}

void orthonormalize_one(const Batch& b, int64_t index, float eps, bool codes) {
  const Workspace w = carve(b);
  load(w, b, index, eps, codes);
  const int64_t n = w.columns;
  for (int64_t j = 0; j < n; j += kPanel) {
    float* v = w.v + j * w.rows;
    float* t = w.t + j * kPanel;
    const int64_t depth = w.rows - j, rest = n - j - kPanel;
    for (int64_t i = j; i < w.rows; ++i) __builtin_memcpy(v + i * kPanel, w.a + i * n + j, kPanel * sizeof(float));
    float tau[kPanel] = {}, gram[kPanel * kPanel];
    factor_panel(v, j, w.rows, static_cast<int>(b.columns - j < kPanel ? b.columns - j : kPanel), tau);
    float* top = v + j * kPanel;
    for (int64_t c = b.columns - j > 0 ? b.columns - j : 0; c < kPanel; ++c)  // no reflection there
      for (int64_t i = 0; i < depth; ++i) top[i * kPanel + c] = 0.0f;
    gemm<true, false>(gram, kPanel, top, kPanel, top, kLanes, kPanel, kPanel, kPanel, depth);
    for (int c = 0; c < kPanel; ++c) {  // column c of -T: T[:c, c] = -tau T[:c, :c] gram[:c, c]
      for (int i = 0; i < kPanel; ++i) {
        float sum = 0.0f;
        for (int k = i; k < c; ++k) sum += t[i * kPanel + k] * gram[k * kPanel + c];
        t[i * kPanel + c] = i < c ? -tau[c] * sum : i == c ? -tau[c] : 0.0f;
      }
    }
    if (rest <= 0) continue;
    float* trailing = w.a + j * n + j + kPanel;
    gemm<true, false>(w.w, n, top, kPanel, trailing, kLanes, n, kPanel, rest, depth);
    gemm<true, false>(w.tw, n, t, kPanel, w.w, kLanes, n, kPanel, rest, kPanel);
    gemm<false, true>(trailing, n, top, kPanel, w.tw, kLanes, n, depth, rest, kPanel);
  }
  zero(w.a, w.rows * n);
  for (int64_t j = n - kPanel; j >= 0; j -= kPanel) {  // the panel's columns are those of I, and zero above it
    const float* top = w.v + j * w.rows + j * kPanel;
    const float* t = w.t + j * kPanel;
    const int64_t depth = w.rows - j, rest = n - j - kPanel;
    float* at = w.a + j * n + j;
    for (int c = 0; c < kPanel; ++c)
      for (int i = 0; i < kPanel; ++i) w.w[c * n + i] = top[i * kPanel + c];
    if (rest > 0) gemm<true, false>(w.w + kPanel, n, top, kPanel, at + kPanel, kLanes, n, kPanel, rest, depth);
    gemm<false, false>(w.tw, n, t, kPanel, w.w, kLanes, n, kPanel, kPanel + (rest > 0 ? rest : 0), kPanel);
    gemm<false, true>(at, n, top, kPanel, w.tw, kLanes, n, depth, kPanel + (rest > 0 ? rest : 0), kPanel);
    for (int i = 0; i < kPanel; ++i) at[i * n + i] += 1.0f;
  }
  const int64_t base = index * b.rows * b.columns;
  for (int64_t i = 0; i < b.rows; ++i) {
    const float* row = w.a + i * n;
    const int64_t to = base + i * b.columns;
    if (!codes) {
      __builtin_memcpy(static_cast<float*>(b.q) + to, row, static_cast<std::size_t>(b.columns) * sizeof(float));
      continue;
    }
    for (int64_t c = 0; c < b.columns; c += kLanes)
      store_h(static_cast<uint16_t*>(b.q) + to + c, minifloat_encode<true>(loadu(row + c)),
              static_cast<int>(b.columns - c < kLanes ? b.columns - c : kLanes));
  }
}

}  // namespace

void orthonormalize(const Params& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.num_batches; ++i) total += p.batches[i].count;
  parallel_for_dynamic(total, [&](int64_t task) {
    int64_t batch = 0;
    while (task >= p.batches[batch].count) task -= p.batches[batch++].count;
    orthonormalize_one(p.batches[batch], task, p.eps, p.codes);
  });
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::householder
