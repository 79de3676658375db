// SPDX-License-Identifier: MIT
// G = P Q^T and E -= G on tensor cores, 128 x 128 of G a block: codes are exact tf32 numbers. Columns are dealt to
// fragments so that a thread ends with eight neighbours, 16 bytes of E, which come while the block multiplies.
// Floor: 8 bytes an element, 4 of G written, 2 of E read and written.
#include "../core/mma.cuh"
#include "powersgd.h"

namespace dalle_fast::powersgd {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128, kPanel = 64;  // 128 x 128 of G; 64 of the rank at a time
constexpr int kFragments = kTile * kPanel;

// Where a piece of eight codes of the tile of E lies: two rows that a quarter of a warp reads lie in different banks.
__device__ __forceinline__ int place(int row, int piece) { return row * kTile + (piece ^ row % 2 * 4) * 8; }

// 128 rows of codes [rank] as fragments [step of 8, 16 rows, lane, 4]; a lane has two rows, slots t and t + 4 of each.
template <typename RowOf>
__device__ __forceinline__ void load_panel(float* to, const uint16_t* from, int64_t rows, int64_t rank, int64_t k0,
                                           bool pieces, RowOf row_of) {
  for (int unit = static_cast<int>(threadIdx.x); unit < kTile / 16 * kPanel; unit += kThreads) {
    const int lane = unit % 32, block = unit / 32 % (kTile / 16), part = unit / 32 / (kTile / 16);
    const int64_t k = k0 + part * 32 + lane % 4 * 8;
    PieceOf<uint16_t> code[2] = {};
    DF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t row = row_of(block, lane / 4, i);
      if (row >= rows || k >= rank) continue;
      const uint16_t* source = from + row * rank + k;
      if (pieces) {
        code[i] = *reinterpret_cast<const PieceOf<uint16_t>*>(source);
      } else {
        DF_UNROLL
        for (int j = 0; j < 8; ++j)
          if (k + j < rank) code[i].at[j] = source[j];
      }
    }
    DF_UNROLL
    for (int s = 0; s < 4; ++s) {
      Four<float> fragment;
      DF_UNROLL
      for (int j = 0; j < 4; ++j) fragment.at[j] = minifloat_decode<true>(code[j / 2].at[s * 2 + j % 2]);
      reinterpret_cast<Four<float>*>(to)[((part * 4 + s) * (kTile / 16) + block) * 32 + lane] = fragment;
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    reconstruct_all(const ReconstructParams p, bool factor_pieces, bool error_pieces, bool grad_pieces) {
  DF_DYNAMIC_SHARED(float, shared);
  float* const right = shared + kFragments;
  uint16_t* const error = reinterpret_cast<uint16_t*>(right + kFragments);
  const int64_t tiles = (p.columns + kTile - 1) / kTile;
  const int64_t row0 = blockIdx.x / tiles * kTile, column0 = blockIdx.x % tiles * kTile;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  // rows warp / 2 * 32 + 16 m + 8 i + g; columns warp % 2 * 64 + 32 n + 8 t + 0 ... 7
  const int64_t row = row0 + warp / 2 * 32 + g, column = column0 + warp % 2 * 64 + t * 8;
  if (p.error) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile / 8; i += kThreads) {
      const int64_t r = row0 + i / 16, c = column0 + i % 16 * 8;
      uint16_t* to = error + place(i / 16, i % 16);
      const uint16_t* from = p.error + r * p.error_stride + c;
      if (error_pieces) {
        const bool there = r < p.rows && c < p.columns;
        DF_COPY_ASYNC_16(to, there ? from : p.error, there);
      } else {
        for (int j = 0; j < 8; ++j) to[j] = r < p.rows && c + j < p.columns ? from[j] : uint16_t{0};
      }
    }
    copy_async_commit();
  }
  float sum[2][8][4] = {};
  for (int64_t k0 = 0; k0 < p.rank; k0 += kPanel) {
    if (k0 > 0) __syncthreads();  // nobody reads the panel before any more
    load_panel(shared, p.left, p.rows, p.rank, k0, factor_pieces,
               [&](int block, int slot, int i) { return row0 + block * 16 + slot + 8 * i; });
    // slot 2 t + j of tile n of four is column 8 t + 2 n + j of 32
    load_panel(right, p.right, p.columns, p.rank, k0, factor_pieces, [&](int block, int slot, int i) {
      return column0 + block / 2 * 32 + slot / 2 * 8 + block % 2 * 4 + i * 2 + slot % 2;
    });
    __syncthreads();
    DF_UNROLL
    for (int step = 0; step < kPanel / 8; ++step) {
      const Four<float>* a = reinterpret_cast<const Four<float>*>(shared) + (step * 8 + warp / 2 * 2) * 32 + lane;
      const Four<float>* b = reinterpret_cast<const Four<float>*>(right) + (step * 8 + warp % 2 * 4) * 32 + lane;
      uint32_t left[2][4];
      DF_UNROLL
      for (int m = 0; m < 2; ++m) {
        const Four<float> x = a[m * 32];
        DF_UNROLL
        for (int j = 0; j < 4; ++j) left[m][j] = float_bits(x.at[j % 2 * 2 + j / 2]);
      }
      DF_UNROLL
      for (int n = 0; n < 8; n += 2) {
        const Four<float> x = b[n / 2 * 32];
        const uint32_t y[4] = {float_bits(x.at[0]), float_bits(x.at[1]), float_bits(x.at[2]), float_bits(x.at[3])};
        DF_UNROLL
        for (int j = 0; j < 4; ++j) mma_16x8x8_tf32(sum[j % 2][n + j / 2], left[j % 2], y + j / 2 * 2);
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();
  DF_UNROLL
  for (int i = 0; i < 4; ++i) {
    DF_UNROLL
    for (int n = 0; n < 2; ++n) {
      const int64_t r = row + 8 * i, c = column + 32 * n;
      if (r >= p.rows || c >= p.columns) continue;
      PieceOf<uint16_t> old = {};
      if (p.error)
        old = *reinterpret_cast<const PieceOf<uint16_t>*>(error +
                                                          place(warp / 2 * 32 + g + 8 * i, warp % 2 * 8 + n * 4 + t));
      PieceOf<float> out[2];
      DF_UNROLL
      for (int j = 0; j < 8; ++j) {
        const float x = sum[i / 2][n * 4 + j / 2][i % 2 * 2 + j % 2];
        out[j / 4].at[j % 4] = x * p.grad_factor;
        if (p.error) old.at[j] = minifloat_encode<true>(minifloat_decode<true>(old.at[j]) - x * p.error_factor);
      }
      const int64_t grad = r * p.grad_stride + c, code = r * p.error_stride + c;
      DF_UNROLL
      for (int j = 0; j < 2; ++j)
        if (grad_pieces && c + j * 4 < p.columns) vector_at<PieceOf<float>>(p.grad, grad + j * 4) = out[j];
      if (error_pieces) vector_at<PieceOf<uint16_t>>(p.error, code) = old;
      DF_UNROLL
      for (int j = 0; j < 8; ++j) {
        if (c + j >= p.columns) continue;
        if (!grad_pieces) p.grad[grad + j] = out[j / 4].at[j % 4];
        if (p.error && !error_pieces) p.error[code + j] = old.at[j];
      }
    }
  }
}

}  // namespace

void reconstruct_cuda(const ReconstructParams& p, void* stream) {
  if (p.rows == 0 || p.columns == 0) return;
  const DeviceGuard guard(p.device.index);
  const int64_t blocks = (p.rows + kTile - 1) / kTile * ((p.columns + kTile - 1) / kTile);
  const bool factor_pieces = has_pieces<uint16_t>(p.left, p.rank, p.rank) && has_pieces<uint16_t>(p.right, 0, 0);
  const bool error_pieces = p.error && has_pieces<uint16_t>(p.error, p.error_stride, p.columns);
  const bool grad_pieces = has_pieces<float>(p.grad, p.grad_stride, p.columns);
  constexpr std::size_t kBytes = 2 * kFragments * sizeof(float) + kTile * kTile * sizeof(uint16_t);
  static_assert(kBytes <= kLeastSharedLimit, "shared memory of a device");
  allow_dynamic_shared(reconstruct_all, kBytes);
  DF_LAUNCH(reconstruct_all, static_cast<unsigned>(blocks), kThreads, kBytes, stream, p, factor_pieces, error_pieces,
            grad_pieces);
}

}  // namespace dalle_fast::powersgd
