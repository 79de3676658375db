// SPDX-License-Identifier: MIT
// Portable kernels in float32 arithmetic. A block owns 16 rows (queries, or keys for dk and dv), a warp four of them;
// it walks over the other side in tiles of 32, a lane a key. Image positions are walked in an order in which what a
// pattern sees is one range (column by column for the column pattern): an index mapping, no tensor is moved. Pairs
// inside the range are masked by index arithmetic. The backward pass has one kernel for dq and one for dk and dv,
// without atomics and without memory beyond the log-sum-exp.
#include <stdexcept>

#include "../core/device_math.cuh"
#include "sparse_attention.h"

namespace dalle_fast::sparse_attention {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kEach = 4;               // rows of a warp
constexpr int kRows = kWarps * kEach;  // rows of a block
constexpr int kKeys = 32;
constexpr int kMaxDim = 128;

// Positions in walking order: text 0 ... num_text - 1, then image slots.
struct Walk {
  Pattern pattern;
  int64_t num_text, num_image, slots;

  __host__ __device__ Walk(const Pattern& p, int64_t length) : pattern(p) {
    num_text = length < p.text_len ? length : p.text_len;
    num_image = length - num_text;
    slots = num_image && p.kind == PatternKind::kColumn ? p.height * p.width : num_image;
  }
  // raster index of an image slot; at least num_image where a prefix has none
  __device__ int64_t raster(int64_t slot) const {
    if (pattern.kind != PatternKind::kColumn) return slot;
    return slot % pattern.height * pattern.width + slot / pattern.height;
  }
  // the first slot that slots from `slot` on may look at
  __device__ int64_t first_key(int64_t slot) const {
    if (pattern.kind == PatternKind::kColumn) return slot / pattern.height * pattern.height;
    return first_image_key(pattern, slot);
  }
  // one behind the last slot that may look at slots up to `slot`
  __device__ int64_t end_query(int64_t slot) const {
    int64_t end = slots;
    if (pattern.kind == PatternKind::kColumn) end = (slot / pattern.height + 1) * pattern.height;
    if (pattern.kind == PatternKind::kRow) end = slot + pattern.extent;
    if (pattern.kind == PatternKind::kConv) end = slot + pattern.kernel / 2 * (pattern.width + 1) + 1;
    return end < slots ? end : slots;
  }
  // position in the stream of a text index or an image slot, or -1
  __device__ int64_t position(bool image, int64_t i) const {
    if (!image) return i < num_text ? i : -1;
    if (i >= slots) return -1;
    const int64_t r = raster(i);
    return r < num_image ? pattern.text_len + r : -1;
  }
};

// Rows of this block: `begin` counts text indices or image slots.
struct Rows {
  bool image;
  int64_t begin;
};
__host__ __device__ inline int64_t row_blocks(int64_t n) { return (n + kRows - 1) / kRows; }
__device__ __forceinline__ Rows rows_of(const Walk& walk, int64_t block) {
  const int64_t text = row_blocks(walk.num_text);
  return block < text ? Rows{false, block * kRows} : Rows{true, (block - text) * kRows};
}

template <typename T>
__device__ __forceinline__ T* row_at(const Tensor4& t, int64_t b, int64_t h, int64_t position) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h + position * t.stride_l;
}

// `count` rows into shared memory, `stride` floats apart; what does not exist is zero.
template <typename T>
__device__ __forceinline__ void load_rows(float* to, int stride, const Tensor4& t, const Walk& walk, bool image,
                                          int64_t begin, int count, int64_t b, int64_t h, int dim, float factor) {
  for (int r = threadIdx.x / 32; r < count; r += kWarps) {
    const int64_t position = walk.position(image, begin + r);
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

// f(image, begin) for every tile of keys that the queries [begin, begin + kRows) may see any of
template <typename F>
__device__ __forceinline__ void for_each_key_tile(const Walk& walk, const Rows& rows, F f) {
  const int64_t last = rows.begin + kRows;
  const int64_t text = rows.image || last > walk.num_text ? walk.num_text : last;
  for (int64_t k = 0; k < text; k += kKeys) f(false, k);
  if (!rows.image) return;
  const int64_t end = last < walk.slots ? last : walk.slots;
  for (int64_t k = walk.first_key(rows.begin); k < end; k += kKeys) f(true, k);
}

// f(image, begin) for every tile of queries that may see any of the keys [begin, begin + kRows)
template <typename F>
__device__ __forceinline__ void for_each_query_tile(const Walk& walk, const Rows& rows, F f) {
  if (!rows.image)
    for (int64_t q = rows.begin; q < walk.num_text; q += kKeys) f(false, q);
  const int64_t last = rows.begin + kRows < walk.slots ? rows.begin + kRows - 1 : walk.slots - 1;
  const int64_t end = rows.image ? walk.end_query(last) : walk.slots;
  for (int64_t q = rows.image ? rows.begin : 0; q < end; q += kKeys) f(true, q);
}

// ---- forward

template <typename T, int kPer>
__global__ void __launch_bounds__(kThreads) attend(const Params p) {
  DF_DYNAMIC_SHARED(float, shared);
  const int dim = static_cast<int>(p.head_dim), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const q = shared;
  float* const tile = shared + kRows * dim;
  const Walk walk(p.pattern, p.length);
  const Rows rows = rows_of(walk, blockIdx.x);
  const int64_t b = blockIdx.y / p.num_heads, h = blockIdx.y % p.num_heads;
  const int64_t kv = h / (p.num_heads / p.num_kv_heads);
  load_rows<T>(q, dim, p.q, walk, rows.image, rows.begin, kRows, b, h, dim, p.scale);
  int64_t position[kEach];
  float largest[kEach], sum[kEach] = {}, out[kEach][kPer] = {};
  DF_UNROLL
  for (int e = 0; e < kEach; ++e) {
    position[e] = walk.position(rows.image, rows.begin + warp * kEach + e);
    largest[e] = -INFINITY;
  }
  for_each_key_tile(walk, rows, [&](bool image, int64_t begin) {
    __syncthreads();
    load_rows<T>(tile, dim + 1, p.k, walk, image, begin, kKeys, b, kv, dim, 1.0f);
    __syncthreads();
    float s[kEach];
    dots(s, q, tile, dim);
    const int64_t key = walk.position(image, begin + lane);
    DF_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const bool seen = key >= 0 && position[e] >= 0 && may_attend(p.pattern, position[e], key);
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
    load_rows<T>(tile, dim + 1, p.v, walk, image, begin, kKeys, b, kv, dim, 1.0f);
    __syncthreads();
    accumulate<kPer>(out, s, tile, dim);
  });
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
__global__ void __launch_bounds__(kThreads) gradient_of_queries(const Params p) {
  DF_DYNAMIC_SHARED(float, shared);
  const int dim = static_cast<int>(p.head_dim), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const q = shared;
  float* const dout = q + kRows * dim;
  float* const tile = dout + kRows * dim;
  const Walk walk(p.pattern, p.length);
  const Rows rows = rows_of(walk, blockIdx.x);
  const int64_t b = blockIdx.y / p.num_heads, h = blockIdx.y % p.num_heads;
  const int64_t kv = h / (p.num_heads / p.num_kv_heads);
  load_rows<T>(q, dim, p.q, walk, rows.image, rows.begin, kRows, b, h, dim, p.scale);
  load_rows<T>(dout, dim, p.dout, walk, rows.image, rows.begin, kRows, b, h, dim, 1.0f);
  int64_t position[kEach];
  float lse[kEach], delta[kEach], dq[kEach][kPer] = {};
  for (int e = 0; e < kEach; ++e) {
    position[e] = walk.position(rows.image, rows.begin + warp * kEach + e);
    lse[e] = position[e] < 0 ? 0.0f : p.lse[(b * p.num_heads + h) * p.length + position[e]];
    delta[e] = delta_at<T>(p, b, h, position[e], dim);
  }
  for_each_key_tile(walk, rows, [&](bool image, int64_t begin) {
    __syncthreads();
    load_rows<T>(tile, dim + 1, p.v, walk, image, begin, kKeys, b, kv, dim, 1.0f);
    __syncthreads();
    float dp[kEach], ds[kEach];
    dots(dp, dout, tile, dim);
    __syncthreads();
    load_rows<T>(tile, dim + 1, p.k, walk, image, begin, kKeys, b, kv, dim, 1.0f);
    __syncthreads();
    dots(ds, q, tile, dim);
    const int64_t key = walk.position(image, begin + lane);
    DF_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const bool seen = key >= 0 && position[e] >= 0 && may_attend(p.pattern, position[e], key);
      ds[e] = seen ? expf(ds[e] - lse[e]) * (dp[e] - delta[e]) : 0.0f;
    }
    accumulate<kPer>(dq, ds, tile, dim);
  });
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
__global__ void __launch_bounds__(kThreads) gradient_of_keys(const Params p) {
  DF_DYNAMIC_SHARED(float, shared);
  DF_SHARED(float, deltas, kKeys);
  const int dim = static_cast<int>(p.head_dim), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const k = shared;
  float* const v = k + kRows * dim;
  float* const tile = v + kRows * dim;
  const Walk walk(p.pattern, p.length);
  const Rows rows = rows_of(walk, blockIdx.x);
  const int64_t b = blockIdx.y / p.num_kv_heads, kv = blockIdx.y % p.num_kv_heads;
  load_rows<T>(k, dim, p.k, walk, rows.image, rows.begin, kRows, b, kv, dim, p.scale);
  load_rows<T>(v, dim, p.v, walk, rows.image, rows.begin, kRows, b, kv, dim, 1.0f);
  int64_t position[kEach];
  float dk[kEach][kPer] = {}, dv[kEach][kPer] = {};
  DF_UNROLL
  for (int e = 0; e < kEach; ++e) position[e] = walk.position(rows.image, rows.begin + warp * kEach + e);
  const int64_t group = p.num_heads / p.num_kv_heads;
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
    for_each_query_tile(walk, rows, [&](bool image, int64_t begin) {
      __syncthreads();
      load_rows<T>(tile, dim + 1, p.q, walk, image, begin, kKeys, b, h, dim, 1.0f);
      for (int i = warp; i < kKeys; i += kWarps) {
        const float delta = delta_at<T>(p, b, h, walk.position(image, begin + i), dim);
        if (lane == 0) deltas[i] = delta;
      }
      __syncthreads();
      float weight[kEach], dp[kEach];
      dots(weight, k, tile, dim);
      const int64_t query = walk.position(image, begin + lane);
      const float lse = query < 0 ? 0.0f : p.lse[(b * p.num_heads + h) * p.length + query];
      const float delta = deltas[lane];
      DF_UNROLL
      for (int e = 0; e < kEach; ++e) {
        const bool seen = query >= 0 && position[e] >= 0 && may_attend(p.pattern, query, position[e]);
        weight[e] = seen ? expf(weight[e] - lse) : 0.0f;
      }
      __syncthreads();
      load_rows<T>(tile, dim + 1, p.dout, walk, image, begin, kKeys, b, h, dim, 1.0f);
      __syncthreads();
      dots(dp, v, tile, dim);
      accumulate<kPer>(dv, weight, tile, dim);
      DF_UNROLL
      for (int e = 0; e < kEach; ++e) weight[e] = weight[e] == 0.0f ? 0.0f : weight[e] * (dp[e] - delta);
      __syncthreads();
      load_rows<T>(tile, dim + 1, p.q, walk, image, begin, kKeys, b, h, dim, p.scale);
      __syncthreads();
      accumulate<kPer>(dk, weight, tile, dim);
    });
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

struct Grid {
  dim3 queries, keys;
};

Grid grid_of(const Params& p) {
  if (p.head_dim > kMaxDim) throw std::invalid_argument("q: the CUDA kernel takes at most 128 channels a head");
  if (p.batch * p.num_heads > 65535)
    throw std::invalid_argument("q: the CUDA kernel takes at most 65535 batch * heads");
  const Walk walk(p.pattern, p.length);
  const unsigned blocks = static_cast<unsigned>(row_blocks(walk.num_text) + row_blocks(walk.slots));
  return {dim3(blocks, static_cast<unsigned>(p.batch * p.num_heads)),
          dim3(blocks, static_cast<unsigned>(p.batch * p.num_kv_heads))};
}

template <typename T, int kPer>
void run_forward(const Params& p, void* stream) {
  const std::size_t bytes = (kRows * p.head_dim + kKeys * (p.head_dim + 1)) * sizeof(float);
  DF_LAUNCH((attend<T, kPer>), grid_of(p).queries, kThreads, bytes, stream, p);
}

template <typename T, int kPer>
void run_backward(const Params& p, void* stream) {
  const std::size_t bytes = (2 * kRows * p.head_dim + kKeys * (p.head_dim + 1)) * sizeof(float);
  DF_LAUNCH((gradient_of_queries<T, kPer>), grid_of(p).queries, kThreads, bytes, stream, p);
  DF_LAUNCH((gradient_of_keys<T, kPer>), grid_of(p).keys, kThreads, bytes, stream, p);
}

template <typename T>
void run(const Params& p, void* stream, bool backward) {
  if (p.head_dim <= 32) return backward ? run_backward<T, 1>(p, stream) : run_forward<T, 1>(p, stream);
  if (p.head_dim <= 64) return backward ? run_backward<T, 2>(p, stream) : run_forward<T, 2>(p, stream);
  return backward ? run_backward<T, 4>(p, stream) : run_forward<T, 4>(p, stream);
}

void run_any(const Params& p, void* stream, bool backward) {
  if (p.batch == 0 || p.length == 0 || p.num_heads == 0) return;
  const DeviceGuard guard(p.device.index);
  with_element_type(p.dtype, [&](auto x) { run<decltype(x)>(p, stream, backward); });
}

}  // namespace

void forward_cuda(const Params& p, void* stream) { run_any(p, stream, false); }
void backward_cuda(const Params& p, void* stream) { run_any(p, stream, true); }

}  // namespace dalle_fast::sparse_attention
