// SPDX-License-Identifier: MIT
// bfloat16 and float16 on tensor cores (sm_80 and newer). A block owns 64 rows (queries, or keys for dk and dv), a warp
// 16 of them; tiles of the other side come through two stages of asynchronous copies, and scores never leave registers.
// Interior tiles run unmasked, edge tiles compare slots with the range each row sees. The backward pass has one kernel
// for dq and one for dk and dv, without atomics and without memory beyond the log-sum-exp.
#include "../core/mma.cuh"
#include "walk.cuh"

namespace dalle_fast::sparse_attention {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;  // of a block
constexpr int kBlocks = 2;          // at least, on a multiprocessor: 255 registers a thread
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Rows [begin, begin + kCount) of a head, kDim wide; what does not exist is zero. `vectors`: rows begin at multiples of
// 16 bytes and are made of such.
template <int kDim, int kCount, typename T>
__device__ __forceinline__ void load_tile(T* tile, const Tensor4& t, const Walk& walk, const Rows& rows, int64_t b,
                                          int64_t h, int dim, bool vectors) {
  constexpr int kChunks = kDim / 8;
  const T* base = head_of<T>(t, b, h);
  for (int i = static_cast<int>(threadIdx.x); i < kCount * kChunks; i += kThreads) {
    const int r = i / kChunks, c = i % kChunks * 8;
    const int position = walk.position(rows.image, rows.begin + r);
    const T* from = base + position * t.stride_l + c;
    T* to = tile + r * kTileStride<kDim> + c;
    if (vectors) {
      const bool there = position >= 0 && c < dim;
      DF_COPY_ASYNC_16(to, there ? from : base, there);
    } else {
      for (int j = 0; j < 8; ++j) to[j] = position >= 0 && c + j < dim ? from[j] : T{0};
    }
  }
}

// Writes c * factor (one factor for rows g, one for rows g + 8) to the 16 rows from `rows`, by way of `tile`, which
// belongs to this warp.
template <int kDim, typename T>
__device__ __forceinline__ void store_rows(const Tensor4& t, T* tile, const float (*c)[4], const float* factor,
                                           const Walk& walk, const Rows& rows, int64_t b, int64_t h, int dim,
                                           bool vectors) {
  constexpr int kChunks = kDim / 8;
  const int lane = threadIdx.x % 32, g = lane / 4, column = lane % 4 * 2;
  __syncwarp();
  DF_UNROLL
  for (int n = 0; n < kDim / 8; ++n)
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = pack2<T>(c[n][2 * i] * factor[i], c[n][2 * i + 1] * factor[i]);
      *reinterpret_cast<uint32_t*>(tile + (g + 8 * i) * kTileStride<kDim> + n * 8 + column) = pair;
    }
  __syncwarp();
  T* base = head_of<T>(t, b, h);
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int r = i / kChunks, at = i % kChunks * 8;
    const int position = walk.position(rows.image, rows.begin + r);
    if (position < 0) continue;
    T* to = base + position * t.stride_l + at;
    const T* from = tile + r * kTileStride<kDim> + at;
    if (vectors) {
      if (at < dim) *reinterpret_cast<Vector16*>(to) = *reinterpret_cast<const Vector16*>(from);
    } else {
      for (int j = 0; j < 8 && at + j < dim; ++j) to[j] = from[j];
    }
  }
}

// Keys [low, high] of a tile that a query sees, conv's holes aside.
struct Range {
  int low, high;
};

// The two queries of this thread in a block of queries.
struct QueryRows {
  Range text[2], image[2];
  int slot[2], position[2];

  __device__ __forceinline__ QueryRows(const Walk& walk, const Rows& rows) {
    DF_UNROLL
    for (int i = 0; i < 2; ++i) {
      slot[i] = rows.begin + static_cast<int>(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) + 8 * i;
      position[i] = walk.position(rows.image, slot[i]);
      text[i] = image[i] = {1, 0};
      if (position[i] < 0) continue;
      text[i] = {0, rows.image ? walk.num_text - 1 : slot[i]};
      if (rows.image) image[i] = {walk.first_key(slot[i]), slot[i]};
    }
  }
};

// Whether every query of the block sees every key of the tile.
__device__ __forceinline__ bool is_interior(const Walk& walk, const Rows& queries, const Rows& keys, int num_queries,
                                            int num_keys) {
  const int last_key = keys.begin + num_keys - 1;
  if (!keys.image) return last_key < walk.num_text && (queries.image || last_key <= queries.begin);
  if (walk.kind == PatternKind::kConv || last_key > queries.begin) return false;
  const int last_query = queries.begin + num_queries - 1;
  return walk.first_key(last_query < walk.slots ? last_query : walk.slots - 1) <= keys.begin;
}

// f(score, seen) for the scores of this thread: row i of two, key at tile.begin + column
template <int kKeys, typename F>
__device__ __forceinline__ void for_each_score(const Walk& walk, const Rows& rows, const Rows& tile,
                                               const QueryRows& mine, F f) {
  const int first = tile.begin + static_cast<int>(threadIdx.x % 4) * 2;
  if (is_interior(walk, rows, tile, kRows, kKeys)) {
    DF_UNROLL
    for (int n = 0; n < kKeys / 8; ++n)
      for (int i = 0; i < 4; ++i) f(n, i, true);
    return;
  }
  const bool holes = tile.image && walk.kind == PatternKind::kConv;
  DF_UNROLL
  for (int n = 0; n < kKeys / 8; ++n)
    for (int i = 0; i < 4; ++i) {
      const int key = first + n * 8 + i % 2;
      const Range range = tile.image ? mine.image[i / 2] : mine.text[i / 2];
      bool seen = range.low <= key && key <= range.high;
      if (holes) seen = seen && walk.in_window(mine.slot[i / 2], key);
      f(n, i, seen);
    }
}

// combined with the three other lanes of a row
template <typename F>
__device__ __forceinline__ float across_row(float x, F combine) {
  x = combine(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return combine(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

struct Place {
  int64_t b, h, kv;
  Rows rows;
};
// Blocks of a head follow each other: they share keys in the second-level cache.
__device__ __forceinline__ Place query_block(const Params& p, const Walk& walk) {
  const int blocks = walk.blocks(kRows), head = static_cast<int>(blockIdx.x) / blocks;
  const int64_t h = head % p.num_heads;
  return {head / p.num_heads, h, h / (p.num_heads / p.num_kv_heads),
          rows_of(walk, static_cast<int>(blockIdx.x) % blocks, kRows)};
}
// The text's keys, which all queries see, come first: their blocks take longest.
__device__ __forceinline__ Place key_block(const Params& p, const Walk& walk) {
  const int text = walk.text_blocks(kRows), image = walk.blocks(kRows) - text;
  const int all_text = text * static_cast<int>(p.batch * p.num_kv_heads), x = static_cast<int>(blockIdx.x);
  const int head = x < all_text ? x / text : (x - all_text) / image;
  const int block = x < all_text ? x % text : text + (x - all_text) % image;
  return {head / p.num_kv_heads, 0, head % p.num_kv_heads, rows_of(walk, block, kRows)};
}

// ---- forward

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks) attend_mma(const Params p, const Walk walk, const bool vectors) {
  constexpr int kKeys = 64, kTile = kKeys * kTileStride<kDim>;
  DF_DYNAMIC_SHARED(T, shared);
  T* const q = shared;
  T* const stages = shared + kRows * kTileStride<kDim>;  // keys, values, keys, values
  const int dim = static_cast<int>(p.head_dim), warp = static_cast<int>(threadIdx.x) / 32;
  const Place at = query_block(p, walk);
  const QueryRows mine(walk, at.rows);
  const Tiles tiles = key_tiles(walk, at.rows, kRows, kKeys);
  const auto load = [&](int i) {
    T* const k = stages + i % 2 * 2 * kTile;
    load_tile<kDim, kKeys>(k, p.k, walk, tiles[i], at.b, at.kv, dim, vectors);
    load_tile<kDim, kKeys>(k + kTile, p.v, walk, tiles[i], at.b, at.kv, dim, vectors);
    copy_async_commit();
  };
  load_tile<kDim, kRows>(q, p.q, walk, at.rows, at.b, at.h, dim, vectors);
  load(0);
  const float factor = p.scale * kLog2e;
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, out[kDim / 8][4] = {};
  for (int i = 0; i < tiles.count; ++i) {
    copy_async_wait<0>();
    __syncthreads();  // tile i is here, and nobody reads tile i - 1 any more
    if (i + 1 < tiles.count) load(i + 1);
    const T* k = stages + i % 2 * 2 * kTile;
    float s[kKeys / 8][4];
    multiply_transposed<kDim, kKeys, T>(s, [&](uint32_t* a, int c) { load_a<kDim>(a, q, warp * 16, c); }, k);
    float top[2] = {-INFINITY, -INFINITY};
    for_each_score<kKeys>(walk, at.rows, tiles[i], mine, [&](int n, int j, bool seen) {
      s[n][j] = seen ? s[n][j] * factor : -INFINITY;
      top[j / 2] = s[n][j] > top[j / 2] ? s[n][j] : top[j / 2];
    });
    float shift[2];
    DF_UNROLL
    for (int j = 0; j < 2; ++j) {
      top[j] = across_row(top[j], [](float a, float b) { return a > b ? a : b; });
      const float now = top[j] > largest[j] ? top[j] : largest[j];
      shift[j] = now == -INFINITY ? 0.0f : now;  // nothing seen so far
      const float keep = fast_exp2(largest[j] - shift[j]);
      largest[j] = now;
      sum[j] *= keep;
      DF_UNROLL
      for (int n = 0; n < kDim / 8; ++n) {
        out[n][2 * j] *= keep;
        out[n][2 * j + 1] *= keep;
      }
    }
    DF_UNROLL
    for (int n = 0; n < kKeys / 8; ++n)
      for (int j = 0; j < 4; ++j) {
        s[n][j] = fast_exp2(s[n][j] - shift[j / 2]);
        sum[j / 2] += s[n][j];
      }
    multiply_add<kKeys, kDim, T>(out, s, k + kTile);
  }
  float inverse[2];
  DF_UNROLL
  for (int j = 0; j < 2; ++j) {
    sum[j] = across_row(sum[j], [](float a, float b) { return a + b; });
    inverse[j] = 1.0f / sum[j];
    if (mine.position[j] >= 0 && threadIdx.x % 4 == 0)
      p.lse[(at.b * p.num_heads + at.h) * p.length + mine.position[j]] = (largest[j] + log2f(sum[j])) * kLn2;
  }
  store_rows<kDim>(p.out, q + warp * 16 * kTileStride<kDim>, out, inverse, walk,
                   {at.rows.image, at.rows.begin + warp * 16}, at.b, at.h, dim, vectors);
}

// ---- backward

// delta[r] = out[r] . dout[r] for kCount rows, several neighbouring threads a row
template <int kDim, int kCount, typename T>
__device__ __forceinline__ void row_products(float* delta, const T* out, const T* dout) {
  constexpr int kShare = kThreads / kCount, kPart = kDim / kShare;
  const int r = static_cast<int>(threadIdx.x) / kShare, first = static_cast<int>(threadIdx.x) % kShare * kPart;
  float sum = 0.0f;
  for (int c = first; c < first + kPart; ++c)
    sum += to_float(out[r * kTileStride<kDim> + c]) * to_float(dout[r * kTileStride<kDim> + c]);
  DF_UNROLL
  for (int bits = kShare / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (threadIdx.x % kShare == 0) delta[r] = sum;
}

// Rows of the tiles that come through the stages of the backward kernels: registers hold fewer for wide heads.
template <int kDim>
inline constexpr int kBackwardTile = kDim == 128 ? 32 : 64;

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_of_queries_mma(const Params p, const Walk walk, const bool vectors) {
  constexpr int kKeys = kBackwardTile<kDim>, kTile = kKeys * kTileStride<kDim>, kBlock = kRows * kTileStride<kDim>;
  DF_DYNAMIC_SHARED(T, shared);
  DF_SHARED(float, deltas, kRows);
  T* const q = shared;
  T* const dout = shared + kBlock;
  T* const stages = shared + 2 * kBlock;  // keys, values, keys, values
  const int dim = static_cast<int>(p.head_dim), warp = static_cast<int>(threadIdx.x) / 32;
  const Place at = query_block(p, walk);
  const QueryRows mine(walk, at.rows);
  const Tiles tiles = key_tiles(walk, at.rows, kRows, kKeys);
  const auto load = [&](int i) {
    T* const k = stages + i % 2 * 2 * kTile;
    load_tile<kDim, kKeys>(k, p.k, walk, tiles[i], at.b, at.kv, dim, vectors);
    load_tile<kDim, kKeys>(k + kTile, p.v, walk, tiles[i], at.b, at.kv, dim, vectors);
    copy_async_commit();
  };
  load_tile<kDim, kRows>(q, p.q, walk, at.rows, at.b, at.h, dim, vectors);
  load_tile<kDim, kRows>(dout, p.dout, walk, at.rows, at.b, at.h, dim, vectors);
  T* const out = stages + 2 * kTile;  // the second stage is free until the loop
  load_tile<kDim, kRows>(out, p.out, walk, at.rows, at.b, at.h, dim, vectors);
  load(0);
  copy_async_wait<0>();
  __syncthreads();
  row_products<kDim, kRows>(deltas, out, dout);
  const float factor = p.scale * kLog2e;
  float lse[2], dq[kDim / 8][4] = {};
  DF_UNROLL
  for (int j = 0; j < 2; ++j)
    lse[j] =
        mine.position[j] < 0 ? INFINITY : p.lse[(at.b * p.num_heads + at.h) * p.length + mine.position[j]] * kLog2e;
  for (int i = 0; i < tiles.count; ++i) {
    copy_async_wait<0>();
    __syncthreads();  // tile i is here, and nobody reads tile i - 1 (or `out`) any more
    if (i + 1 < tiles.count) load(i + 1);
    const T* k = stages + i % 2 * 2 * kTile;
    float s[kKeys / 8][4], dp[kKeys / 8][4];
    multiply_transposed<kDim, kKeys, T>(s, [&](uint32_t* a, int c) { load_a<kDim>(a, q, warp * 16, c); }, k);
    multiply_transposed<kDim, kKeys, T>(
        dp, [&](uint32_t* a, int c) { load_a<kDim>(a, dout, warp * 16, c); }, k + kTile);
    const float* delta = deltas + warp * 16 + threadIdx.x % 32 / 4;
    for_each_score<kKeys>(walk, at.rows, tiles[i], mine, [&](int n, int j, bool seen) {
      s[n][j] = seen ? fast_exp2(s[n][j] * factor - lse[j / 2]) * (dp[n][j] - delta[j / 2 * 8]) : 0.0f;
    });
    multiply_add<kKeys, kDim, T>(dq, s, k);
  }
  const float scale[2] = {p.scale, p.scale};
  store_rows<kDim>(p.dq, q + warp * 16 * kTileStride<kDim>, dq, scale, walk, {at.rows.image, at.rows.begin + warp * 16},
                   at.b, at.h, dim, vectors);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_of_keys_mma(const Params p, const Walk walk, const bool vectors) {
  constexpr int kQueries = kBackwardTile<kDim>;
  constexpr int kTile = kQueries * kTileStride<kDim>, kBlock = kRows * kTileStride<kDim>;
  DF_DYNAMIC_SHARED(T, shared);
  DF_SHARED(float, lse, kQueries);
  DF_SHARED(float, deltas, kQueries);
  T* const k = shared;
  T* const v = shared + kBlock;
  T* const out = shared + 2 * kBlock;
  T* const stages = out + kTile;  // queries, dout, queries, dout
  const int dim = static_cast<int>(p.head_dim), warp = static_cast<int>(threadIdx.x) / 32;
  const Place at = key_block(p, walk);
  const Tiles tiles = query_tiles(walk, at.rows, kRows, kQueries);
  const int group = static_cast<int>(p.num_heads / p.num_kv_heads), steps = tiles.count * group;
  const auto load = [&](int i) {
    T* const q = stages + i % 2 * 2 * kTile;
    const int64_t h = at.kv * group + i / tiles.count;
    const Rows tile = tiles[i % tiles.count];
    load_tile<kDim, kQueries>(q, p.q, walk, tile, at.b, h, dim, vectors);
    load_tile<kDim, kQueries>(q + kTile, p.dout, walk, tile, at.b, h, dim, vectors);
    load_tile<kDim, kQueries>(out, p.out, walk, tile, at.b, h, dim, vectors);
    copy_async_commit();
  };
  load_tile<kDim, kRows>(k, p.k, walk, at.rows, at.b, at.kv, dim, vectors);
  load_tile<kDim, kRows>(v, p.v, walk, at.rows, at.b, at.kv, dim, vectors);
  load(0);
  const int lane = threadIdx.x % 32;
  int slot[2], end[2];
  DF_UNROLL
  for (int j = 0; j < 2; ++j) {
    slot[j] = at.rows.begin + warp * 16 + lane / 4 + 8 * j;
    end[j] = at.rows.image && slot[j] < walk.slots ? walk.end_query(slot[j]) : walk.num_text;
  }
  const float factor = p.scale * kLog2e;
  float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
  for (int i = 0; i < steps; ++i) {
    const Rows tile = tiles[i % tiles.count];
    const T* q = stages + i % 2 * 2 * kTile;
    const T* dout = q + kTile;
    copy_async_wait<0>();
    __syncthreads();  // tile i is here, and nobody reads tile i - 1 any more
    row_products<kDim, kQueries>(deltas, out, dout);
    if (threadIdx.x < kQueries) {
      const int position = walk.position(tile.image, tile.begin + static_cast<int>(threadIdx.x));
      const int64_t h = at.kv * group + i / tiles.count;
      // an absent query has weight exp2(0 - Inf) = 0
      lse[threadIdx.x] = position < 0 ? INFINITY : p.lse[(at.b * p.num_heads + h) * p.length + position] * kLog2e;
    }
    __syncthreads();
    if (i + 1 < steps) load(i + 1);
    float weight[kQueries / 8][4], dp[kQueries / 8][4];
    multiply_transposed<kDim, kQueries, T>(weight, [&](uint32_t* a, int c) { load_a<kDim>(a, k, warp * 16, c); }, q);
    const bool interior = is_interior(walk, tile, at.rows, kQueries, kRows) || (tile.image && !at.rows.image);
    const bool holes = tile.image && at.rows.image && walk.kind == PatternKind::kConv;
    DF_UNROLL
    for (int n = 0; n < kQueries / 8; ++n)
      for (int j = 0; j < 4; ++j) {
        const int column = n * 8 + lane % 4 * 2 + j % 2, query = tile.begin + column;
        bool seen = interior || (slot[j / 2] <= query && query < end[j / 2]);
        if (holes) seen = seen && walk.in_window(query, slot[j / 2]);
        weight[n][j] = seen ? fast_exp2(weight[n][j] * factor - lse[column]) : 0.0f;
      }
    multiply_add<kQueries, kDim, T>(dv, weight, dout);
    multiply_transposed<kDim, kQueries, T>(dp, [&](uint32_t* a, int c) { load_a<kDim>(a, v, warp * 16, c); }, dout);
    DF_UNROLL
    for (int n = 0; n < kQueries / 8; ++n)
      for (int j = 0; j < 4; ++j) {
        const int column = n * 8 + lane % 4 * 2 + j % 2;
        weight[n][j] = weight[n][j] == 0.0f ? 0.0f : weight[n][j] * (dp[n][j] - deltas[column]);
      }
    multiply_add<kQueries, kDim, T>(dk, weight, q);
  }
  const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
  const Rows first{at.rows.image, at.rows.begin + warp * 16};
  store_rows<kDim>(p.dk, k + warp * 16 * kTileStride<kDim>, dk, scale, walk, first, at.b, at.kv, dim, vectors);
  store_rows<kDim>(p.dv, v + warp * 16 * kTileStride<kDim>, dv, one, walk, first, at.b, at.kv, dim, vectors);
}

// ---- launches

bool is_vector_tensor(const Tensor4& t) {
  if (!t.data) return true;
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride_b % 8 == 0 && t.stride_h % 8 == 0 &&
         t.stride_l % 8 == 0;
}
bool has_vectors(const Params& p) {
  for (const Tensor4* t : {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv})
    if (!is_vector_tensor(*t)) return false;
  return p.head_dim % 8 == 0;
}

template <typename T, int kDim>
void run(const Params& p, const Walk& walk, void* stream, bool backward) {
  const int row = kTileStride<kDim> * static_cast<int>(sizeof(T));
  const auto blocks = static_cast<unsigned>(p.batch * walk.blocks(kRows));
  const unsigned query_blocks = blocks * static_cast<unsigned>(p.num_heads);
  const bool vectors = has_vectors(p);
  const auto launch = [&](auto kernel, unsigned grid, int rows) {
    const std::size_t bytes = static_cast<std::size_t>(rows) * row;
    allow_dynamic_shared(kernel, bytes);
    DF_LAUNCH(kernel, grid, kThreads, bytes, stream, p, walk, vectors);
  };
  if (!backward) return launch(attend_mma<T, kDim>, query_blocks, kRows + 4 * 64);
  launch(gradient_of_queries_mma<T, kDim>, query_blocks, 2 * kRows + 2 * kRows + 2 * kBackwardTile<kDim>);
  launch(gradient_of_keys_mma<T, kDim>, blocks * static_cast<unsigned>(p.num_kv_heads),
         2 * kRows + 5 * kBackwardTile<kDim>);
}

template <typename T>
void run_any(const Params& p, const Walk& walk, void* stream, bool backward) {
  if (p.head_dim <= 32) return run<T, 32>(p, walk, stream, backward);
  if (p.head_dim <= 64) return run<T, 64>(p, walk, stream, backward);
  run<T, 128>(p, walk, stream, backward);
}

}  // namespace

void forward_mma(const Params& p, const Walk& walk, void* stream) {
  p.dtype == DType::kBFloat16 ? run_any<bf16_t>(p, walk, stream, false) : run_any<fp16_t>(p, walk, stream, false);
}
void backward_mma(const Params& p, const Walk& walk, void* stream) {
  p.dtype == DType::kBFloat16 ? run_any<bf16_t>(p, walk, stream, true) : run_any<fp16_t>(p, walk, stream, true);
}

}  // namespace dalle_fast::sparse_attention
