// SPDX-License-Identifier: MIT
// A matrix that fits the shared memory of a block, or of a cluster of up to eight, is done there (on_chip.cuh). Others
// stay in the second-level cache, a block a matrix: warps share the rows, lanes the columns; sums over rows meet in a
// fixed order. There a column below its pivot keeps x, and v = x * inverse. R is never stored.
#include <stdexcept>
#include <string>

#include "on_chip.cuh"

namespace dalle_fast::householder {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTiles = 4;  // columns a lane has at a time
constexpr int kWidth = 32 * kTiles;
// In the cache: `part` and `dots`, and of each column tau and the inverse
constexpr std::size_t kInCacheBytes = sizeof(float) * (kWarps + 1) * kWidth, kColumnBytes = sizeof(float) * 2;

struct Block {
  float* a;  // [rows, columns]
  int64_t rows, columns;
  unsigned warp, lane;
  float *part, *dots;
};

// Sums, or largest values, of what each warp has for kWidth columns; they meet in s.dots.
template <typename Combine>
__device__ void combine_warps(const Block& s, const float* mine, Combine combine) {
  DF_UNROLL
  for (int k = 0; k < kTiles; ++k) s.part[s.warp * kWidth + s.lane + 32 * k] = mine[k];
  __syncthreads();
  for (unsigned t = threadIdx.x; t < kWidth; t += kThreads) {
    float all = 0.0f;
    for (int w = 0; w < kWarps; ++w) all = combine(all, s.part[w * kWidth + t]);
    s.dots[t] = all;
  }
  __syncthreads();
}

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
  combine_warps(s, sum, [](float a, float b) { return a + b; });
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

// P + eps I, columns times powers of two; all NaN if anything is not finite. `scale` has a place a column.
template <bool kCodes>
__device__ void load(const Block& s, const Batch& b, int64_t index, float eps, float* scale) {
  const auto one = [&](int64_t i, int64_t c) {
    const int64_t at = index * b.stride + i * b.row_stride + c * b.column_stride;
    const float x =
        kCodes ? minifloat_decode<true>(static_cast<const uint16_t*>(b.p)[at]) : static_cast<const float*>(b.p)[at];
    s.a[i * b.columns + c] = x + (i == c ? eps : 0.0f);
  };
  if (b.row_stride < b.column_stride) {
    for (int64_t c = s.warp; c < b.columns; c += kWarps)
      for (int64_t i = s.lane; i < b.rows; i += 32) one(i, c);
  } else {
    for (int64_t i = s.warp; i < b.rows; i += kWarps)
      for (int64_t c = s.lane; c < b.columns; c += 32) one(i, c);
  }
  __syncthreads();
  for (int64_t c0 = 0; c0 < s.columns; c0 += kWidth) {
    float largest[kTiles] = {};
    for (int64_t i = s.warp; i < s.rows; i += kWarps) DF_UNROLL
    for (int k = 0; k < kTiles; ++k)
      if (c0 + s.lane + 32 * k < s.columns)
        largest[k] = larger(largest[k], fabsf(s.a[i * s.columns + c0 + s.lane + 32 * k]));
    combine_warps(s, largest, [](float a, float b) { return larger(a, b); });
    for (int64_t c = c0 + threadIdx.x; c < s.columns && c < c0 + kWidth; c += kThreads)
      scale[c] = finite_scale(s.dots[c - c0]);
  }
  __syncthreads();
  bool bad = false;
  for (int64_t c = s.lane; c < s.columns; c += 32) bad = bad || scale[c] != scale[c];
  bad = __any_sync(0xffffffffu, bad);
  for (int64_t i = s.warp; i < s.rows; i += kWarps)
    for (int64_t c = s.lane; c < s.columns; c += 32) s.a[i * s.columns + c] *= bad ? NAN : scale[c];
  __syncthreads();
}

template <bool kCodes>
__global__ void __launch_bounds__(kThreads, 2) orthonormalize_in_cache(const Table table, const float eps) {
  DF_SHARED(float, part, kWarps* kWidth);
  DF_SHARED(float, dots, kWidth);
  DF_DYNAMIC_SHARED(float, memory);
  const int mine = table.of_block(blockIdx.x);
  const Batch& b = table.item[mine];
  const int64_t index = blockIdx.x - table.first_block[mine], base = index * b.rows * b.columns;
  float* const tau = memory;
  float* const inverse = memory + b.columns;
  Block s;
  s.a = (kCodes ? b.work : static_cast<float*>(b.q)) + base;
  s.rows = b.rows;
  s.columns = b.columns;
  s.warp = threadIdx.x / 32;
  s.lane = threadIdx.x % 32;
  s.part = part;
  s.dots = dots;
  load<kCodes>(s, b, index, eps, tau);

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

  for (int64_t i = threadIdx.x; kCodes && i < b.rows * b.columns; i += kThreads)
    static_cast<uint16_t*>(b.q)[base + i] = minifloat_encode<true>(s.a[i]);
}

// Blocks that share a matrix: the fewest whose shared memory holds it; 0: it stays in the second-level cache.
unsigned cluster_of(const Batch& b, std::size_t limit, bool clusters) {
  for (unsigned cluster = 1; cluster <= (clusters ? kMaxCluster : 1u); cluster *= 2)
    if (b.columns <= kMaxThreads && (b.rows + cluster - 1) / cluster <= kMaxThreads &&
        sizeof(float) * Share(b, cluster).floats() <= limit)
      return cluster;
  return 0;
}

// Of a block; the largest of a launch
struct Size {
  int threads;
  std::size_t bytes;
};
Size size_of(const Share& share) { return {share.threads(), sizeof(float) * share.floats()}; }

template <bool kCodes>
void launch(const Table& table, const Params& p, unsigned cluster, const Size& size, void* stream) {
  const auto [threads, bytes] = size;
  const std::size_t limit = shared_limit(p.device.index);  // not `bytes`: another thread may launch as well
  if (cluster == 0) {
    if (kInCacheBytes + bytes > limit)
      throw std::invalid_argument("p: the CUDA kernel takes at most " +
                                  std::to_string((limit - kInCacheBytes) / kColumnBytes) + " columns on this device");
    allow_dynamic_shared(orthonormalize_in_cache<kCodes>, bytes);
    DF_LAUNCH(orthonormalize_in_cache<kCodes>, table.blocks, kThreads, bytes, stream, table, p.eps);
  } else if (cluster == 1) {
    allow_dynamic_shared(orthonormalize_on_chip<kCodes, false>, limit);
    DF_LAUNCH((orthonormalize_on_chip<kCodes, false>), table.blocks, threads, bytes, stream, table, p.eps);
  } else {
    allow_dynamic_shared(orthonormalize_on_chip<kCodes, true>, limit);
    DF_LAUNCH_CLUSTER((orthonormalize_on_chip<kCodes, true>), table.blocks * cluster, threads, cluster, bytes, stream,
                      table, p.eps);
  }
}

template <bool kCodes>
void launch_all(const Params& p, void* stream) {
  const std::size_t limit = shared_limit(p.device.index);
  const bool clusters = has_clusters(orthonormalize_on_chip<kCodes, true>);
  for (const unsigned cluster : {8u, 4u, 2u, 1u, 0u}) {
    Table table{};
    Size size{};
    const auto flush = [&] {
      if (table.count > 0) launch<kCodes>(table, p, cluster, size, stream);
      table.count = 0;
      table.blocks = 0;
      size = {};
    };
    for (int64_t i = 0; i < p.num_batches; ++i) {
      const Batch& b = p.batches[i];
      if (cluster_of(b, limit, clusters) != cluster) continue;
      if (table.full()) flush();
      table.add(b, b.count);
      const Size its =
          cluster > 0 ? size_of(Share(b, cluster)) : Size{kThreads, kColumnBytes * static_cast<std::size_t>(b.columns)};
      size.threads = its.threads > size.threads ? its.threads : size.threads;
      size.bytes = its.bytes > size.bytes ? its.bytes : size.bytes;
    }
    flush();
  }
}

}  // namespace

void orthonormalize_cuda(const Params& p, void* stream) {
  if (p.num_batches == 0) return;
  const DeviceGuard guard(p.device.index);
  p.codes ? launch_all<true>(p, stream) : launch_all<false>(p, stream);
}

}  // namespace dalle_fast::householder
