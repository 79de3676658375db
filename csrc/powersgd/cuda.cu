// SPDX-License-Identifier: MIT
// Products in float32 from tiles in shared memory: 32 rows of E a block against 128 columns of X; 64 x 64 of G. A block
// of `project` owns its rows of E, so it alone adds the gradient there, once, before its first product.
#include "../core/device_math.cuh"
#include "powersgd.h"

namespace dalle_fast::powersgd {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 32, kDepth = 32, kColumns = 128;  // project
constexpr int kTile = 64, kStep = 16;                   // reconstruct

__device__ __forceinline__ bool is_finite(float x) { return x - x == 0.0f; }

template <typename T>
__global__ void __launch_bounds__(kThreads) check_finite(const ProjectParams p) {
  const int64_t outer = p.transposed ? p.depth : p.rows, inner = p.transposed ? p.rows : p.depth;
  bool finite = true;
  for (int64_t o = blockIdx.x; o < outer; o += gridDim.x)
    for (int64_t i = threadIdx.x; i < inner; i += kThreads)
      finite = finite && is_finite(to_float(static_cast<const T*>(p.grad)[o * p.grad_stride + i]));
  if (!finite) p.status[0] = 0;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) project_all(const ProjectParams p) {
  DF_SHARED(float, e, kDepth*(kRows + 1));  // [depth][rows]
  DF_SHARED(float, x, kDepth* kColumns);
  const bool add = p.grad && p.status[0];
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;
  const unsigned column = threadIdx.x % 32, row = threadIdx.x / 32;  // four rows, four columns a thread
  for (int64_t c0 = 0; c0 < p.rank; c0 += kColumns) {
    float sum[4][4] = {};
    for (int64_t k0 = 0; k0 < p.depth; k0 += kDepth) {
      for (unsigned t = threadIdx.x; t < kRows * kDepth; t += kThreads) {
        const unsigned r = p.transposed ? t % kRows : t / kDepth, k = p.transposed ? t / kRows : t % kDepth;
        float value = 0.0f;
        if (row0 + r < p.rows && k0 + k < p.depth) {
          const int64_t o = p.transposed ? k0 + k : row0 + r, i = p.transposed ? row0 + r : k0 + k;
          uint16_t* code = p.error + o * p.error_stride + i;
          value = minifloat_decode<true>(*code);
          if (add && c0 == 0) {
            *code = minifloat_encode<true>(value + to_float(static_cast<const T*>(p.grad)[o * p.grad_stride + i]) *
                                                       p.inverse_grad_scale);
            value = minifloat_decode<true>(*code);
          }
          if (!is_finite(value)) p.status[1] = 0;
        }
        e[k * (kRows + 1) + r] = value;
      }
      for (unsigned t = threadIdx.x; t < kDepth * kColumns; t += kThreads) {
        const int64_t k = k0 + t / kColumns, c = c0 + t % kColumns;
        float value = 0.0f;
        if (k < p.depth && c < p.rank)
          value = p.factor_is_codes ? minifloat_decode<true>(static_cast<const uint16_t*>(p.factor)[k * p.rank + c])
                                    : static_cast<const float*>(p.factor)[k * p.rank + c];
        x[t] = value;
      }
      __syncthreads();
      const int depth = static_cast<int>(p.depth - k0 < kDepth ? p.depth - k0 : kDepth);
      for (int k = 0; k < depth; ++k) {
        float a[4], b[4];
        DF_UNROLL
        for (int i = 0; i < 4; ++i) {
          a[i] = e[k * (kRows + 1) + row * 4 + i];
          b[i] = x[k * kColumns + column + 32 * i];
        }
        DF_UNROLL
        for (int i = 0; i < 4; ++i) {
          DF_UNROLL
          for (int j = 0; j < 4; ++j) sum[i][j] += a[i] * b[j];
        }
      }
      __syncthreads();
    }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const int64_t r = row0 + row * 4 + i, c = c0 + column + 32 * j;
        if (r >= p.rows || c >= p.rank) continue;
        uint16_t code = minifloat_encode<true>(sum[i][j] * p.scale);
        if ((code & 0x7fffu) >= Minifloat<true>::kInf) p.status[2] = 0;
        if ((code & 0x7fffu) == Minifloat<true>::kInf) code = static_cast<uint16_t>(code - 1);
        p.out[r * p.rank + c] = code;
      }
  }
}

__global__ void __launch_bounds__(kThreads) reconstruct_all(const ReconstructParams p) {
  DF_SHARED(float, left, kStep*(kTile + 1));
  DF_SHARED(float, right, kStep*(kTile + 1));
  const int64_t tiles = (p.columns + kTile - 1) / kTile;
  const int64_t row0 = blockIdx.x / tiles * kTile, column0 = blockIdx.x % tiles * kTile;
  const unsigned column = threadIdx.x % 16, row = threadIdx.x / 16;  // every 16th of the tile
  float sum[4][4] = {};
  for (int64_t k0 = 0; k0 < p.rank; k0 += kStep) {
    for (unsigned t = threadIdx.x; t < kTile * kStep; t += kThreads) {
      const unsigned r = t / kStep, k = t % kStep;
      const bool inside = k0 + k < p.rank;
      left[k * (kTile + 1) + r] =
          inside && row0 + r < p.rows ? minifloat_decode<true>(p.left[(row0 + r) * p.rank + k0 + k]) : 0.0f;
      right[k * (kTile + 1) + r] =
          inside && column0 + r < p.columns ? minifloat_decode<true>(p.right[(column0 + r) * p.rank + k0 + k]) : 0.0f;
    }
    __syncthreads();
    DF_UNROLL
    for (int k = 0; k < kStep; ++k) {
      DF_UNROLL
      for (int i = 0; i < 4; ++i) {
        DF_UNROLL
        for (int j = 0; j < 4; ++j)
          sum[i][j] += left[k * (kTile + 1) + row + 16 * i] * right[k * (kTile + 1) + column + 16 * j];
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t r = row0 + row + 16 * i, c = column0 + column + 16 * j;
      if (r >= p.rows || c >= p.columns) continue;
      p.grad[r * p.grad_stride + c] = sum[i][j] * p.grad_factor;
      if (!p.error) continue;
      uint16_t* code = p.error + r * p.error_stride + c;
      *code = minifloat_encode<true>(minifloat_decode<true>(*code) - sum[i][j] * p.error_factor);
    }
}

}  // namespace

void project_cuda(const ProjectParams& p, void* stream) {
  if (p.rows == 0) return;
  const DeviceGuard guard(p.device.index);
  const unsigned blocks = static_cast<unsigned>((p.rows + kRows - 1) / kRows);
  if (p.grad) {
    const int64_t outer = p.transposed ? p.depth : p.rows;
    const unsigned grid = static_cast<unsigned>(outer < 1 ? 1 : outer < 2048 ? outer : 2048);
    if (p.grad_is_bf16)
      DF_LAUNCH((check_finite<bf16_t>), grid, kThreads, 0, stream, p);
    else
      DF_LAUNCH((check_finite<float>), grid, kThreads, 0, stream, p);
  }
  if (p.grad_is_bf16)
    DF_LAUNCH((project_all<bf16_t>), blocks, kThreads, 0, stream, p);
  else
    DF_LAUNCH((project_all<float>), blocks, kThreads, 0, stream, p);
}

void reconstruct_cuda(const ReconstructParams& p, void* stream) {
  if (p.rows == 0 || p.columns == 0) return;
  const DeviceGuard guard(p.device.index);
  const int64_t blocks = (p.rows + kTile - 1) / kTile * ((p.columns + kTile - 1) / kTile);
  DF_LAUNCH(reconstruct_all, static_cast<unsigned>(blocks), kThreads, 0, stream, p);
}

}  // namespace dalle_fast::powersgd
