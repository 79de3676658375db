// SPDX-License-Identifier: MIT
// Rows dense: a block owns 16 or 32 neighbouring rows, a thread 16 bytes of them times four codes. The perturbed logits
// wait in shared memory, up to about 1700 codes, or are drawn again. With kKl the KL is taken of the logits before.
#pragma once

#include "../core/gumbel.cuh"
#include "best.cuh"
#include "kl.cuh"

namespace dalle_fast::gumbel_softmax {
namespace {

constexpr unsigned kThreads = 256, kWarps = kThreads / 32, kMaxTile = 32;

// A block's rows: `lanes` threads side by side take kRows rows each, `groups` threads behind each other share a row.
template <int kRows>
struct RowTile {
  unsigned size, lanes, groups, lane, group;
  int64_t row;   // the first of this thread
  int64_t base;  // its code 0
  bool there;

  __device__ __forceinline__ RowTile(unsigned rows, int64_t outer, int64_t num_codes, int64_t inner)
      : size(rows), lanes(rows / kRows), groups(kThreads / lanes) {
    lane = threadIdx.x % lanes;
    group = threadIdx.x / lanes;
    row = static_cast<int64_t>(blockIdx.x) * rows + lane * kRows;
    there = row < outer * inner;
    const bool small = outer * inner <= UINT32_MAX;  // a division of 64 bits takes 100 instructions
    const int64_t index = small ? static_cast<uint32_t>(row) / static_cast<uint32_t>(inner) : row / inner;
    base = index * (num_codes - 1) * inner + row;
  }
  // part[warp][row of the tile], written by the first lanes of each warp
  template <typename State>
  __device__ __forceinline__ void share(State* part, const State* mine) const {
    if (threadIdx.x % 32 < lanes) {
      DF_UNROLL
      for (int r = 0; r < kRows; ++r) part[threadIdx.x / 32 * size + lane * kRows + r] = mine[r];
    }
    __syncthreads();
  }
};

// Over the threads that share rows: kl and stats.
template <int kRows>
__device__ __forceinline__ void store_kl(const Params& p, const RowTile<kRows>& tile, KlSums (&sums)[kRows],
                                         KlSums* part) {
  DF_UNROLL
  for (int r = 0; r < kRows; ++r) sums[r] = over_lanes(sums[r], tile.lanes);
  tile.share(part, sums);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * tile.size + threadIdx.x;
  if (threadIdx.x >= tile.size || row >= p.outer * p.inner) return;
  KlSums all = part[threadIdx.x];
  for (unsigned w = 1; w < kWarps; ++w) all = all + part[w * tile.size + threadIdx.x];
  all.store(p, row);
}

template <typename T, int kRows>
__device__ __forceinline__ void load_rows(float* v, const T* from) {
  if constexpr (kRows == 1)
    v[0] = to_float(*from);
  else
    unpack_piece<T>(v, *reinterpret_cast<const Piece*>(from));
}
template <typename T, int kRows>
__device__ __forceinline__ void store_rows(T* to, const float (&v)[kRows]) {
  if constexpr (kRows == 1)
    from_float(to, v[0]);
  else
    store_piece<Rows::kPieces>(to, 0, kRows, v);
}

// v[row][k] = logit + noise of code 4 * group + k; codes that do not exist are -Inf. The logits go to `kl`, or null.
template <typename T, int kRows>
__device__ __forceinline__ void draw_rows(float (*v)[4], const Params& p, const NoiseSource& noise, int64_t base,
                                          int64_t row, int group, KlSums* kl) {
  const T* x = static_cast<const T*>(p.logits) + base + 4 * group * p.inner;
  float raw[4][kRows];
  DF_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (4 * group + k < static_cast<int>(p.num_codes)) {
      load_rows<T, kRows>(raw[k], x + k * p.inner);
    } else {
      DF_UNROLL
      for (int r = 0; r < kRows; ++r) raw[k][r] = -INFINITY;
    }
  }
  DF_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (kl) {
      const float logits[4] = {raw[0][r], raw[1][r], raw[2][r], raw[3][r]};
      kl[r].add(logits);
    }
    const Philox4 words = noise.words(static_cast<uint32_t>(group), p.row_offset + static_cast<uint32_t>(row + r));
    DF_UNROLL
    for (int k = 0; k < 4; ++k) v[r][k] = add_gumbel(raw[k][r], words.word[k]);
  }
}

__device__ __forceinline__ int groups_of(const Params& p) { return (static_cast<int>(p.num_codes) + 3) / 4; }

template <typename T, int kRows, bool kKl>
__global__ void __launch_bounds__(kThreads, 2)
    soft_rows(const Params p, const NoiseSource noise, const float factor, const unsigned tile_rows, const bool keep) {
  DF_SHARED(SoftmaxState, part, kWarps * kMaxTile);
  DF_SHARED(KlSums, kl_part, kKl ? kWarps * kMaxTile : 1);
  DF_DYNAMIC_SHARED(Piece, kept);  // the four values of a row and group; each thread reads what it has written
  const RowTile<kRows> tile(tile_rows, p.outer, p.num_codes, p.inner);
  const int groups = tile.there ? groups_of(p) : 0;
  const int all_kept = static_cast<int>(tile.lanes) * groups;
  SoftmaxState state[kRows];
  DF_UNROLL
  for (int r = 0; r < kRows; ++r) state[r] = kNoSoftmax;
  KlSums kl[kRows];
  DF_UNROLL
  for (int r = 0; r < kRows; ++r) kl[r] = kNoKl;
  for (int g = tile.group; g < groups; g += tile.groups) {
    float v[kRows][4];
    draw_rows<T, kRows>(v, p, noise, tile.base, tile.row, g, kKl ? kl : nullptr);
    if (keep) {
      DF_UNROLL
      for (int r = 0; r < kRows; ++r) kept[r * all_kept + g * tile.lanes + tile.lane] = pack<float>(v[r]);
    }
    softmax_add<kRows, 4>(state, v, factor);
  }
  DF_UNROLL
  for (int r = 0; r < kRows; ++r) state[r] = over_lanes(state[r], tile.lanes);
  if (kKl) store_kl(p, tile, kl, &kl_part[0]);
  tile.share(&part[0], state);
  if (threadIdx.x < tile.size) {  // over the warps: shift and 1 / sum, in the place of the first
    SoftmaxState all = part[threadIdx.x];
    for (unsigned w = 1; w < kWarps; ++w) {
      const SoftmaxState other = part[w * tile.size + threadIdx.x];
      const float shift = fmaxf(all.shift, other.shift);
      all.sum = all.sum * fast_exp2(all.shift - shift) + other.sum * fast_exp2(other.shift - shift);
      all.shift = shift;
    }
    part[threadIdx.x] = {all.shift, 1.0f / all.sum};
  }
  __syncthreads();
  DF_UNROLL
  for (int r = 0; r < kRows; ++r) state[r] = part[tile.lane * kRows + r];
  T* const y = static_cast<T*>(p.y) + tile.base;
  for (int g = tile.group; g < groups; g += tile.groups) {
    float v[kRows][4];
    if (keep) {
      DF_UNROLL
      for (int r = 0; r < kRows; ++r) unpack_piece<float>(v[r], kept[r * all_kept + g * tile.lanes + tile.lane]);
    } else {
      draw_rows<T, kRows>(v, p, noise, tile.base, tile.row, g, nullptr);
    }
    DF_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (4 * g + k >= static_cast<int>(p.num_codes)) break;
      float out[kRows];
      DF_UNROLL
      for (int r = 0; r < kRows; ++r) out[r] = fast_exp2(fmaf(v[r][k], factor, -state[r].shift)) * state[r].sum;
      store_rows<T, kRows>(y + (4 * g + k) * p.inner, out);
    }
  }
}

template <typename T, int kRows, bool kKl>
__global__ void __launch_bounds__(kThreads, 2)
    hard_rows(const Params p, const NoiseSource noise, const unsigned tile_rows) {
  DF_SHARED(Best, part, kWarps * kMaxTile);
  DF_SHARED(KlSums, kl_part, kKl ? kWarps * kMaxTile : 1);
  const RowTile<kRows> tile(tile_rows, p.outer, p.num_codes, p.inner);
  const int groups = tile.there ? groups_of(p) : 0;
  Best best[kRows];
  DF_UNROLL
  for (int r = 0; r < kRows; ++r) best[r] = before(4 * tile.group, static_cast<int>(p.num_codes));
  KlSums kl[kRows];
  DF_UNROLL
  for (int r = 0; r < kRows; ++r) kl[r] = kNoKl;
  for (int g = tile.group; g < groups; g += tile.groups) {
    float v[kRows][4];
    draw_rows<T, kRows>(v, p, noise, tile.base, tile.row, g, kKl ? kl : nullptr);
    DF_UNROLL
    for (int r = 0; r < kRows; ++r) DF_UNROLL
    for (int k = 0; k < 4; ++k) take(best[r], v[r][k], 4 * g + k);  // -Inf, if not there, takes nothing
  }
  DF_UNROLL
  for (int r = 0; r < kRows; ++r) best[r] = over_lanes(best[r], tile.lanes);
  if (kKl) store_kl(p, tile, kl, &kl_part[0]);
  tile.share(&part[0], best);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * tile.size + threadIdx.x;
  if (threadIdx.x >= tile.size || row >= p.outer * p.inner) return;
  Best all = part[threadIdx.x];
  for (unsigned w = 1; w < kWarps; ++w) all = better(all, part[w * tile.size + threadIdx.x]);
  p.index[row] = all.code;
}

template <typename T, int kRows, bool kRelaxed, bool kKl>
__global__ void __launch_bounds__(kThreads, 2)
    backward_rows(const BackwardParams p, const unsigned tile_rows, const bool keep) {
  DF_SHARED(float, part, kWarps* kMaxTile);
  DF_DYNAMIC_SHARED(T, kept);  // y and dy; each thread reads what it has written
  const RowTile<kRows> tile(tile_rows, p.outer, p.num_codes, p.inner);
  const int codes = tile.there ? static_cast<int>(p.num_codes) : 0;
  const T* const y = kRelaxed ? static_cast<const T*>(p.y) + tile.base : nullptr;
  const T* const dy = kRelaxed ? static_cast<const T*>(p.dy) + tile.base : nullptr;
  const T* const logits = kKl ? static_cast<const T*>(p.logits) + tile.base : nullptr;
  T* const out = static_cast<T*>(p.dlogits) + tile.base;
  T* const kept_y = kept + tile.lane * kRows;
  T* const kept_dy = kept_y + codes * static_cast<int>(tile.size);
  float sum[kRows] = {};
  if constexpr (kRelaxed) {
    for (int c = tile.group; c < codes; c += tile.groups) {
      float u[kRows], v[kRows];
      load_rows<T, kRows>(u, y + c * p.inner);
      load_rows<T, kRows>(v, dy + c * p.inner);
      if (keep) {
        store_rows<T, kRows>(kept_y + c * tile.size, u);
        store_rows<T, kRows>(kept_dy + c * tile.size, v);
      }
      DF_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r] = fmaf(u[r], v[r], sum[r]);
    }
    DF_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = over_lanes(sum[r], Add{}, tile.lanes);
    tile.share(&part[0], sum);
    DF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r] = 0.0f;
      for (unsigned w = 0; w < kWarps; ++w) sum[r] += part[w * tile.size + tile.lane * kRows + r];
    }
  }
  KlGradient kl[kRows];
  if constexpr (kKl) {
    DF_UNROLL
    for (int r = 0; r < kRows; ++r)
      if (tile.there) kl[r] = KlGradient(p, tile.row + r);
  }
  for (int c = tile.group; c < codes; c += tile.groups) {
    float u[kRows], v[kRows] = {};
    if constexpr (kRelaxed) {
      load_rows<T, kRows>(u, keep ? kept_y + c * tile.size : y + c * p.inner);
      load_rows<T, kRows>(v, keep ? kept_dy + c * tile.size : dy + c * p.inner);
      DF_UNROLL
      for (int r = 0; r < kRows; ++r) v[r] = u[r] * (v[r] - sum[r]) * p.inverse_tau;
    }
    if constexpr (kKl) {
      load_rows<T, kRows>(u, logits + c * p.inner);
      DF_UNROLL
      for (int r = 0; r < kRows; ++r) v[r] += kl[r](u[r]);
    }
    store_rows<T, kRows>(out + c * p.inner, v);
  }
}

}  // namespace
}  // namespace dalle_fast::gumbel_softmax
