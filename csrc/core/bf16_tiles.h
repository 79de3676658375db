// SPDX-License-Identifier: MIT
// Products of bfloat16 matrices on AVX512-BF16 dot products, or on AMX tiles where `amx` says so. For cpu_bf16.cpp
// files.
//
// "Pairs": a matrix B[K, N] as 32-bit words [K / 2, N], the low half of word (k, n) B[2k, n], the high half B[2k + 1,
// n].
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace dalle_fast {
namespace DF_CPU_NAMESPACE {

constexpr int64_t kBlock = 32;  // depth of all products is a multiple of it, rows and columns of half of it

// ---- AMX: eight tiles of 16 rows of 64 bytes

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sets up this thread's tiles for a scope.
class TileScope {
 public:
  explicit TileScope(bool amx) : amx_(amx) {
    if (!amx_) return;
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~TileScope() {
    if (amx_) _tile_release();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  bool amx_;
};

// 16 or 32 rows (kTall), 16 or 32 columns (kWide)
template <bool kAdd, bool kTall, bool kWide>
DF_INLINE void block_amx(float* c, int64_t ldc, const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb,
                         int64_t depth) {
  const int64_t c_bytes = ldc * 4, a_bytes = lda * 2, b_bytes = ldb * 4;
  float* const c2 = c + 16 * ldc;
  if (kAdd) {
    _tile_loadd(0, c, c_bytes);
    if (kWide) _tile_loadd(1, c + 16, c_bytes);
    if (kTall) _tile_loadd(2, c2, c_bytes);
    if (kTall && kWide) _tile_loadd(3, c2 + 16, c_bytes);
  } else {
    _tile_zero(0);
    if (kWide) _tile_zero(1);
    if (kTall) _tile_zero(2);
    if (kTall && kWide) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kBlock) {
    _tile_loadd(6, b + k / 2 * ldb, b_bytes);
    _tile_loadd(4, a + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kWide) _tile_loadd(7, b + k / 2 * ldb + 16, b_bytes);
    if (kWide) _tile_dpbf16ps(1, 4, 7);
    if (kTall) _tile_loadd(5, a + 16 * lda + k, a_bytes);
    if (kTall) _tile_dpbf16ps(2, 5, 6);
    if (kTall && kWide) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if (kWide) _tile_stored(1, c + 16, c_bytes);
  if (kTall) _tile_stored(2, c2, c_bytes);
  if (kTall && kWide) _tile_stored(3, c2 + 16, c_bytes);
}

template <bool kAdd, bool kTall, bool kWide>
DF_INLINE void block_dot(float* c, int64_t ldc, const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb,
                         int64_t depth) {
  constexpr int kVecs = kWide ? 2 : 1, kRows = 16 / kVecs;
  for (int64_t r0 = 0; r0 < (kTall ? 32 : 16); r0 += kRows) {
    __m512 acc[kRows][kVecs];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v)
        acc[r][v] = kAdd ? _mm512_loadu_ps(c + (r0 + r) * ldc + v * 16) : _mm512_setzero_ps();
    for (int64_t k = 0; k < depth / 2; ++k) {
      __m512bh row[kVecs];
      for (int v = 0; v < kVecs; ++v) row[v] = (__m512bh)_mm512_loadu_si512(b + k * ldb + v * 16);
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, a + (r0 + r) * lda + 2 * k, sizeof pair);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < kVecs; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, row[v]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v) _mm512_storeu_ps(c + (r0 + r) * ldc + v * 16, acc[r][v]);
  }
}

template <bool kAdd, bool kTall, bool kWide>
DF_INLINE void block(float* c, int64_t ldc, const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t depth,
                     bool amx) {
  if (amx)
    block_amx<kAdd, kTall, kWide>(c, ldc, a, lda, b, ldb, depth);
  else
    block_dot<kAdd, kTall, kWide>(c, ldc, a, lda, b, ldb, depth);
}

// C[M, N] float32 (+)= A[M, K] B[K, N]; b in pairs; leading dimensions in elements of each pointer's type.
template <bool kAdd>
void gemm_bf16(float* c, int64_t ldc, const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t rows,
               int64_t columns, int64_t depth, bool amx) {
  for (int64_t n = 0; n < columns; n += kBlock) {
    const bool wide = n + kBlock <= columns;
    for (int64_t m = 0; m < rows; m += kBlock) {
      const bool tall = m + kBlock <= rows;
      float* const to = c + m * ldc + n;
      if (tall && wide)
        block<kAdd, true, true>(to, ldc, a + m * lda, lda, b + n, ldb, depth, amx);
      else if (tall)
        block<kAdd, true, false>(to, ldc, a + m * lda, lda, b + n, ldb, depth, amx);
      else if (wide)
        block<kAdd, false, true>(to, ldc, a + m * lda, lda, b + n, ldb, depth, amx);
      else
        block<kAdd, false, false>(to, ldc, a + m * lda, lda, b + n, ldb, depth, amx);
    }
  }
}

// ---- rounding and layout

DF_INLINE VecH round_bf16(VecF x) { return (VecH)_mm512_cvtneps_pbh((__m512)x); }  // subnormals become zero

DF_INLINE VecU pair_of(VecH low, VecH high) {
  return __builtin_convertvector(low, VecU) | __builtin_convertvector(high, VecU) << 16;
}

DF_INLINE VecH load_h16(const bf16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  return h;
}
DF_INLINE void store_words(uint32_t* p, VecU v) { __builtin_memcpy(p, &v, sizeof v); }

// Rows of bf16 [K, N] -> pairs [K / 2, N]; K even, N a multiple of 16.
DF_INLINE void pair_rows(uint32_t* to, int64_t ldt, const bf16* from, int64_t ldf, int64_t rows, int64_t columns) {
  for (int64_t k = 0; k < rows / 2; ++k)
    for (int64_t n = 0; n < columns; n += 16)
      store_words(to + k * ldt + n, pair_of(load_h16(from + 2 * k * ldf + n), load_h16(from + (2 * k + 1) * ldf + n)));
}

// 32-bit words [rows, columns] -> [columns, rows]; both multiples of 16.
DF_INLINE void transpose_words(uint32_t* to, int64_t ldt, const uint32_t* from, int64_t ldf, int64_t rows,
                               int64_t columns) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16) transpose_block(to + c * ldt + r, ldt, from + r * ldf + c, ldf);
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast
