// SPDX-License-Identifier: MIT
// A block a matrix, which stays in shared memory where it fits (496 x 112 floats do) and in the second-level cache
// otherwise. Warps share the rows, lanes the columns; sums over rows meet in a fixed order. R is never stored: a
// column below its pivot keeps x, and v = x * inverse.
#include "../core/device_math.cuh"
#include "householder.h"

namespace dalle_fast::householder {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTiles = 4;  // columns a lane has at a time
constexpr int kWidth = 32 * kTiles;
constexpr int kTable = 32;  // batches of a launch: the argument stays below 4 KiB

using Table = LaunchTable<Batch, kTable>;
static_assert(sizeof(Table) <= 4000, "kernel arguments");

struct Block {
  float* a;  // [rows, columns]
  int64_t rows, columns;
  unsigned warp, lane;
  float *part, *dots;
};

// dots[c - c0] = sum over rows > j of a[i][j] a[i][c], for kWidth columns from c0
__device__ void inner_products(const Block& s, int64_t j, int64_t c0) {
  float sum[kTiles] = {};
  for (int64_t i = j + 1 + s.warp; i < s.rows; i += kWarps) {
    const float* row = s.a + i * s.columns;
    const float x = row[j];
    DF_UNROLL
    for (int k = 0; k < kTiles; ++k) {
      const int64_t c = c0 + s.lane + 32 * k;
      if (c < s.columns) sum[k] += x * row[c];
    }
  }
  DF_UNROLL
  for (int k = 0; k < kTiles; ++k) s.part[s.warp * kWidth + s.lane + 32 * k] = sum[k];
  __syncthreads();
  for (unsigned t = threadIdx.x; t < kWidth; t += kThreads) {
    float all = 0.0f;
    for (int w = 0; w < kWarps; ++w) all += s.part[w * kWidth + t];
    s.dots[t] = all;
  }
  __syncthreads();
}

// a[i][c] -= v_i weight(c) for rows > j and the kWidth columns from c0, those behind `after`
template <typename Weight>
__device__ void reflect(const Block& s, int64_t j, int64_t c0, int64_t after, float inverse, Weight weight) {
  float w[kTiles];
  DF_UNROLL
  for (int k = 0; k < kTiles; ++k) {
    const int64_t c = c0 + s.lane + 32 * k;
    w[k] = c > after && c < s.columns ? weight(c) * inverse : 0.0f;
  }
  for (int64_t i = j + 1 + s.warp; i < s.rows; i += kWarps) {
    float* row = s.a + i * s.columns;
    const float x = row[j];
    DF_UNROLL
    for (int k = 0; k < kTiles; ++k) {
      const int64_t c = c0 + s.lane + 32 * k;
      if (c > after && c < s.columns) row[c] -= x * w[k];
    }
  }
}

template <bool kCodes>
__global__ void __launch_bounds__(kThreads)
    orthonormalize_all(const Table table, const float eps, const bool in_shared) {
  DF_SHARED(float, part, kWarps* kWidth);
  DF_SHARED(float, dots, kWidth);
  DF_DYNAMIC_SHARED(float, memory);
  const int mine = table.of_block(blockIdx.x);
  const Batch& b = table.item[mine];
  const int64_t index = blockIdx.x - table.first_block[mine], base = index * b.rows * b.columns;
  float* const tau = memory;
  float* const inverse = memory + b.columns;
  Block s;
  s.a = in_shared ? memory + 2 * b.columns : (kCodes ? b.work : static_cast<float*>(b.q)) + base;
  s.rows = b.rows;
  s.columns = b.columns;
  s.warp = threadIdx.x / 32;
  s.lane = threadIdx.x % 32;
  s.part = part;
  s.dots = dots;

  for (int64_t c = threadIdx.x; c < b.columns; c += kThreads) {
    float largest = 0.0f;
    for (int64_t i = 0; i < b.rows; ++i) {
      const int64_t at = index * b.stride + i * b.row_stride + c * b.column_stride;
      float x =
          kCodes ? minifloat_decode<true>(static_cast<const uint16_t*>(b.p)[at]) : static_cast<const float*>(b.p)[at];
      if (i == c) x += eps;
      s.a[i * b.columns + c] = x;
      largest = fabsf(x) > largest ? fabsf(x) : largest;
    }
    const float scale = column_scale(largest);
    for (int64_t i = 0; i < b.rows; ++i) s.a[i * b.columns + c] *= scale;
  }
  __syncthreads();

  for (int64_t j = 0; j < b.columns; ++j) {
    inner_products(s, j, j);
    const Reflection h = reflection_of(s.a[j * b.columns + j], dots[0]);
    if (threadIdx.x == 0) {
      tau[j] = h.tau;
      inverse[j] = h.inverse;
    }
    const float* pivot = s.a + j * b.columns;
    for (int64_t c0 = j;; c0 += kWidth) {
      reflect(s, j, c0, j, h.inverse, [&](int64_t c) { return h.tau * (pivot[c] + dots[c - c0] * h.inverse); });
      __syncthreads();
      if (c0 + kWidth >= b.columns) break;
      inner_products(s, j, c0 + kWidth);
    }
  }

  for (int64_t j = b.columns - 1; j >= 0; --j) {
    const Reflection h{tau[j], inverse[j]};
    float* const pivot = s.a + j * b.columns;
    for (int64_t c0 = j + 1; c0 < b.columns; c0 += kWidth) {
      inner_products(s, j, c0);
      reflect(s, j, c0, j, h.inverse, [&](int64_t c) {
        const float w = h.tau * h.inverse * dots[c - c0];
        if (s.warp == 0) pivot[c] = -w;
        return w;
      });
      __syncthreads();
    }
    for (int64_t i = threadIdx.x; i < b.rows; i += kThreads) {
      float* x = s.a + i * b.columns + j;
      *x = i < j ? 0.0f : i == j ? 1.0f - h.tau : -h.tau * h.inverse * *x;
    }
    __syncthreads();
  }

  if (!kCodes && !in_shared) return;
  for (int64_t i = threadIdx.x; i < b.rows * b.columns; i += kThreads) {
    if (kCodes)
      static_cast<uint16_t*>(b.q)[base + i] = minifloat_encode<true>(s.a[i]);
    else
      static_cast<float*>(b.q)[base + i] = s.a[i];
  }
}

template <bool kCodes>
void launch(const Params& p, void* stream) {
  const std::size_t limit = dynamic_shared_limit(p.device.index) - sizeof(float) * (kWarps + 1) * kWidth;
  for (const bool in_shared : {true, false}) {
    Table table{};
    std::size_t bytes = 0;
    const auto flush = [&] {
      if (table.count == 0) return;
      allow_dynamic_shared(orthonormalize_all<kCodes>, bytes);
      DF_LAUNCH((orthonormalize_all<kCodes>), table.blocks, kThreads, bytes, stream, table, p.eps, in_shared);
      table.count = 0;
      bytes = 0;
      table.blocks = 0;
    };
    for (int64_t i = 0; i < p.num_batches; ++i) {
      const Batch& b = p.batches[i];
      const std::size_t all = sizeof(float) * static_cast<std::size_t>(b.columns * (b.rows + 2));
      if ((all <= limit) != in_shared) continue;
      const std::size_t mine = in_shared ? all : sizeof(float) * 2 * static_cast<std::size_t>(b.columns);
      table.add(b, b.count);
      bytes = mine > bytes ? mine : bytes;
      if (table.full()) flush();
    }
    flush();
  }
}

}  // namespace

void orthonormalize_cuda(const Params& p, void* stream) {
  if (p.num_batches == 0) return;
  const DeviceGuard guard(p.device.index);
  p.codes ? launch<true>(p, stream) : launch<false>(p, stream);
}

}  // namespace dalle_fast::householder
