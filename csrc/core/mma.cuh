// SPDX-License-Identifier: MIT
// Tensor cores and asynchronous copies of sm_80 and newer: mma.sync m16n8k16 on 16-bit operands with float32 sums,
// ldmatrix, cp.async. Fragments have the layout of the PTX manual: with g = lane / 4 and t = lane % 4,
//   A[16, 16]  a[0]: (g, 2t) (g, 2t + 1), a[1]: rows + 8, a[2]: columns + 8, a[3]: both
//   B[16, 8]   b[0]: (2t, g) (2t + 1, g), b[1]: rows + 8
//   C[16, 8]   c[0], c[1]: (g, 2t) (g, 2t + 1), c[2], c[3]: rows + 8
// and m16n8k8 on tf32 (float32 with 10 bits behind the point: all 1-6-9 codes are such), C as above,
//   A[16, 8]   a[0]: (g, t), a[1]: rows + 8, a[2]: columns + 4, a[3]: both
//   B[8, 8]    b[0]: (t, g), b[1]: rows + 4
#pragma once

#include "device_math.cuh"

namespace dalle_fast {

// ---- instructions

#if defined(DF_SIMT)

template <typename T>
__device__ inline void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b) {
  struct Lane {
    float* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  const auto together = [](void* const* lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Lane& l = *static_cast<const Lane*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) left[g + i % 2 * 8][2 * t + j + i / 2 * 8] = unpack<T>(l.a[i], j);
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) right[2 * t + j + 8 * i][g] = unpack<T>(l.b[i], j);
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* const out = static_cast<const Lane*>(lanes[lane])->c;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) out[i] += left[row][k] * right[k][column];
      }
    }
  };
  ::simt::collective(&mine, together, DF_SIMT_SITE);
}

__device__ inline void mma_16x8x8_tf32(float* c, const uint32_t* a, const uint32_t* b) {
  struct Lane {
    float* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  const auto together = [](void* const* lanes) {
    constexpr uint32_t kUsed = 0xffffe000u;  // the tensor core ignores the other bits
    float left[16][8], right[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Lane& l = *static_cast<const Lane*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][t + i / 2 * 4] = bits_float(l.a[i] & kUsed);
      for (int i = 0; i < 2; ++i) right[t + 4 * i][g] = bits_float(l.b[i] & kUsed);
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* const out = static_cast<const Lane*>(lanes[lane])->c;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 8; ++k) out[i] += left[row][k] * right[k][column];
      }
    }
  };
  ::simt::collective(&mine, together, DF_SIMT_SITE);
}

// Four 8x8 matrices of 16-bit elements; lanes 8i ... 8i + 7 give the rows of the i-th (16 bytes each, aligned).
template <bool kTranspose>
__device__ inline void load_matrices(uint32_t* out, const void* row) {
  struct Lane {
    uint32_t* out;
    const void* row;
  } mine{out, row};
  ::simt::require_aligned(row, 16, "a row of ldmatrix", DF_SIMT_SITE);
  const auto together = [](void* const* lanes) {
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], static_cast<const Lane*>(lanes[8 * i + r])->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t low = kTranspose ? matrix[2 * t][g] : matrix[g][2 * t];
        const uint32_t high = kTranspose ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
        static_cast<const Lane*>(lanes[lane])->out[i] = low | high << 16;
      }
    }
  };
  ::simt::collective(&mine, together, DF_SIMT_SITE);
}

#define DF_COPY_ASYNC_16(to, from, there) ::simt::copy_async((to), (from), 16, (there) ? 16 : 0, DF_SIMT_SITE)
#define DF_COPY_ASYNC_8(to, from, there) ::simt::copy_async((to), (from), 8, (there) ? 8 : 0, DF_SIMT_SITE)
__device__ __forceinline__ void copy_async_commit() { ::simt::commit_copies(); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  ::simt::wait_copies(kPending);
}

#else

template <typename T>
__device__ __forceinline__ void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b) {
  if constexpr (std::is_same_v<T, bf16_t>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x8_tf32(float* c, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit elements; lanes 8i ... 8i + 7 give the rows of the i-th (16 bytes each, aligned).
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t* out, const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool there) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_8(void* to, const void* from, bool there) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = there ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
// 16 or 8 bytes from global into shared memory; zeros where nothing is `there` (`from` must be valid even so)
#define DF_COPY_ASYNC_16(to, from, there) copy_async_16((to), (from), (there))
#define DF_COPY_ASYNC_8(to, from, there) copy_async_8((to), (from), (there))
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

// x = high + low up to 2^-23 |x|, both tf32. Three products of parts (all but low * low) make a product of float32.
// `high` is rounded to nearest: were it cut off, all low parts would have the sign of their x, and the products that
// are left out would add up.
__device__ __forceinline__ void split_tf32(uint32_t& high, uint32_t& low, float x) {
  high = (float_bits(x) + 0x1000u) & 0xffffe000u;
  low = float_bits(x - bits_float(high));
}

// c += a . b of parts of float32, all but the product of the low ones; the small products first
__device__ __forceinline__ void multiply_split(float* c, const uint32_t (*a)[4], const uint32_t (*b)[2]) {
  mma_16x8x8_tf32(c, a[1], b[0]);
  mma_16x8x8_tf32(c, a[0], b[1]);
  mma_16x8x8_tf32(c, a[0], b[0]);
}

// ---- operands: four words of a fragment, as the tensor core takes them

template <typename T>
struct Operand {
  uint32_t word[4];
  __device__ __forceinline__ explicit Operand(const uint32_t* raw) {
    DF_UNROLL
    for (int i = 0; i < 4; ++i) word[i] = raw[i];
  }
};
// Float32 in two tf32 parts. Inf has no low part: products with Inf are NaN.
template <>
struct Operand<float> {
  uint32_t word[4], low[4];
  __device__ __forceinline__ explicit Operand(const uint32_t* raw) {
    DF_UNROLL
    for (int i = 0; i < 4; ++i) split_tf32(word[i], low[i], bits_float(raw[i]));
  }
};

// Depth of one product: 32 bytes of a row.
template <typename T>
inline constexpr int kProductDepth = 32 / sizeof(T);

// sum += a . b, with the first or second eight columns of an operand that has sixteen. What low parts of float32 give
// goes to `rest` (which may be `sum`): tensor cores truncate when they add, so small terms are best kept apart.
template <typename T>
__device__ __forceinline__ void multiply(float* sum, float* rest, const Operand<T>& a, const Operand<T>& b, int which) {
  if constexpr (std::is_same_v<T, float>) {
    mma_16x8x8_tf32(rest, a.low, b.word + 2 * which);
    mma_16x8x8_tf32(rest, a.word, b.low + 2 * which);
    mma_16x8x8_tf32(sum, a.word, b.word + 2 * which);
  } else {
    mma_16x8x16<T>(sum, a.word, b.word + 2 * which);
  }
}

// ---- tiles of 16-bit elements or floats in shared memory, rows of kWidth elements

// Rows are 16 bytes longer than their elements, so that eight rows at one column lie in different banks.
template <int kWidth, typename T = uint16_t>
inline constexpr int kTileStride = kWidth + 16 / sizeof(T);

// A fragment of rows [row, row + 16), columns [column, column + kProductDepth)
template <int kWidth, typename T>
__device__ __forceinline__ void load_a(uint32_t* a, const T* tile, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(a,
                       tile + (row + lane % 16) * kTileStride<kWidth, T> + column + lane / 16 * (kProductDepth<T> / 2));
}

// B fragments of two blocks of eight columns: the tile holds B transposed, B[k, n] = tile[n, k]
template <int kWidth, typename T>
__device__ __forceinline__ void load_b(uint32_t* b, const T* tile, int n, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(
      b, tile + (n + lane % 8 + lane / 16 * 8) * kTileStride<kWidth, T> + k + lane / 8 % 2 * (kProductDepth<T> / 2));
}

// The same where the tile holds B as it is, B[k, n] = tile[k, n]. Of floats, rows 2t and 2t + 1 take the places t and
// t + 4, as the columns of C fragments do that become A fragments.
template <int kWidth, typename T>
__device__ __forceinline__ void load_b_rows(uint32_t* b, const T* tile, int n, int k) {
  constexpr int kStride = kTileStride<kWidth, T>;
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<T, float>) {
    const float* at = tile + (k + lane % 4 * 2) * kStride + n + lane / 4;
    DF_UNROLL
    for (int i = 0; i < 4; ++i) b[i] = float_bits(at[i % 2 * kStride + i / 2 * 8]);
  } else {
    load_matrices<true>(b, tile + (k + lane % 16) * kStride + n + lane / 16 * 8);
  }
}

// A fragment of the kProductDepth columns of a product's result that begin with the block c[0]; 16-bit: rounded
template <typename T>
__device__ __forceinline__ void a_of_result(uint32_t* a, const float (*c)[4]) {
  DF_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>)
      a[i] = float_bits(c[0][i % 2 * 2 + i / 2]);
    else
      a[i] = pack2<T>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
  }
}

// sum[h] += A[h] . tile[row ..., :]^T with kBlocks * 8 rows of the tile; a_of(a, h, k) gives fragments of A
template <int kDepth, typename T, int kHalves, int kBlocks, typename A>
__device__ __forceinline__ void multiply_transposed(float (&sum)[kHalves][kBlocks][4], A a_of, const T* tile, int row) {
  [[maybe_unused]] constexpr int kAtOnce = std::is_same_v<T, float> ? 4 : kDepth / kProductDepth<T>;
  float rest[kHalves][kBlocks][4] = {};
  DF_UNROLL_BY(kAtOnce)
  for (int k = 0; k < kDepth; k += kProductDepth<T>) {
    uint32_t raw[kHalves][4];
    DF_UNROLL
    for (int h = 0; h < kHalves; ++h) a_of(raw[h], h, k);
    DF_UNROLL
    for (int n = 0; n < kBlocks; n += 2) {
      uint32_t right[4];
      load_b<kDepth>(right, tile, row + n * 8, k);
      const Operand<T> b(right);
      DF_UNROLL
      for (int i = 0; i < 2 * kHalves; ++i)
        multiply(sum[i / 2][n + i % 2], rest[i / 2][n + i % 2], Operand<T>(raw[i / 2]), b, i % 2);
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    DF_UNROLL
    for (int i = 0; i < kHalves * kBlocks * 4; ++i)
      sum[i / 4 / kBlocks][i / 4 % kBlocks][i % 4] += rest[i / 4 / kBlocks][i / 4 % kBlocks][i % 4];
  }
}

// sum[h] += W[h] . tile[row ..., :], where W is a product's result of kBlocks * 8 columns
template <int kWidth, typename T, int kHalves, int kBlocks>
__device__ __forceinline__ void multiply_add(float (*sum)[kWidth / 8][4], const float (&w)[kHalves][kBlocks][4],
                                             const T* tile, int row) {
  constexpr int kSteps = 16 / kProductDepth<T>;  // sixteen rows at a time
  DF_UNROLL
  for (int block = 0; block < kBlocks; block += 2) {
    uint32_t left[kHalves][kSteps][4];
    DF_UNROLL
    for (int i = 0; i < kHalves * kSteps; ++i)
      a_of_result<T>(left[i / kSteps][i % kSteps], w[i / kSteps] + block + i % kSteps);
    DF_UNROLL
    for (int n = 0; n < kWidth / 8; n += 2) {
      float part[kHalves][2][4] = {};
      DF_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        uint32_t right[4];
        load_b_rows<kWidth>(right, tile, n * 8, row + block * 8 + step * kProductDepth<T>);
        const Operand<T> b(right);
        DF_UNROLL
        for (int i = 0; i < 2 * kHalves; ++i) {
          float* const to = std::is_same_v<T, float> ? part[i / 2][i % 2] : sum[i / 2][n + i % 2];
          multiply(to, to, Operand<T>(left[i / 2][step]), b, i % 2);
        }
      }
      if constexpr (std::is_same_v<T, float>) {  // rounded to nearest, where long sums would drift
        DF_UNROLL
        for (int i = 0; i < 8 * kHalves; ++i) sum[i / 8][n + i / 4 % 2][i % 4] += part[i / 8][i / 4 % 2][i % 4];
      }
    }
  }
}

}  // namespace dalle_fast
