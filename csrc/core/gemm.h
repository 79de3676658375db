// SPDX-License-Identifier: MIT
// Products of small float32 matrices for cpu.cpp files: tiles that stay in the first-level cache.
#pragma once

#include <type_traits>

#include "simd.h"

namespace dalle_fast {
namespace DF_CPU_NAMESPACE {

// Vectors of the micro-kernel: 16 accumulators where there are 32 registers, 12 where there are 16 (three vectors of B
// and one element of A beside them).
constexpr int kMicroVecs = kLanes == 16 ? 4 : 3;
constexpr int64_t kMicroDepth = 128;  // rows of B between two visits of C: they stay in the nearest caches

DF_INLINE constexpr int rows_of_micro(int vecs) {
  if (kLanes == 16) return vecs == 4 ? 4 : 8;
  return vecs == 3 ? 4 : vecs == 2 ? 6 : 8;
}

template <int R, int V, bool kTransA, bool kAdd>
DF_INLINE void micro(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t b_vec, int64_t b_k,
                     int64_t depth) {
  VecF acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = kAdd ? loadu(c + r * ldc + v * kLanes) : VecF{};
  for (int64_t k = 0; k < depth; ++k) {
    VecF row[V];
    for (int v = 0; v < V; ++v) row[v] = loadu(b + k * b_k + v * b_vec);
    for (int r = 0; r < R; ++r) {
      const VecF x = splat(kTransA ? a[k * lda + r] : a[r * lda + k]);
      for (int v = 0; v < V; ++v) acc[r][v] += x * row[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) storeu(c + r * ldc + v * kLanes, acc[r][v]);
}

template <int V, bool kTransA, bool kAdd>
void micro_rows(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t b_vec, int64_t b_k,
                int64_t rows, int64_t depth) {
  constexpr int R = rows_of_micro(V);
  const int64_t a_row = kTransA ? 1 : lda;
  int64_t r = 0;
  const auto strip = [&](auto height) {
    micro<decltype(height)::value, V, kTransA, kAdd>(c + r * ldc, ldc, a + r * a_row, lda, b, b_vec, b_k, depth);
    r += decltype(height)::value;
  };
  while (rows - r >= R && (R != 6 || rows - r != 8)) strip(std::integral_constant<int, R>());
  if constexpr (R > 4)  // eight rows are twice four rather than six and two
    while (rows - r >= 4) strip(std::integral_constant<int, 4>());
  while (rows - r > 0) strip(std::integral_constant<int, 1>());
}

template <bool kTransA, bool kAdd>
void gemm_columns(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t b_vec, int64_t b_k,
                  int64_t rows, int64_t columns, int64_t depth) {
  int64_t n = 0;
  const auto panel = [&](auto vecs) {
    constexpr int V = decltype(vecs)::value;
    for (; n + V * kLanes <= columns; n += V * kLanes)
      micro_rows<V, kTransA, kAdd>(c + n, ldc, a, lda, b + n / kLanes * b_vec, b_vec, b_k, rows, depth);
  };
  panel(std::integral_constant<int, kMicroVecs>());
  if constexpr (kMicroVecs == 4) panel(std::integral_constant<int, 3>());
  panel(std::integral_constant<int, 2>());
  panel(std::integral_constant<int, 1>());
}

// C[M, N] (+)= A[M, K] B[K, N]. A is read along its rows, or along its columns where it is transposed in memory.
// Vector v of row k of B is at b + v * b_vec + k * b_k; rows of C are dense, N a multiple of kLanes.
template <bool kTransA, bool kAdd>
void gemm(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t b_vec, int64_t b_k, int64_t rows,
          int64_t columns, int64_t depth) {
  for (int64_t k = 0; k < depth || k == 0; k += kMicroDepth) {
    const int64_t part = depth - k < kMicroDepth ? depth - k : kMicroDepth;
    const float* ak = a + (kTransA ? k * lda : k);
    if (k == 0)
      gemm_columns<kTransA, kAdd>(c, ldc, ak, lda, b, b_vec, b_k, rows, columns, part);
    else
      gemm_columns<kTransA, true>(c, ldc, ak, lda, b + k * b_k, b_vec, b_k, rows, columns, part);
  }
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast
