// SPDX-License-Identifier: MIT
// Forward on tensor cores (sm_80 and newer): bfloat16 and float16 as they are, float32 as three products of tf32 parts.
// A block owns 64 or 128 queries of a head, whose fragments stay in registers; scores never leave registers either.
// The softmax runs online, its shift raised only when a row's scores outgrow it by 2^8. Floor: q, k, v and out moved
// once, 4 x 2 L D bytes a head; a warp's 32 x 16 scores of width 64 take 32 products of 16 x 8 x 16, which bound the
// kernel, 8 loads of fragments and 16 exponentials. Of the scores computed for 256 + 32 x 32 positions, the pattern
// asks for 0.95 (row), 0.97 (column), 0.74 (conv) and 0.99 (dense).
#include <stdexcept>

#include "rows.cuh"

namespace dalle_fast::sparse_attention {
namespace {

// at least, on a multiprocessor: 168 or 255 registers a thread
template <typename T, int kDim>
inline constexpr int kForwardBlocks = kDim * sizeof(T) <= 256 ? 3 : 2;

template <typename T, int kDim>
struct ForwardWarp {
  static constexpr int kHalves = kQueryHalves<T, kDim>, kColumns = kWideColumns<T, kDim>;
  static constexpr bool kOnlyPieces = kPiecesOnly<T>;
  static constexpr float kSlack = 8.0f;  // exponents of 2 by which a score may exceed the shift
  LeftRows<T, kDim, kHoldsQueries<T, kDim>> q[kHalves];
  float out[kHalves][kDim / 8][4] = {};
  float sum[kHalves][2] = {};  // of this thread's columns
  float shift[kHalves][2];
  float factor;   // of scores in exponents of 2
  bool negative;  // scores still need their sign: `factor` is positive, so that -Inf times it is -Inf

  __device__ __forceinline__ ForwardWarp(float scale, const T* rows, int first) {
    factor = fmaxf(fabsf(scale) * kLog2e, 1e-30f);
    negative = scale < 0.0f;
    DF_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      q[h].take(rows, first + 16 * h);
      shift[h][0] = shift[h][1] = -3e38f;
    }
  }

  template <int kCount, int kWide, typename Mask>
  __device__ __forceinline__ void step(int half, int column, const KeyStage<T>& stage, const Mask& mask) {
    constexpr int kBlocks = kWide / 8;
    float s[kCount][kBlocks][4] = {}, top[kCount][2];
    multiply_transposed<kDim>(s, [&](uint32_t* a, int h, int k) { q[half + h].fragment(a, k); }, stage.k, column);
    if (negative) {
      DF_UNROLL
      for (int i = 0; i < kCount * kBlocks * 4; ++i) s[i / 4 / kBlocks][i / 4 % kBlocks][i % 4] *= -1.0f;
    }
    bool outgrown = false;
    DF_UNROLL
    for (int h = 0; h < kCount; ++h) {
      DF_UNROLL
      for (int i = 0; i < kBlocks * 4; ++i) {
        float &score = s[h][i / 4][i % 4], &largest = top[h][i % 4 / 2];
        if (!mask(i / 4, i % 4)) score = -INFINITY;
        largest = i == 0 || i == 2 ? score : fmaxf(score, largest);
      }
      DF_UNROLL
      for (int j = 0; j < 2; ++j) outgrown |= top[h][j] * factor > shift[half + h][j] + kSlack;
    }
    if (__any_sync(0xffffffffu, outgrown)) {
      DF_UNROLL
      for (int h = 0; h < kCount; ++h) raise(half + h, top[h]);
    }
    DF_UNROLL
    for (int h = 0; h < kCount; ++h) DF_UNROLL
    for (int i = 0; i < kBlocks * 4; ++i) {
      float& score = s[h][i / 4][i % 4];
      score = fast_exp2(score * factor - shift[half + h][i % 4 / 2]);
      sum[half + h][i % 4 / 2] += score;
    }
    multiply_add<kDim>(out + half, s, stage.v, column);
  }

 private:
  // Each row by its own scores alone, so that it has the same bits whatever its neighbours are.
  __device__ __forceinline__ void raise(int h, const float* top) {
    DF_UNROLL
    for (int j = 0; j < 2; ++j) {
      float largest = fmaxf(top[j], __shfl_xor_sync(0xffffffffu, top[j], 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2)) * factor;
      if (!(largest > shift[h][j] + kSlack)) largest = shift[h][j];
      const float keep = fast_exp2(shift[h][j] - largest);
      shift[h][j] = largest;
      sum[h][j] *= keep;
      DF_UNROLL
      for (int n = 0; n < kDim / 8; ++n) {
        out[h][n][2 * j] *= keep;
        out[h][n][2 * j + 1] *= keep;
      }
    }
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, (kForwardBlocks<T, kDim>))
    attend(const Params p, const Walk walk, const bool vectors) {
  constexpr int kRows = kQueryRows<T, kDim>, kKeys = kTileRows<T, kDim>, kTile = kKeys * kTileStride<kDim, T>;
  static_assert(!kHoldsQueries<T, kDim> || kRows <= 2 * kKeys, "a stage holds the block's rows");
  DF_DYNAMIC_SHARED(T, stages);  // keys, values, keys, values
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
  // What registers hold comes through the second stage, which is free until the loop and after it.
  T* const q = stages + (kHoldsQueries<T, kDim> ? 2 : 4) * kTile;
  load_rows<kDim, kRows>(walk, at.rows, dim, vectors, Copy<T>(q, p.q, at.b, at.h));
  load(0);
  copy_async_wait<0>();
  __syncthreads();
  ForwardWarp<T, kDim> warp(p.scale, q, own);
  for (int i = 0; i < tiles.count; ++i) {
    copy_async_wait<0>();
    __syncthreads();  // tile i is here, and nobody reads tile i - 1 (or q) any more
    if (i + 1 < tiles.count) load(i + 1);
    const T* const k = stages + i % 2 * 2 * kTile;
    meet<kKeys>(warp, KeyStage<T>{k, k + kTile}, Sight<true>{walk, at.rows.image, tiles[i].image}, at.rows.begin + own,
                tiles[i]);
  }
  __syncthreads();  // nobody reads tiles any more
  DF_UNROLL
  for (int h = 0; h < kQueryHalves<T, kDim>; ++h) {
    const Rows rows{at.rows.image, at.rows.begin + own + 16 * h};
    float inverse[2];
    DF_UNROLL
    for (int j = 0; j < 2; ++j) {
      float sum = warp.sum[h][j];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      inverse[j] = 1.0f / sum;
      const int position = walk.position(rows.image, rows.begin + lane / 4 + 8 * j);
      if (position >= 0 && lane % 4 == 0)
        p.lse[query_row(p, at.b, at.h, position)] = (warp.shift[h][j] + log2f(sum)) * kLn2;
    }
    store_rows<kDim>(p.out, q + (own + 16 * h) * kTileStride<kDim, T>, warp.out[h], inverse, walk, rows, at.b, at.h,
                     dim, vectors);
  }
}

}  // namespace

Walk checked_walk(const Params& p) {
  if (p.head_dim > kMaxDim) throw std::invalid_argument("q: the CUDA kernel takes at most 128 channels a head");
  if (p.pattern.length() > (1 << 20))
    throw std::invalid_argument("pattern: the CUDA kernel takes at most 2^20 positions");
  for (const Tensor4* t : {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv})
    if (p.length > 1 && t->stride_l >> 32)
      throw std::invalid_argument("q: the CUDA kernel takes rows at most 2^32 elements apart");
  const Walk walk(p.pattern, p.length);
  if (p.batch > 65535 || p.num_heads > 65535)
    throw std::invalid_argument("q: the CUDA kernel takes at most a batch of 65535 and 65535 heads");
  if (p.batch * p.num_kv_heads * walk.blocks(16 * kWarps) >= int64_t{1} << 31)
    throw std::invalid_argument("q: the CUDA kernel takes at most 2^31 blocks of 64 keys");
  return walk;
}

void forward_cuda(const Params& p, void* stream) {
  if (p.batch == 0 || p.length == 0 || p.num_heads == 0) return;
  const Walk walk = checked_walk(p);
  const DeviceGuard guard(p.device.index);
  dispatch(p, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int kDim = decltype(width)::value;
    constexpr int kRows = kQueryRows<T, kDim>, kStages = 4 * kTileRows<T, kDim> + (kHoldsQueries<T, kDim> ? 0 : kRows);
    launch<T, kDim, kStages>(attend<T, kDim>, query_blocks(p, walk, kRows), stream, p, walk);
  });
}

}  // namespace dalle_fast::sparse_attention
