// SPDX-License-Identifier: MIT
// Products of float32 matrices of any size for cpu.cpp files: C[M, N] = A[M, K] B[K, N] + start.
//
// B is packed once, in panels of kPanel columns; a block of rows of A is packed for the second-level cache, in strips
// of kStrip rows; the micro-kernel multiplies a strip by a panel with all of C's tile in registers (24 accumulators at
// 16 lanes; 11 loads for 24 FMA). K goes in equal parts of at most kPartDepth, in one order: which rows and columns a
// call or a thread takes changes no bit. A caller has its rows of C in the cache when multiply() returns.
#pragma once

#include <type_traits>

#include "parallel.h"
#include "simd.h"

namespace dalle_fast {
namespace DF_CPU_NAMESPACE {

constexpr int kPanelVecs = kLanes >= 8 ? 3 : 2;
constexpr int64_t kPanel = kPanelVecs * kLanes;
constexpr int kStrip = kLanes == 16 ? 8 : 4;
constexpr int64_t kPartDepth = 512;
constexpr int64_t kBlockRows = 112;  // with kPartDepth 224 KiB of A

// Element (i, k) at data + i * row + k * column; one of the strides is 1.
struct MatrixView {
  const float* data;
  int64_t row, column;

  MatrixView from(int64_t i, int64_t k) const { return {data + i * row + k * column, row, column}; }
};

// B [depth, columns] in panels, filled up with zeros to whole vectors: row k of a panel of v vectors at k * v * kLanes.
struct Panels {
  float* data;
  int64_t depth, columns;

  int64_t count() const { return (columns + kPanel - 1) / kPanel; }
  int64_t floats() const { return depth * round_up(columns, kLanes); }
  int64_t width(int64_t panel) const { return columns - panel * kPanel < kPanel ? columns - panel * kPanel : kPanel; }
  float* at(int64_t panel) const { return data + panel * kPanel * depth; }
};

// Rows [begin, end) of one panel of `from` [depth, columns].
inline void pack_panel(const Panels& to, const MatrixView& from, int64_t panel, int64_t begin, int64_t end) {
  const int64_t width = to.width(panel), pitch = round_up(width, kLanes);
  float* const packed = to.at(panel);
  for (int64_t c = 0; c < width; c += kLanes) {
    const int n = static_cast<int>(width - c < kLanes ? width - c : kLanes);
    const float* const source = from.data + (panel * kPanel + c) * from.column;
    int64_t k = begin;
    if (from.column == 1) {
      for (; k < end; ++k) {
        const float* const row = source + k * from.row;
        storeu(packed + k * pitch + c, n == kLanes ? loadu(row) : load_n(row, n));
      }
    } else if (from.row == 1 && n == kLanes) {
      for (; k + kLanes <= end; k += kLanes) transpose_block(packed + k * pitch + c, pitch, source + k, from.column);
    }
    for (; k < end; ++k)
      for (int i = 0; i < kLanes; ++i)
        packed[k * pitch + c + i] = i < n ? source[k * from.row + i * from.column] : 0.0f;
  }
}

inline void pack(const Panels& to, const MatrixView& from) {
  constexpr int64_t kRows = 64;
  const bool threads = to.floats() >= kSerialBelow;
  if (from.column == 1) {  // whole rows, as they lie in memory
    parallel_for((to.depth + kRows - 1) / kRows,
                 [&](int64_t i) {
                   const int64_t begin = i * kRows, end = begin + kRows < to.depth ? begin + kRows : to.depth;
                   for (int64_t panel = 0; panel < to.count(); ++panel) pack_panel(to, from, panel, begin, end);
                 },
                 threads);
  } else {
    parallel_for(to.count(), [&](int64_t panel) { pack_panel(to, from, panel, 0, to.depth); }, threads);
  }
}

// A strip of R rows: packed[k * R + r]; f(first row, integral constant R) for each strip of `rows`.
template <typename F>
DF_INLINE void for_each_strip(int64_t rows, F f) {
  int64_t r = 0;
  for (; r + kStrip <= rows; r += kStrip) f(r, std::integral_constant<int, kStrip>());
  if constexpr (kStrip == 8)
    if (rows - r >= 4) f(r, std::integral_constant<int, 4>()), r += 4;
  if (rows - r >= 2) f(r, std::integral_constant<int, 2>()), r += 2;
  if (rows - r >= 1) f(r, std::integral_constant<int, 1>());
}

inline void pack_strips(float* to, const MatrixView& a, int64_t rows, int64_t depth) {
  if (a.row == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* const source = a.data + k * a.column;  // runs too short for the hardware to fetch ahead
      for (int64_t i = 0; i < rows; i += 16) __builtin_prefetch(source + 16 * a.column + i);
      for_each_strip(rows, [&](int64_t r, auto strip) {
        constexpr int R = decltype(strip)::value;
        __builtin_memcpy(to + r * depth + k * R, source + r, R * sizeof(float));
      });
    }
    return;
  }
  int64_t r = 0;
  if (a.column == 1) {
    for (; r + kLanes <= rows; r += kLanes) {
      int64_t k = 0;
      for (; k + kLanes <= depth; k += kLanes) {
        alignas(64) float block[kLanes * kLanes];
        for (int i = 0; i < kLanes; ++i) __builtin_prefetch(a.data + (r + kLanes + i) * a.row + k);
        transpose_block(block, kLanes, a.data + r * a.row + k, a.row);
        for (int s = 0; s < kLanes; s += kStrip)
          for (int i = 0; i < kLanes; ++i)
            __builtin_memcpy(to + (r + s) * depth + (k + i) * kStrip, block + i * kLanes + s, kStrip * sizeof(float));
      }
      for (; k < depth; ++k)
        for (int i = 0; i < kLanes; ++i)
          to[(r + i / kStrip * kStrip) * depth + k * kStrip + i % kStrip] = a.data[(r + i) * a.row + k];
    }
  }
  for_each_strip(rows - r, [&](int64_t first, auto strip) {
    constexpr int R = decltype(strip)::value;
    float* const packed = to + (r + first) * depth;
    const float* const source = a.data + (r + first) * a.row;
    for (int64_t k = 0; k < depth; ++k)
      for (int i = 0; i < R; ++i) packed[k * R + i] = source[i * a.row + k * a.column];
  });
}

// c[R, V vectors] = strip * panel + start (rows start_row apart; null: 0)
template <int R, int V>
__attribute__((noinline)) void micro_packed(float* c, int64_t ldc, const float* start, int64_t start_row,
                                            const float* strip, const float* panel, int64_t depth) {
  constexpr int64_t kAhead = 512;  // floats: the panel streams from the second-level cache
  VecF acc[R][V] = {};
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) __builtin_prefetch(c + r * ldc + v * kLanes, 1);
  for (int64_t k = 0; k < depth; ++k) {
    VecF row[V];
    for (int v = 0; v < V; ++v) row[v] = loadu(panel + (k * V + v) * kLanes);
    for (int v = 0; v < V; ++v) __builtin_prefetch(panel + (k * V + v) * kLanes + kAhead);
    for (int r = 0; r < R; ++r) {
      const VecF x = splat(strip[k * R + r]);
      for (int v = 0; v < V; ++v) acc[r][v] += x * row[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      const VecF first = start ? loadu(start + r * start_row + v * kLanes) : VecF{};
      storeu(c + r * ldc + v * kLanes, first + acc[r][v]);
    }
}

// c[rows, columns of the panel] = strips * panel + start
template <int V>
void multiply_panel(float* c, int64_t ldc, const float* start, int64_t start_row, const float* strips,
                    const float* panel, int64_t rows, int64_t width, int64_t depth) {
  for_each_strip(rows, [&](int64_t r, auto strip) {
    constexpr int R = decltype(strip)::value;
    const float* const a = strips + r * depth;
    if (width == V * kLanes) {
      micro_packed<R, V>(c + r * ldc, ldc, start ? start + r * start_row : nullptr, start_row, a, panel, depth);
      return;
    }
    float tile[R * V * kLanes];
    micro_packed<R, V>(tile, V * kLanes, nullptr, 0, a, panel, depth);
    for (int i = 0; i < R; ++i)
      for (int64_t n = 0; n < width; ++n)
        c[(r + i) * ldc + n] = tile[i * V * kLanes + n] + (start ? start[(r + i) * start_row + n] : 0.0f);
  });
}

// C [rows, columns of panels [first, last)] = A B + start: rows of it start_row floats apart (0: one for all), null for
// zero; it may be C. c and start point at column 0 of B.
inline void multiply(float* c, int64_t ldc, const float* start, int64_t start_row, const MatrixView& a, const Panels& b,
                     int64_t rows, int64_t first, int64_t last) {
  static thread_local ThreadScratch scratch;
  const int64_t parts = b.depth > kPartDepth ? (b.depth + kPartDepth - 1) / kPartDepth : 1;
  const int64_t part = round_up(b.depth > 0 ? (b.depth + parts - 1) / parts : 1, kLanes);
  for (int64_t r = 0; r < rows; r += kBlockRows) {
    const int64_t block = rows - r < kBlockRows ? rows - r : kBlockRows;
    float* const strips = scratch.floats(block * part);
    for (int64_t k = 0; k == 0 || k < b.depth; k += part) {
      const int64_t depth = b.depth - k < part ? b.depth - k : part;
      const float* const from = k ? c : start;
      const int64_t from_row = k ? ldc : start_row;
      pack_strips(strips, a.from(r, k), block, depth);
      for (int64_t i = first; i < last; ++i) {
        const int64_t width = b.width(i), n = i * kPanel;
        const auto panel = [&](auto vecs) {
          constexpr int V = decltype(vecs)::value;
          multiply_panel<V>(c + r * ldc + n, ldc, from ? from + r * from_row + n : nullptr, from_row, strips,
                            b.at(i) + k * V * kLanes, block, width, depth);
        };
        if (width > (kPanelVecs - 1) * kLanes)
          panel(std::integral_constant<int, kPanelVecs>());
        else if (kPanelVecs == 3 && width > kLanes)
          panel(std::integral_constant<int, kPanelVecs - 1>());
        else
          panel(std::integral_constant<int, 1>());
      }
    }
  }
}

// Rows of a task: blocks of equal height, as many for each thread where there are enough rows.
inline int64_t task_rows(int64_t rows, int64_t threads) {
  const int64_t blocks = round_up((rows + kBlockRows - 1) / kBlockRows, threads);
  return blocks ? round_up((rows + blocks - 1) / blocks, kStrip) : kStrip;
}

// As multiply(), of all columns, on all threads.
inline void product(float* c, int64_t ldc, const float* start, int64_t start_row, const MatrixView& a, const Panels& b,
                    int64_t rows) {
  constexpr int64_t kSerialProducts = 1 << 18;
  const bool threads = rows * b.columns * b.depth >= kSerialProducts;
  const int64_t workers = threads ? max_threads() : 1, panels = b.count();
  const int64_t block = task_rows(rows, workers), blocks = (rows + block - 1) / block;
  int64_t groups = blocks > 0 && blocks < workers ? (workers + blocks - 1) / blocks : 1;  // of panels
  if (groups > panels) groups = panels;
  parallel_for_dynamic(
      blocks * groups,
      [&](int64_t task) {
        const int64_t r = task / groups * block, group = task % groups;
        const int64_t count = rows - r < block ? rows - r : block;
        multiply(c + r * ldc, ldc, start ? start + r * start_row : nullptr, start_row, a.from(r, 0), b, count,
                 panels * group / groups, panels * (group + 1) / groups);
      },
      threads);
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast
