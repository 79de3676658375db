// SPDX-License-Identifier: MIT
// float32, portable kernels; 16-bit tensors go to cuda_mma.cu. A block owns 16 rows (queries, or keys for dk and dv), a
// warp four of them; it walks over the other side in tiles of 32, a lane a key. Pairs are masked by index arithmetic.
// The backward pass has one kernel for dq and one for dk and dv, without atomics and without memory beyond the
// log-sum-exp.
#include <stdexcept>

#include "walk.cuh"

namespace dalle_fast::sparse_attention {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kBlocks = 4;             // at least, on a multiprocessor: 128 registers a thread
constexpr int kEach = 4;               // rows of a warp
constexpr int kRows = kWarps * kEach;  // rows of a block
constexpr int kKeys = 32;
constexpr int kMaxDim = 128;

__device__ __forceinline__ Rows block_rows(const Walk& walk) {
  return rows_of(walk, static_cast<int>(blockIdx.x), kRows);
}

template <typename T>
__device__ __forceinline__ T* row_at(const Tensor4& t, int64_t b, int64_t h, int64_t position) {
  return head_of<T>(t, b, h) + position * t.stride_l;
}

// `count` rows into shared memory, `stride` floats apart; what does not exist is zero.
template <typename T>
__device__ __forceinline__ void load_rows(float* to, int stride, const Tensor4& t, const Walk& walk, const Rows& rows,
                                          int count, int64_t b, int64_t h, int dim, float factor) {
  for (int r = threadIdx.x / 32; r < count; r += kWarps) {
    const int position = walk.position(rows.image, rows.begin + r);
    const T* from = position < 0 ? nullptr : row_at<T>(t, b, h, position);
    for (int d = threadIdx.x % 32; d < dim; d += 32) to[r * stride + d] = from ? to_float(from[d]) * factor : 0.0f;
  }
}

// rows[e] . tile[lane] for the kEach rows of this warp
__device__ __forceinline__ void dots(float* out, const float* rows, const float* tile, int dim) {
  const float* mine = &tile[threadIdx.x % 32 * (dim + 1)];
  const float* first = &rows[threadIdx.x / 32 * kEach * dim];
  DF_UNROLL
  for (int e = 0; e < kEach; ++e) out[e] = 0.0f;
  for (int d = 0; d < dim; ++d) {
    const float x = mine[d];
    DF_UNROLL
    for (int e = 0; e < kEach; ++e) out[e] += first[e * dim + d] * x;
  }
}

// sum[e][j] += weight[e] of lane k * tile[k][lane + 32 j]
template <int kPer>
__device__ __forceinline__ void accumulate(float (*sum)[kPer], const float* weight, const float* tile, int dim) {
  const int lane = threadIdx.x % 32;
  for (int k = 0; k < kKeys; ++k) {
    float w[kEach];
    DF_UNROLL
    for (int e = 0; e < kEach; ++e) w[e] = __shfl_sync(0xffffffffu, weight[e], k);
    DF_UNROLL
    for (int j = 0; j < kPer; ++j) {
      const float x = lane + 32 * j < dim ? tile[k * (dim + 1) + lane + 32 * j] : 0.0f;
      DF_UNROLL
      for (int e = 0; e < kEach; ++e) sum[e][j] += w[e] * x;
    }
  }
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int bits = 16; bits > 0; bits /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, bits);
    x = other > x ? other : x;
  }
  return x;
}

// Whether a query sees a key, both rows of a block or a tile; `there`: whether the query exists
__device__ __forceinline__ bool may_see(const Walk& walk, bool there, const Rows& q, int q_at, const Rows& k,
                                        int k_at) {
  if (!there) return false;
  if (!k.image) return k_at < walk.num_text && (q.image || k_at <= q_at);
  return q.image && walk.sees(q_at, k_at);
}

// ---- forward

template <typename T, int kPer>
__global__ void __launch_bounds__(kThreads, kBlocks) attend(const Params p, const Walk walk) {
  DF_DYNAMIC_SHARED(float, shared);
  const int dim = static_cast<int>(p.head_dim), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const q = shared;
  float* const tile = shared + kRows * dim;
  const Rows rows = block_rows(walk);
  const int64_t b = blockIdx.y / p.num_heads, h = blockIdx.y % p.num_heads;
  const int64_t kv = h / (p.num_heads / p.num_kv_heads);
  load_rows<T>(q, dim, p.q, walk, rows, kRows, b, h, dim, p.scale);
  int position[kEach];
  float largest[kEach], sum[kEach] = {}, out[kEach][kPer] = {};
  DF_UNROLL
  for (int e = 0; e < kEach; ++e) {
    position[e] = walk.position(rows.image, rows.begin + warp * kEach + e);
    largest[e] = -INFINITY;
  }
  const Tiles tiles = key_tiles(walk, rows, kRows, kKeys);
  for (int i = 0; i < tiles.count; ++i) {
    const Rows tile_rows = tiles[i];
    __syncthreads();
    load_rows<T>(tile, dim + 1, p.k, walk, tile_rows, kKeys, b, kv, dim, 1.0f);
    __syncthreads();
    float s[kEach];
    dots(s, q, tile, dim);
    const int key = tile_rows.begin + lane;
    DF_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const bool seen = may_see(walk, position[e] >= 0, rows, rows.begin + warp * kEach + e, tile_rows, key);
      const float top = warp_max(seen ? s[e] : -INFINITY);
      const float now = top > largest[e] ? top : largest[e];
      const float keep = sum[e] == 0.0f ? 0.0f : expf(largest[e] - now);
      s[e] = seen ? expf(s[e] - now) : 0.0f;
      largest[e] = now;
      sum[e] = sum[e] * keep + warp_sum(s[e]);
      DF_UNROLL
      for (int j = 0; j < kPer; ++j) out[e][j] *= keep;
    }
    __syncthreads();
    load_rows<T>(tile, dim + 1, p.v, walk, tile_rows, kKeys, b, kv, dim, 1.0f);
    __syncthreads();
    accumulate<kPer>(out, s, tile, dim);
  }
  DF_UNROLL
  for (int e = 0; e < kEach; ++e) {
    if (position[e] < 0) continue;
    T* to = row_at<T>(p.out, b, h, position[e]);
    DF_UNROLL
    for (int j = 0; j < kPer; ++j)
      if (lane + 32 * j < dim) from_float(&to[lane + 32 * j], out[e][j] / sum[e]);
    if (lane == 0) p.lse[(b * p.num_heads + h) * p.length + position[e]] = largest[e] + logf(sum[e]);
  }
}

// ---- backward

// sum over channels of out * dout at a position, the same in all lanes
template <typename T>
__device__ __forceinline__ float delta_at(const Params& p, int64_t b, int64_t h, int64_t position, int dim) {
  float x = 0.0f;
  if (position >= 0)
    for (int d = threadIdx.x % 32; d < dim; d += 32)
      x += to_float(row_at<T>(p.out, b, h, position)[d]) * to_float(row_at<T>(p.dout, b, h, position)[d]);
  return warp_sum(x);
}

template <typename T, int kPer>
__global__ void __launch_bounds__(kThreads, kBlocks) gradient_of_queries(const Params p, const Walk walk) {
  DF_DYNAMIC_SHARED(float, shared);
  const int dim = static_cast<int>(p.head_dim), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const q = shared;
  float* const dout = q + kRows * dim;
  float* const tile = dout + kRows * dim;
  const Rows rows = block_rows(walk);
  const int64_t b = blockIdx.y / p.num_heads, h = blockIdx.y % p.num_heads;
  const int64_t kv = h / (p.num_heads / p.num_kv_heads);
  load_rows<T>(q, dim, p.q, walk, rows, kRows, b, h, dim, p.scale);
  load_rows<T>(dout, dim, p.dout, walk, rows, kRows, b, h, dim, 1.0f);
  int position[kEach];
  float lse[kEach], delta[kEach], dq[kEach][kPer] = {};
  for (int e = 0; e < kEach; ++e) {
    position[e] = walk.position(rows.image, rows.begin + warp * kEach + e);
    lse[e] = position[e] < 0 ? 0.0f : p.lse[(b * p.num_heads + h) * p.length + position[e]];
    delta[e] = delta_at<T>(p, b, h, position[e], dim);
  }
  const Tiles tiles = key_tiles(walk, rows, kRows, kKeys);
  for (int i = 0; i < tiles.count; ++i) {
    const Rows tile_rows = tiles[i];
    __syncthreads();
    load_rows<T>(tile, dim + 1, p.v, walk, tile_rows, kKeys, b, kv, dim, 1.0f);
    __syncthreads();
    float dp[kEach], ds[kEach];
    dots(dp, dout, tile, dim);
    __syncthreads();
    load_rows<T>(tile, dim + 1, p.k, walk, tile_rows, kKeys, b, kv, dim, 1.0f);
    __syncthreads();
    dots(ds, q, tile, dim);
    const int key = tile_rows.begin + lane;
    DF_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const bool seen = may_see(walk, position[e] >= 0, rows, rows.begin + warp * kEach + e, tile_rows, key);
      ds[e] = seen ? expf(ds[e] - lse[e]) * (dp[e] - delta[e]) : 0.0f;
    }
    accumulate<kPer>(dq, ds, tile, dim);
  }
  DF_UNROLL
  for (int e = 0; e < kEach; ++e) {
    if (position[e] < 0) continue;
    T* to = row_at<T>(p.dq, b, h, position[e]);
    DF_UNROLL
    for (int j = 0; j < kPer; ++j)
      if (lane + 32 * j < dim) from_float(&to[lane + 32 * j], dq[e][j] * p.scale);
  }
}

template <typename T, int kPer>
__global__ void __launch_bounds__(kThreads, kBlocks) gradient_of_keys(const Params p, const Walk walk) {
  DF_DYNAMIC_SHARED(float, shared);
  DF_SHARED(float, deltas, kKeys);
  const int dim = static_cast<int>(p.head_dim), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const k = shared;
  float* const v = k + kRows * dim;
  float* const tile = v + kRows * dim;
  const Rows rows = block_rows(walk);
  const int64_t b = blockIdx.y / p.num_kv_heads, kv = blockIdx.y % p.num_kv_heads;
  load_rows<T>(k, dim, p.k, walk, rows, kRows, b, kv, dim, p.scale);
  load_rows<T>(v, dim, p.v, walk, rows, kRows, b, kv, dim, 1.0f);
  int position[kEach];
  float dk[kEach][kPer] = {}, dv[kEach][kPer] = {};
  DF_UNROLL
  for (int e = 0; e < kEach; ++e) position[e] = walk.position(rows.image, rows.begin + warp * kEach + e);
  const Tiles tiles = query_tiles(walk, rows, kRows, kKeys);
  const int64_t group = p.num_heads / p.num_kv_heads;
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
    for (int t = 0; t < tiles.count; ++t) {
      const Rows tile_rows = tiles[t];
      __syncthreads();
      load_rows<T>(tile, dim + 1, p.q, walk, tile_rows, kKeys, b, h, dim, 1.0f);
      for (int i = warp; i < kKeys; i += kWarps) {
        const float delta = delta_at<T>(p, b, h, walk.position(tile_rows.image, tile_rows.begin + i), dim);
        if (lane == 0) deltas[i] = delta;
      }
      __syncthreads();
      float weight[kEach], dp[kEach];
      dots(weight, k, tile, dim);
      const int query = walk.position(tile_rows.image, tile_rows.begin + lane);
      const float lse = query < 0 ? 0.0f : p.lse[(b * p.num_heads + h) * p.length + query];
      const float delta = deltas[lane];
      DF_UNROLL
      for (int e = 0; e < kEach; ++e) {
        const bool seen = position[e] >= 0 && may_see(walk, query >= 0, tile_rows, tile_rows.begin + lane, rows,
                                                      rows.begin + warp * kEach + e);
        weight[e] = seen ? expf(weight[e] - lse) : 0.0f;
      }
      __syncthreads();
      load_rows<T>(tile, dim + 1, p.dout, walk, tile_rows, kKeys, b, h, dim, 1.0f);
      __syncthreads();
      dots(dp, v, tile, dim);
      accumulate<kPer>(dv, weight, tile, dim);
      DF_UNROLL
      for (int e = 0; e < kEach; ++e) weight[e] = weight[e] == 0.0f ? 0.0f : weight[e] * (dp[e] - delta);
      __syncthreads();
      load_rows<T>(tile, dim + 1, p.q, walk, tile_rows, kKeys, b, h, dim, p.scale);
      __syncthreads();
      accumulate<kPer>(dk, weight, tile, dim);
    }
  DF_UNROLL
  for (int e = 0; e < kEach; ++e) {
    if (position[e] < 0) continue;
    T* to_k = row_at<T>(p.dk, b, kv, position[e]);
    T* to_v = row_at<T>(p.dv, b, kv, position[e]);
    DF_UNROLL
    for (int j = 0; j < kPer; ++j) {
      if (lane + 32 * j >= dim) continue;
      from_float(&to_k[lane + 32 * j], dk[e][j]);
      from_float(&to_v[lane + 32 * j], dv[e][j]);
    }
  }
}

// ---- launches

template <int kPer>
void run(const Params& p, const Walk& walk, void* stream, bool backward) {
  const auto blocks = static_cast<unsigned>(walk.blocks(kRows));
  const dim3 queries(blocks, static_cast<unsigned>(p.batch * p.num_heads));
  const dim3 keys(blocks, static_cast<unsigned>(p.batch * p.num_kv_heads));
  const std::size_t rows = kRows * p.head_dim * sizeof(float), tile = kKeys * (p.head_dim + 1) * sizeof(float);
  if (!backward) {
    DF_LAUNCH((attend<float, kPer>), queries, kThreads, rows + tile, stream, p, walk);
    return;
  }
  DF_LAUNCH((gradient_of_queries<float, kPer>), queries, kThreads, 2 * rows + tile, stream, p, walk);
  DF_LAUNCH((gradient_of_keys<float, kPer>), keys, kThreads, 2 * rows + tile, stream, p, walk);
}

void run_any(const Params& p, void* stream, bool backward) {
  if (p.batch == 0 || p.length == 0 || p.num_heads == 0) return;
  if (p.head_dim > kMaxDim) throw std::invalid_argument("q: the CUDA kernel takes at most 128 channels a head");
  if (p.batch * p.num_heads > 65535)
    throw std::invalid_argument("q: the CUDA kernel takes at most 65535 batch * heads");
  if (p.pattern.length() > (1 << 20))
    throw std::invalid_argument("pattern: the CUDA kernel takes at most 2^20 positions");
  const DeviceGuard guard(p.device.index);
  const Walk walk(p.pattern, p.length);
  if (p.dtype != DType::kFloat32) return backward ? backward_mma(p, walk, stream) : forward_mma(p, walk, stream);
  if (p.head_dim <= 32) return run<1>(p, walk, stream, backward);
  if (p.head_dim <= 64) return run<2>(p, walk, stream, backward);
  run<4>(p, walk, stream, backward);
}

}  // namespace

void forward_cuda(const Params& p, void* stream) { run_any(p, stream, false); }
void backward_cuda(const Params& p, void* stream) { run_any(p, stream, true); }

}  // namespace dalle_fast::sparse_attention
