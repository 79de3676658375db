// SPDX-License-Identifier: MIT
// Backward on tensor cores, without atomics. With p = exp(score - lse) and delta = out . dout of a query,
//   dv = p^T dout,  ds = p * (dout v^T - delta),  dq = scale ds k,  dk = scale ds^T q.
// The first kernel owns queries: it gives dq, and leaves lse and delta of each query to the second one, which owns keys
// and gives dk and dv. Both compute p and dout v^T anew: seven products in all, where sharing them needs atomics.
// Floor: eight tensors moved once, 8 x 2 L D bytes a head. A warp's 32 x 16 pairs of width 64 take 48 and 64 products
// of 16 x 8 x 16 in the two kernels, 12 and 24 loads of fragments and 16 exponentials each: tensor cores bound both.
#include "rows.cuh"

namespace dalle_fast::sparse_attention {
namespace {

// ---- dq

template <typename T, int kDim>
struct QueryWarp {
  static constexpr int kHalves = kQueryHalves<T, kDim>, kColumns = kWideColumns<T, kDim>;
  static constexpr bool kOnlyPieces = kPiecesOnly<T>;
  LeftRows<T, kDim, kHoldsQueries<T, kDim>> q[kHalves], dout[kHalves];
  Terms terms[kHalves][2];
  float dq[kHalves][kDim / 8][4] = {};
  float factor;

  template <int kCount, int kWide, typename Mask>
  __device__ __forceinline__ void step(int half, int column, const KeyStage<T>& stage, const Mask& mask) {
    constexpr int kBlocks = kWide / 8;
    float s[kCount][kBlocks][4] = {}, dp[kCount][kBlocks][4];
    DF_UNROLL
    for (int i = 0; i < kCount * kBlocks * 4; ++i)
      dp[i / 4 / kBlocks][i / 4 % kBlocks][i % 4] = -terms[half + i / 4 / kBlocks][i % 4 / 2].delta;
    multiply_transposed<kDim>(s, [&](uint32_t* a, int h, int k) { q[half + h].fragment(a, k); }, stage.k, column);
    multiply_transposed<kDim>(dp, [&](uint32_t* a, int h, int k) { dout[half + h].fragment(a, k); }, stage.v, column);
    DF_UNROLL
    for (int i = 0; i < kCount * kBlocks * 4; ++i) {
      const int h = i / 4 / kBlocks, n = i / 4 % kBlocks, j = i % 4;
      const float ds = fast_exp2(s[h][n][j] * factor - terms[half + h][j / 2].lse) * dp[h][n][j];
      s[h][n][j] = mask(n, j) ? ds : 0.0f;
    }
    multiply_add<kDim>(dq + half, s, stage.k, column);
  }
};

// Terms of the block's queries, to device memory and behind the rows of `q`; `dout`: what load_rows has put there, each
// thread its own elements.
template <int kDim, int kRows, typename T>
__device__ __forceinline__ void take_terms(T* q, const Params& p, const Walk& walk, const Place& at, int dim,
                                           bool vectors, const T* dout) {
  constexpr int kPerRow = kDim / kChunk<T>;
  const int c = static_cast<int>(threadIdx.x) % kPerRow * kChunk<T>;
  const T* const out = head_of<T>(p.out, at.b, at.h);
  for (int r = static_cast<int>(threadIdx.x) / kPerRow; r < kRows; r += kThreads / kPerRow) {
    const int position = walk.position(at.rows.image, at.rows.begin + r);
    Terms mine{0.0f, 0.0f};
    if (position >= 0 && c < dim) {
      alignas(16) T part[kChunk<T>] = {};
      const T* const from = out + position * p.out.stride_l + c;
      if (vectors) {
        const Vector16 whole = *reinterpret_cast<const Vector16*>(from);
        memcpy(part, &whole, sizeof part);
      } else {
        DF_UNROLL
        for (int j = 0; j < kChunk<T>; ++j)
          if (c + j < dim) part[j] = from[j];
      }
      DF_UNROLL
      for (int j = 0; j < kChunk<T>; ++j)
        mine.delta += to_float(part[j]) * to_float(dout[r * kTileStride<kDim, T> + c + j]);
    }
    DF_UNROLL
    for (int bits = 1; bits < kPerRow; bits *= 2) mine.delta += __shfl_xor_sync(0xffffffffu, mine.delta, bits);
    if (c > 0) continue;
    if (position >= 0) {
      const int64_t row = query_row(p, at.b, at.h, position);
      mine.lse = p.lse[row] * kLog2e;
      static_cast<Terms*>(p.terms)[row] = mine;
    }
    behind_row<Terms, kDim>(q, r) = mine;
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, (sizeof(T) == 4 && kDim == 64 ? 3 : 2))
    gradient_of_queries(const Params p, const Walk walk, const bool vectors) {
  constexpr int kRows = kQueryRows<T, kDim>, kKeys = kTileRows<T, kDim>;
  constexpr int kTile = kKeys * kTileStride<kDim, T>, kBlock = kRows * kTileStride<kDim, T>;
  DF_DYNAMIC_SHARED(T, shared);
  T* const q = shared;
  T* const dout = shared + kBlock;
  T* const stages = shared + 2 * kBlock;  // keys, values, keys, values
  const int dim = static_cast<int>(p.head_dim), lane = threadIdx.x % 32;
  const Place at = query_block(p, walk, kRows);
  const int own = static_cast<int>(threadIdx.x) / 32 * 16 * kQueryHalves<T, kDim>;  // this warp's rows of the block
  const Tiles tiles = key_tiles(walk, at.rows, kRows, kKeys);
  const auto load = [&](int i) {
    T* const k = stages + i % 2 * 2 * kTile;
    load_rows<kDim, kKeys>(walk, tiles[i], dim, vectors, Copy<T>(k, p.k, at.b, at.kv),
                           Copy<T>(k + kTile, p.v, at.b, at.kv));
    copy_async_commit();
  };
  load_rows<kDim, kRows>(walk, at.rows, dim, vectors, Copy<T>(q, p.q, at.b, at.h), Copy<T>(dout, p.dout, at.b, at.h));
  copy_async_commit();
  load(0);
  copy_async_wait<1>();
  take_terms<kDim, kRows>(q, p, walk, at, dim, vectors, dout);
  __syncthreads();
  QueryWarp<T, kDim> warp;
  warp.factor = p.scale * kLog2e;
  DF_UNROLL
  for (int h = 0; h < kQueryHalves<T, kDim>; ++h) {
    warp.q[h].take(q, own + 16 * h);
    warp.dout[h].take(dout, own + 16 * h);
    DF_UNROLL
    for (int j = 0; j < 2; ++j) warp.terms[h][j] = behind_row<Terms, kDim>(q, own + 16 * h + lane / 4 + 8 * j);
  }
  for (int i = 0; i < tiles.count; ++i) {
    copy_async_wait<0>();
    __syncthreads();  // tile i is here, and nobody reads tile i - 1 any more
    if (i + 1 < tiles.count) load(i + 1);
    const T* const k = stages + i % 2 * 2 * kTile;
    meet<kKeys>(warp, KeyStage<T>{k, k + kTile}, Sight<true>{walk, at.rows.image, tiles[i].image}, at.rows.begin + own,
                tiles[i]);
  }
  const float scale[2] = {p.scale, p.scale};
  DF_UNROLL
  for (int h = 0; h < kQueryHalves<T, kDim>; ++h) {
    const Rows rows{at.rows.image, at.rows.begin + own + 16 * h};
    store_rows<kDim>(p.dq, q + (own + 16 * h) * kTileStride<kDim, T>, warp.dq[h], scale, walk, rows, at.b, at.h, dim,
                     vectors);
  }
}

// ---- dk and dv

template <typename T, int kDim>
inline constexpr int kKeyHalves = sizeof(T) == 2 && kDim <= 64 ? 2 : 1;
template <typename T, int kDim>
inline constexpr int kKeyRows = kWarps * 16 * kKeyHalves<T, kDim>;
// whose fragments stay in registers
template <typename T, int kDim>
inline constexpr bool kHoldsKeys = kDim * sizeof(T) <= 128;
template <typename T, int kDim>
inline constexpr bool kHoldsValues = kDim * sizeof(T) <= 64;

struct KeyBlock {
  unsigned b, kv;
  Rows rows;
};
// Blocks of keys in one row: the text's of all heads come first, as all queries see them and they take longest.
struct KeyOrder {
  Divisor by_text, by_image, by_heads;
  int text, image, heads, all_text;

  KeyOrder(const Params& p, const Walk& walk, int rows)
      : text(walk.text_blocks(rows)), image(walk.blocks(rows) - text), heads(static_cast<int>(p.num_kv_heads)) {
    all_text = text * heads * static_cast<int>(p.batch);
    by_text = Divisor(static_cast<uint32_t>(text > 0 ? text : 1));
    by_image = Divisor(static_cast<uint32_t>(image > 0 ? image : 1));
    by_heads = Divisor(static_cast<uint32_t>(heads));
  }
  __device__ __forceinline__ KeyBlock place(int block, int num_rows) const {
    const bool is_image = block >= all_text;
    if (is_image) block -= all_text;
    const int row = is_image ? by_image.divide(block) : by_text.divide(block), b = by_heads.divide(row);
    return {static_cast<unsigned>(b),
            static_cast<unsigned>(row - b * heads),
            {is_image, (block - row * (is_image ? image : text)) * num_rows}};
  }
};

// Two queries' terms: the columns of a thread in a block of a result
struct alignas(16) TermsPair {
  Terms of[2];
};

// Tiles that the keys meet; behind every other row of q the terms of two
template <typename T>
struct QueryStage {
  const T *q, *dout;
};

template <typename T, int kDim>
struct KeyWarp {
  static constexpr int kHalves = kKeyHalves<T, kDim>, kColumns = kWideColumns<T, kDim>;
  static constexpr bool kOnlyPieces = kPiecesOnly<T>;
  LeftRows<T, kDim, kHoldsKeys<T, kDim>> k[kHalves];
  LeftRows<T, kDim, kHoldsValues<T, kDim>> v[kHalves];
  float dk[kHalves][kDim / 8][4] = {}, dv[kHalves][kDim / 8][4] = {};
  float factor;

  template <int kCount, int kWide, typename Mask>
  __device__ __forceinline__ void step(int half, int column, const QueryStage<T>& stage, const Mask& mask) {
    constexpr int kBlocks = kWide / 8;
    float s[kCount][kBlocks][4] = {}, dp[kCount][kBlocks][4];
    multiply_transposed<kDim>(s, [&](uint32_t* a, int h, int c) { k[half + h].fragment(a, c); }, stage.q, column);
    DF_UNROLL
    for (int n = 0; n < kBlocks; ++n) {
      const int first = column + n * 8 + static_cast<int>(threadIdx.x) % 4 * 2;
      const TermsPair pair = behind_row<TermsPair, kDim>(stage.q, first);
      DF_UNROLL
      for (int i = 0; i < kCount * 4; ++i) {
        const int h = i / 4, j = i % 4;
        const float weight = fast_exp2(s[h][n][j] * factor - pair.of[j % 2].lse);
        s[h][n][j] = mask(n, j) ? weight : 0.0f;
        dp[h][n][j] = -pair.of[j % 2].delta;
      }
    }
    multiply_add<kDim>(dv + half, s, stage.dout, column);
    multiply_transposed<kDim>(dp, [&](uint32_t* a, int h, int c) { v[half + h].fragment(a, c); }, stage.dout, column);
    DF_UNROLL
    for (int i = 0; i < kCount * kBlocks * 4; ++i)
      s[i / 4 / kBlocks][i / 4 % kBlocks][i % 4] *= dp[i / 4 / kBlocks][i / 4 % kBlocks][i % 4];
    multiply_add<kDim>(dk + half, s, stage.q, column);
  }
};

// A query that does not exist is zero, its terms too: it adds exp2(0) * 0 to dv and (0 - 0) * 0 to dk.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_of_keys(const Params p, const Walk walk, const bool vectors, const KeyOrder order) {
  constexpr int kRows = kKeyRows<T, kDim>, kQueries = kTileRows<T, kDim>;
  constexpr int kTile = kQueries * kTileStride<kDim, T>, kBlock = kRows * kTileStride<kDim, T>;
  static_assert(kThreads <= 2 * kRows, "a row for each thread");
  DF_DYNAMIC_SHARED(T, shared);
  T* const k = shared;  // each warp's rows of it later hold what it writes
  T* const v = shared + kBlock;
  T* const stages = shared + 2 * kBlock;  // queries, dout, queries, dout
  const int dim = static_cast<int>(p.head_dim);
  // Each thread's own, behind a row of k or v, as sums need all registers.
  KeyBlock& at = behind_row<KeyBlock, kDim>(shared, static_cast<int>(threadIdx.x));
  at = order.place(static_cast<int>(blockIdx.x), kRows);
  const int own = static_cast<int>(threadIdx.x) / 32 * 16 * kKeyHalves<T, kDim>;  // this warp's rows of the block
  const Tiles tiles = query_tiles(walk, at.rows, kRows, kQueries);
  const auto load = [&](int stage, unsigned h, int t) {
    T* const q = stages + stage * 2 * kTile;
    const Rows tile = tiles[t];
    load_rows<kDim, kQueries>(walk, tile, dim, vectors, Copy<T>(q, p.q, at.b, h), Copy<T>(q + kTile, p.dout, at.b, h));
    if (threadIdx.x < kQueries) {
      const int i = threadIdx.x, position = walk.position(tile.image, tile.begin + i);
      const int64_t row = query_row(p, at.b, h, position < 0 ? 0 : position);
      TermsPair& pair = behind_row<TermsPair, kDim>(q, i - i % 2);
      DF_COPY_ASYNC_8(&pair.of[i % 2], static_cast<const Terms*>(p.terms) + row, position >= 0);
    }
    copy_async_commit();
  };
  const unsigned group = static_cast<unsigned>(p.num_heads / p.num_kv_heads), end = (at.kv + 1) * group;
  load_rows<kDim, kRows>(walk, at.rows, dim, vectors, Copy<T>(k, p.k, at.b, at.kv), Copy<T>(v, p.v, at.b, at.kv));
  load(0, at.kv * group, 0);
  copy_async_wait<0>();
  __syncthreads();
  KeyWarp<T, kDim> warp;
  warp.factor = p.scale * kLog2e;
  DF_UNROLL
  for (int i = 0; i < kKeyHalves<T, kDim>; ++i) {
    warp.k[i].take(k, own + 16 * i);
    warp.v[i].take(v, own + 16 * i);
  }
  int stage = 0;
  for (unsigned h = at.kv * group; h < end; ++h)
    for (int t = 0; t < tiles.count; ++t, stage ^= 1) {
      copy_async_wait<0>();
      __syncthreads();  // this tile is here, and nobody reads the one before any more
      const bool more = t + 1 < tiles.count;
      if (more || h + 1 < end) load(stage ^ 1, more ? h : h + 1, more ? t + 1 : 0);
      const T* const q = stages + stage * 2 * kTile;
      meet<kQueries>(warp, QueryStage<T>{q, q + kTile}, Sight<false>{walk, at.rows.image, tiles[t].image},
                     at.rows.begin + own, tiles[t]);
    }
  const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
  DF_UNROLL
  for (int i = 0; i < kKeyHalves<T, kDim>; ++i) {
    const int first = own + 16 * i;
    const Rows rows{at.rows.image, at.rows.begin + first};
    T* const place = shared + first * kTileStride<kDim, T>;
    store_rows<kDim>(p.dk, place, warp.dk[i], scale, walk, rows, at.b, at.kv, dim, vectors);
    store_rows<kDim>(p.dv, place, warp.dv[i], one, walk, rows, at.b, at.kv, dim, vectors);
  }
}

}  // namespace

void backward_cuda(const Params& p, void* stream) {
  if (p.batch == 0 || p.length == 0 || p.num_heads == 0) return;
  const Walk walk = checked_walk(p);
  const DeviceGuard guard(p.device.index);
  dispatch(p, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int kDim = decltype(width)::value, kStages = 4 * kTileRows<T, kDim>;
    constexpr int kRows = kQueryRows<T, kDim>, kKeys = kKeyRows<T, kDim>;
    const auto key_blocks = static_cast<unsigned>(p.batch * p.num_kv_heads * walk.blocks(kKeys));
    launch<T, kDim, 2 * kRows + kStages>(gradient_of_queries<T, kDim>, query_blocks(p, walk, kRows), stream, p, walk);
    launch<T, kDim, 2 * kKeys + kStages>(gradient_of_keys<T, kDim>, key_blocks, stream, p, walk,
                                         KeyOrder(p, walk, kKeys));
  });
}

}  // namespace dalle_fast::sparse_attention
