// SPDX-License-Identifier: MIT
// The bfloat16 twin of cpu.cpp for processors that multiply bfloat16: all five products of a tile are blocks of 32 x 32
// on AMX tiles or dot products, with float32 sums. P and dS are rounded to bfloat16 on their way to the next product,
// as flash attention does; the denominator adds up unrounded ones.
//
// Keys and values are packed once a task: transposed pairs for products over the head dimension, pairs of rows for
// products over keys. dv and dk are accumulated transposed, [D, keys], because P and dS leave the softmax as pairs over
// queries with no more than a shift.
#include <type_traits>

#include "../core/bf16_tiles.h"
#include "../core/parallel.h"
#include "tiles.h"

namespace dalle_fast::sparse_attention {
namespace DF_CPU_NAMESPACE {

namespace {

struct Workspace {
  bf16* rows;          // [columns, dim]: staging
  uint32_t *kt, *vt;   // [dim / 2, columns], pairs along the head dimension
  uint32_t *kp, *vp;   // [columns / 2, dim], pairs along keys
  float *dkt, *dvt;    // [dim, columns]
  float* sheet;        // [columns, dim]
  bf16 *q, *dout;      // [tile, dim]
  bf16 *qt, *doutt;    // [dim, tile]
  uint32_t* pairs;     // [tile / 2, dim]: staging
  float *o, *s, *dp;   // [tile, dim], [tile, width] twice
  bf16* p;             // [tile, width]: P, or dS in the backward pass
  uint32_t *pp, *dsp;  // [tile / 2, width]
  int64_t columns, dim, width;
};

DF_INLINE Workspace carve(const Params& p, const Layout& layout, bool backward) {
  static thread_local ThreadScratch scratch;
  Workspace w{};
  w.dim = round_up(p.head_dim, kBlock);
  w.columns = round_up(layout.slots, kBlock) + 3 * kBlock;  // a range may start anywhere and is read in whole blocks
  if (w.columns % 256 == 0) w.columns += kBlock;            // or all rows of a tile meet in one cache set
  w.width = round_up(layout.num_text, kBlock) + round_up(layout.slots - layout.image_base, kBlock) + kBlock;
  const auto lay_out = [&](float* base) {
    int64_t at = 0;
    const auto take = [&](auto*& pointer, int64_t n) {
      if (base) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + at);
      at += round_up(n * static_cast<int64_t>(sizeof *pointer), 64) / 4;
    };
    take(w.rows, w.columns * w.dim);
    take(w.kt, w.dim / 2 * w.columns);
    take(w.q, kTile * w.dim);
    take(w.o, kTile * w.dim);
    take(w.s, kTile * w.width);
    take(w.p, kTile * w.width);
    if (!backward) {
      take(w.vp, w.columns / 2 * w.dim);
    } else {
      take(w.vt, w.dim / 2 * w.columns);
      take(w.kp, w.columns / 2 * w.dim);
      take(w.dkt, w.dim * w.columns);
      take(w.dvt, w.dim * w.columns);
      take(w.sheet, w.columns * w.dim);
      take(w.dout, kTile * w.dim);
      take(w.qt, kTile * w.dim);
      take(w.doutt, kTile * w.dim);
      take(w.pairs, kTile / 2 * w.dim);
      take(w.dp, kTile * w.width);
      take(w.pp, kTile / 2 * w.width);
      take(w.dsp, kTile / 2 * w.width);
    }
    return at;
  };
  const int64_t count = lay_out(nullptr);
  lay_out(scratch.floats(count));
  return w;
}

// ---- packing

DF_INLINE void copy_row(bf16* to, const bf16* from, int64_t n, int64_t padded) {
  __builtin_memcpy(to, from, static_cast<std::size_t>(n) * sizeof(bf16));
  if (padded > n) __builtin_memset(to + n, 0, static_cast<std::size_t>(padded - n) * sizeof(bf16));
}

void stage_rows(const Workspace& w, const Layout& layout, const Tensor4& t, int64_t b, int64_t h, int64_t head_dim) {
  // What no position fills: between text and image, a prefix's empty slots, the end.
  const bool dense = !layout.by_column;
  int64_t from = dense ? layout.num_text : 0;
  const int64_t to = dense ? layout.image_base : w.columns;
  __builtin_memset(w.rows + from * w.dim, 0, static_cast<std::size_t>((to - from) * w.dim) * sizeof(bf16));
  if (dense) {
    from = layout.slots;
    __builtin_memset(w.rows + from * w.dim, 0, static_cast<std::size_t>((w.columns - from) * w.dim) * sizeof(bf16));
  }
  for_each_position(layout, [&](int64_t position, int64_t slot) {
    copy_row(w.rows + slot * w.dim, row_of<bf16>(t, b, h, position), head_dim, w.dim);
  });
}

DF_INLINE void pack_transposed(uint32_t* to, const Workspace& w) {
  transpose_words(to, w.columns, reinterpret_cast<const uint32_t*>(w.rows), w.dim / 2, w.columns, w.dim / 2);
}
DF_INLINE void pack_pairs(uint32_t* to, const Workspace& w) { pair_rows(to, w.dim, w.rows, w.dim, w.columns, w.dim); }

// The rows of a tile; a negative scale goes into q, so that maxima of scores are maxima of scaled scores.
void load_tile(bf16* to, const Workspace& w, const Params& p, const Tensor4& t, const Tile& tile, int64_t b, int64_t h,
               bool negate) {
  for (int64_t r = 0; r < kTile; ++r) {
    if (r >= tile.count) {
      __builtin_memset(to + r * w.dim, 0, static_cast<std::size_t>(w.dim) * sizeof(bf16));
      continue;
    }
    copy_row(to + r * w.dim, row_of<bf16>(t, b, h, tile.position(r)), p.head_dim, w.dim);
  }
  if (negate)
    for (int64_t i = 0; i < tile.count * w.dim; ++i) to[i].bits ^= 0x8000u;
}

DF_INLINE void transpose_tile(bf16* to, const Workspace& w, const bf16* rows) {
  pair_rows(w.pairs, w.dim, rows, w.dim, kTile, w.dim);
  for (int64_t d = 0; d < w.dim; d += 16)
    transpose_words(reinterpret_cast<uint32_t*>(to + d * kTile), kTile / 2, w.pairs + d, w.dim, kTile / 2, 16);
}

DF_INLINE void scores(float* s, const bf16* rows, const uint32_t* keys, const Workspace& w, const Layout& layout,
                      const Columns& c, int64_t rows_padded, bool amx) {
  gemm_bf16<false>(s, w.width, rows, w.dim, keys, w.columns, rows_padded, c.text_padded, w.dim, amx);
  gemm_bf16<false>(s + c.text_padded, w.width, rows, w.dim, keys + layout.image_base + c.begin, w.columns, rows_padded,
                   c.image_padded, w.dim, amx);
}

// ---- masks, 16 columns at a time

DF_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? static_cast<__mmask16>(0xffff) : n <= 0 ? static_cast<__mmask16>(0) : (1u << n) - 1u;
}

// f(column, mask of its 16 lanes) over the columns that row r may see any of, and the padding behind them
template <typename F>
DF_INLINE void for_each_visible(const Columns& c, const BiasTable& bias, const Tile& tile, int64_t r, F&& f) {
  const int64_t text = tile.text ? tile.local + r + 1 : c.text;
  int64_t i = 0;
  for (; i + 16 <= text; i += 16) f(i, static_cast<__mmask16>(0xffff));
  for (; i < c.text_padded; i += 16) f(i, first_lanes(text - i));
  if (!c.image) return;
  const float* table = bias.of(tile.local + r, c.begin);
  const int64_t skip = c.skip + tile.skipped(r);
  for (i = 0; i < c.image_padded; i += 16) {
    __mmask16 mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(table + i), _mm512_setzero_ps(), _CMP_EQ_OQ);
    if (i < skip) mask &= static_cast<__mmask16>(~first_lanes(skip - i));
    if (i + 16 > c.image) mask &= first_lanes(c.image - i);
    f(c.text_padded + i, mask);
  }
}

// ---- forward

void forward_tile(const Params& p, const Layout& layout, const Workspace& w, const BiasTable& bias, const Tile& tile,
                  int64_t b, int64_t h, bool amx) {
  const Columns c(layout, tile, 2, kBlock);  // an even start: pairs line up
  const int64_t rows = round_up(tile.count, kBlock / 2);
  load_tile(w.q, w, p, p.q, tile, b, h, p.scale < 0.0f);
  scores(w.s, w.q, w.kt, w, layout, c, rows, amx);
  const float scale = __builtin_fabsf(p.scale), factor = scale * kLog2e;
  float inverse[kTile];
  for (int64_t r = 0; r < tile.count; ++r) {
    const float* row = w.s + r * w.width;
    bf16* out = w.p + r * w.width;
    __m512 best[2] = {_mm512_set1_ps(kMinusInf), _mm512_set1_ps(kMinusInf)};
    for_each_visible(c, bias, tile, r, [&](int64_t i, __mmask16 mask) {
      __m512& to = best[i / 16 % 2];
      to = _mm512_mask_max_ps(to, mask, _mm512_loadu_ps(row + i), to);  // a NaN score leaves the maximum alone
    });
    const float shift = _mm512_reduce_max_ps(_mm512_max_ps(best[0], best[1]));
    const VecF minus = splat(-shift * factor);
    VecF sum[2] = {};
    for_each_visible(c, bias, tile, r, [&](int64_t i, __mmask16 mask) {
      const VecF x = exp2_fast(loadu(row + i) * splat(factor) + minus);
      const VecF e = (VecF)_mm512_maskz_mov_ps(mask, (__m512)x);
      sum[i / 16 % 2] += e;
      const VecH h16 = round_bf16(e);
      __builtin_memcpy(out + i, &h16, sizeof h16);
    });
    const float total = hsum(sum[0] + sum[1]);
    inverse[r] = 1.0f / total;
    p.lse[(b * p.num_heads + h) * p.length + tile.position(r)] = shift * scale + log(splat(total))[0];
  }
  for (int64_t r = tile.count; r < kTile; ++r)
    __builtin_memset(w.p + r * w.width, 0, static_cast<std::size_t>(c.width()) * sizeof(bf16));
  gemm_bf16<false>(w.o, w.dim, w.p, w.width, w.vp, w.dim, rows, w.dim, c.text_padded, amx);
  if (c.image)
    gemm_bf16<true>(w.o, w.dim, w.p + c.text_padded, w.width, w.vp + (layout.image_base + c.begin) / 2 * w.dim, w.dim,
                    rows, w.dim, c.image_padded, amx);
  for (int64_t r = 0; r < tile.count; ++r)
    store_row(const_cast<bf16*>(row_of<bf16>(p.out, b, h, tile.position(r))), w.o + r * w.dim, p.head_dim, inverse[r]);
}

// ---- backward

void backward_tile(const Params& p, const Layout& layout, const Workspace& w, const BiasTable& bias, const Tile& tile,
                   int64_t b, int64_t h, bool amx) {
  const Columns c(layout, tile, 2, kBlock);  // an even start: pairs line up
  const int64_t rows = round_up(tile.count, kBlock / 2);
  load_tile(w.q, w, p, p.q, tile, b, h, p.scale < 0.0f);
  load_tile(w.dout, w, p, p.dout, tile, b, h, false);
  float delta[kTile] = {}, lse[kTile] = {};
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t l = tile.position(r);
    const bf16* o = row_of<bf16>(p.out, b, h, l);
    VecF sum = {};
    int64_t d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes) sum += loadu(o + d) * loadu(w.dout + r * w.dim + d);
    if (d < p.head_dim) sum += load_n(o + d, static_cast<int>(p.head_dim - d)) * loadu(w.dout + r * w.dim + d);
    delta[r] = hsum(sum);
    lse[r] = p.lse[(b * p.num_heads + h) * p.length + l] * kLog2e;
  }
  scores(w.s, w.q, w.kt, w, layout, c, rows, amx);
  scores(w.dp, w.dout, w.vt, w, layout, c, rows, amx);
  const float factor = __builtin_fabsf(p.scale) * kLog2e;
  for (int64_t r = 0; r < kTile; ++r) {
    const float* s = w.s + r * w.width;
    const float* dp = w.dp + r * w.width;
    bf16* ds = w.p + r * w.width;
    // two rows share their words: the even one writes them, the odd one fills the high halves
    uint32_t* pp = w.pp + r / 2 * w.width;
    uint32_t* dsp = w.dsp + r / 2 * w.width;
    const bool odd = r % 2;
    if (r >= tile.count) {
      __builtin_memset(ds, 0, static_cast<std::size_t>(c.width()) * sizeof(bf16));
      if (odd) continue;
      __builtin_memset(pp, 0, static_cast<std::size_t>(c.width()) * sizeof(uint32_t));
      __builtin_memset(dsp, 0, static_cast<std::size_t>(c.width()) * sizeof(uint32_t));
      continue;
    }
    for_each_visible(c, bias, tile, r, [&](int64_t i, __mmask16 mask) {
      const VecF x = exp2_fast(loadu(s + i) * splat(factor) - splat(lse[r]));
      const VecF e = (VecF)_mm512_maskz_mov_ps(mask, (__m512)x);
      const VecF d = (VecF)_mm512_maskz_mul_ps(mask, (__m512)e, (__m512)(loadu(dp + i) - splat(delta[r])));
      const VecH e16 = round_bf16(e), d16 = round_bf16(d);
      __builtin_memcpy(ds + i, &d16, sizeof d16);
      VecU ew = __builtin_convertvector(e16, VecU), dw = __builtin_convertvector(d16, VecU);
      if (odd) {
        ew = (VecU)_mm512_loadu_si512(pp + i) | ew << 16;
        dw = (VecU)_mm512_loadu_si512(dsp + i) | dw << 16;
      }
      store_words(pp + i, ew);
      store_words(dsp + i, dw);
    });
  }
  transpose_tile(w.qt, w, w.q);
  transpose_tile(w.doutt, w, w.dout);
  gemm_bf16<false>(w.o, w.dim, w.p, w.width, w.kp, w.dim, rows, w.dim, c.text_padded, amx);
  gemm_bf16<true>(w.dvt, w.columns, w.doutt, kTile, w.pp, w.width, w.dim, c.text_padded, kTile, amx);
  gemm_bf16<true>(w.dkt, w.columns, w.qt, kTile, w.dsp, w.width, w.dim, c.text_padded, kTile, amx);
  if (c.image) {
    const int64_t at = c.text_padded, slot = layout.image_base + c.begin;
    gemm_bf16<true>(w.o, w.dim, w.p + at, w.width, w.kp + slot / 2 * w.dim, w.dim, rows, w.dim, c.image_padded, amx);
    gemm_bf16<true>(w.dvt + slot, w.columns, w.doutt, kTile, w.pp + at, w.width, w.dim, c.image_padded, kTile, amx);
    gemm_bf16<true>(w.dkt + slot, w.columns, w.qt, kTile, w.dsp + at, w.width, w.dim, c.image_padded, kTile, amx);
  }
  for (int64_t r = 0; r < tile.count; ++r)
    store_row(const_cast<bf16*>(row_of<bf16>(p.dq, b, h, tile.position(r))), w.o + r * w.dim, p.head_dim, p.scale);
}

void store_transposed(const Workspace& w, const Layout& layout, const Params& p, const Tensor4& t, const float* from,
                      int64_t b, int64_t h, float factor) {
  transpose_words(reinterpret_cast<uint32_t*>(w.sheet), w.dim, reinterpret_cast<const uint32_t*>(from), w.columns,
                  w.dim, w.columns);
  for_each_position(layout, [&](int64_t position, int64_t slot) {
    store_row(const_cast<bf16*>(row_of<bf16>(t, b, h, position)), w.sheet + slot * w.dim, p.head_dim, factor);
  });
}

}  // namespace

void forward(const Params& p) {
  const Layout layout(p, kBlock);
  const BiasTable bias(layout);
  const int64_t group = p.num_heads / p.num_kv_heads;
  const bool amx = cpu_level() >= CpuLevel::kAmx;
  parallel_for(p.batch * p.num_kv_heads, [&](int64_t task) {
    const TileScope tiles(amx);
    const int64_t b = task / p.num_kv_heads, kv = task % p.num_kv_heads;
    const Workspace w = carve(p, layout, false);
    stage_rows(w, layout, p.k, b, kv, p.head_dim);
    pack_transposed(w.kt, w);
    stage_rows(w, layout, p.v, b, kv, p.head_dim);
    pack_pairs(w.vp, w);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for_each_tile(layout, [&](const Tile& tile) { forward_tile(p, layout, w, bias, tile, b, h, amx); });
  });
}

void backward(const Params& p) {
  const Layout layout(p, kBlock);
  const BiasTable bias(layout);
  const int64_t group = p.num_heads / p.num_kv_heads;
  const bool amx = cpu_level() >= CpuLevel::kAmx;
  parallel_for(p.batch * p.num_kv_heads, [&](int64_t task) {
    const TileScope tiles(amx);
    const int64_t b = task / p.num_kv_heads, kv = task % p.num_kv_heads;
    const Workspace w = carve(p, layout, true);
    stage_rows(w, layout, p.v, b, kv, p.head_dim);
    pack_transposed(w.vt, w);
    stage_rows(w, layout, p.k, b, kv, p.head_dim);
    pack_transposed(w.kt, w);
    pack_pairs(w.kp, w);
    __builtin_memset(w.dkt, 0, static_cast<std::size_t>(w.dim * w.columns) * sizeof(float));
    __builtin_memset(w.dvt, 0, static_cast<std::size_t>(w.dim * w.columns) * sizeof(float));
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for_each_tile(layout, [&](const Tile& tile) { backward_tile(p, layout, w, bias, tile, b, h, amx); });
    store_transposed(w, layout, p, p.dk, w.dkt, b, kv, __builtin_fabsf(p.scale));
    store_transposed(w, layout, p, p.dv, w.dvt, b, kv, 1.0f);
  });
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::sparse_attention
