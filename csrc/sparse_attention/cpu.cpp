// SPDX-License-Identifier: MIT
// Tiles of queries against the keys they may see: all text, and one contiguous range of image keys. For the column
// pattern the image is packed column by column, so that its range is contiguous too; no tensor is transposed outside of
// the packed copy. Inside a tile, S = Q K^T and O = P V are one micro-kernel (rows x vectors of accumulators), and what
// a query may not see is masked by a table over (key - query), so no index arithmetic runs per pair.
//
// One task is a (batch, key-value head): it packs keys and values once in float32 and serves all heads of its group.
// The backward pass recomputes P from the log-sum-exp and adds up dk and dv tile by tile in a fixed order.
#include "sparse_attention.h"

#include <type_traits>

#include "../core/gemm.h"
#include "../core/parallel.h"
#include "../core/simd.h"
#include "tiles.h"

namespace dalle_fast::sparse_attention {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

// ---- memory of a task

// What no position fills (between text and image, a prefix's empty slots) holds anything, and is masked.
struct Workspace {
  float* kt;  // [columns / kLanes, D, kLanes]: keys transposed, vector by vector
  float* v;   // [columns, Dp]
  float* k;   // [columns, Dp], backward
  float* vt;  // as kt, backward
  float *dk, *dv;
  float *q, *o, *dout;  // [tile, Dp]
  float *s, *dp;        // [tile, width]
  int64_t columns, dim, width;
};

DF_INLINE Workspace carve(const Params& p, const Layout& layout, bool backward) {
  static thread_local ThreadScratch scratch;
  Workspace w;
  w.dim = round_up(p.head_dim, kLanes);
  w.columns = round_up(layout.slots, kLanes);
  w.width = round_up(layout.num_text, kLanes) + round_up(layout.slots - layout.image_base, kLanes) + kLanes;
  if (w.width % 256 == 0) w.width += kLanes;  // or all rows of a tile meet in one cache set
  const int64_t sheet = w.columns * w.dim, strip = kTile * w.dim, scores = kTile * w.width;
  float* at = scratch.floats((backward ? 6 : 2) * sheet + 3 * strip + 2 * scores);
  const auto take = [&at](int64_t n) {
    float* taken = at;
    at += n;
    return taken;
  };
  w.kt = take(sheet);
  w.v = take(sheet);
  w.k = w.vt = w.dk = w.dv = nullptr;
  if (backward) {
    w.k = take(sheet);
    w.vt = take(sheet);
    w.dk = take(sheet);
    w.dv = take(sheet);
  }
  w.q = take(strip);
  w.o = take(strip);
  w.dout = take(strip);
  w.s = take(scores);
  w.dp = take(scores);
  return w;
}

template <typename T>
void pack_rows(float* rows, const Workspace& w, const Layout& layout, const Tensor4& t, int64_t b, int64_t h,
               int64_t head_dim) {
  for_each_position(layout, [&](int64_t position, int64_t slot) {
    load_row(rows + slot * w.dim, row_of<T>(t, b, h, position), head_dim, w.dim);
  });
}

// [columns, Dp] -> [columns / kLanes, Dp, kLanes]
void pack_transposed(float* to, const float* rows, const Workspace& w) {
  for (int64_t c = 0; c < w.columns; c += kLanes)
    for (int64_t d = 0; d < w.dim; d += kLanes)
      transpose_block(to + c * w.dim + d * kLanes, kLanes, rows + c * w.dim + d, w.dim);
}

// Rows [first, first + count) of a tile and the image keys that one of them may see: columns [key_begin, key_end) of
// the image part, and whole vectors around them.
struct Strip {
  int64_t first, count, key_begin, key_end, begin, padded;
};

// of a strip: whole micro-kernels, and few keys that a row does not see
constexpr int64_t kScoreRows = 8, kValueRows = 4;

template <int64_t kRows, typename F>
DF_INLINE void for_each_strip(const Layout& layout, const Tile& tile, const Columns& c, F&& f) {
  if (!c.image) return;
  for (int64_t r = 0; r < tile.count; r += kRows) {
    Strip strip;
    strip.first = r;
    strip.count = tile.count - r < kRows ? tile.count - r : kRows;
    const int64_t from =
        layout.by_column ? tile.key_begin + tile.skipped(r) : first_image_key(*layout.pattern, tile.local + r);
    strip.key_begin = from - c.begin;
    strip.key_end = tile.local + r + strip.count - c.begin;
    strip.begin = strip.key_begin / kLanes * kLanes;
    strip.padded = round_up(strip.key_end - strip.begin, kLanes);
    f(strip);
  }
}

// f(begin, end) of the runs of keys that a strip sees: a convolution has one in each row of the grid.
template <typename F>
DF_INLINE void for_each_run(const Layout& layout, const Strip& strip, F&& f) {
  const Pattern& p = *layout.pattern;
  const int64_t half = p.kernel / 2, last = strip.key_end - 1;
  if (p.kind != PatternKind::kConv || p.width <= strip.count + 2 * half) return f(strip.key_begin, strip.key_end);
  for (int64_t up = half; up >= 0; --up) {
    const int64_t begin = last - strip.count + 1 - up * p.width - half, end = last - up * p.width + half + 1;
    if (end <= strip.key_begin) continue;
    f(begin > strip.key_begin ? begin : strip.key_begin, end < strip.key_end ? end : strip.key_end);
  }
}

// o (+)= s rows over the keys that the tile sees
DF_INLINE void accumulate(float* o, const float* s, const float* rows, const Workspace& w, const Layout& layout,
                          const Tile& tile, const Columns& c) {
  gemm<false, false>(o, w.dim, s, w.width, rows, kLanes, w.dim, tile.count, w.dim, c.text);
  const float* const image = rows + (layout.image_base + c.begin) * w.dim;
  for_each_strip<kValueRows>(layout, tile, c, [&](const Strip& strip) {
    for_each_run(layout, strip, [&](int64_t begin, int64_t end) {
      gemm<false, true>(o + strip.first * w.dim, w.dim, s + strip.first * w.width + c.text_padded + begin, w.width,
                        image + begin * w.dim, kLanes, w.dim, strip.count, w.dim, end - begin);
    });
  });
}

DF_INLINE void scores(float* s, const float* q, const float* kt, const Workspace& w, const Layout& layout,
                      const Tile& tile, const Columns& c, int64_t head_dim) {
  const int64_t vec = w.dim * kLanes;
  gemm<false, false>(s, w.width, q, w.dim, kt, vec, kLanes, tile.count, c.text_padded, head_dim);
  for_each_strip<kScoreRows>(layout, tile, c, [&](const Strip& strip) {
    gemm<false, false>(s + strip.first * w.width + c.text_padded + strip.begin, w.width, q + strip.first * w.dim, w.dim,
                       kt + (layout.image_base + c.begin + strip.begin) * w.dim, vec, kLanes, strip.count, strip.padded,
                       head_dim);
  });
}

// f(column, lanes that row r may see, whether that is all of them) over text and the image columns [begin, end)
template <typename F>
DF_INLINE void for_each_vector(const Columns& c, const BiasTable& bias, const Tile& tile, int64_t r, int64_t begin,
                               int64_t end, F&& f) {
  const int64_t text = tile.text ? tile.local + r + 1 : c.text;
  const VecI lanes = lane_index();
  int64_t i = 0;
  for (; i + kLanes <= text; i += kLanes) f(i, VecI{}, std::true_type());
  for (; i < c.text_padded; i += kLanes)
    f(i, (VecI)(lanes < splat_i(static_cast<int32_t>(text - i))), std::false_type());
  if (begin == end) return;
  const float* table = bias.of(tile.local + r, c.begin);
  const int64_t skip = c.skip + tile.skipped(r);
  for (i = begin; i < end; i += kLanes) {
    VecI seen = loadu(table + i) == VecF{};
    if (i < skip) seen &= lanes >= splat_i(static_cast<int32_t>(skip - i));
    if (i + kLanes > c.image) seen &= lanes < splat_i(static_cast<int32_t>(c.image - i));
    f(c.text_padded + i, seen, std::false_type());
  }
}

// ---- forward

template <typename T>
void forward_tile(const Params& p, const Layout& layout, const Workspace& w, const BiasTable& bias, const Tile& tile,
                  int64_t b, int64_t h) {
  const Columns c(layout, tile, kLanes, kLanes);
  for (int64_t r = 0; r < tile.count; ++r)
    load_row(w.q + r * w.dim, row_of<T>(p.q, b, h, tile.position(r)), p.head_dim, w.dim, p.scale * kLog2e);
  scores(w.s, w.q, w.kt, w, layout, tile, c, p.head_dim);
  float shifts[kTile], sums[kTile] = {};  // to whole vectors
  const auto softmax = [&](int64_t r, int64_t begin, int64_t end) {
    float* row = w.s + r * w.width;
    VecF best[2] = {splat(kMinusInf), splat(kMinusInf)};  // two chains: one would wait for its own maxima
    for_each_vector(c, bias, tile, r, begin, end, [&](int64_t i, VecI seen, auto all) {
      const VecF x = loadu(row + i);
      VecF& to = best[i / kLanes % 2];
      to = vmax(all ? x : select(seen, x, to), to);
    });
    const float shift = hmax(vmax(best[0], best[1]));
    VecF sum[2] = {};
    for_each_vector(c, bias, tile, r, begin, end, [&](int64_t i, VecI seen, auto all) {
      const VecF e = exp2_fast(loadu(row + i) - splat(shift));
      const VecF x = all ? e : select(seen, e, VecF{});
      storeu(row + i, x);
      sum[i / kLanes % 2] += x;
    });
    shifts[r] = shift;
    sums[r] = hsum(sum[0] + sum[1]);
  };
  for (int64_t r = 0; !c.image && r < tile.count; ++r) softmax(r, 0, 0);
  for_each_strip<kScoreRows>(layout, tile, c, [&](const Strip& strip) {
    for (int64_t r = strip.first; r < strip.first + strip.count; ++r)
      softmax(r, strip.begin, strip.begin + strip.padded);
  });
  accumulate(w.o, w.s, w.v, w, layout, tile, c);
  float inverse[kTile], lse[kTile];
  for (int64_t r = 0; r < tile.count; r += kLanes) {
    const VecF sum = loadu(sums + r);
    storeu(inverse + r, splat(1.0f) / sum);
    storeu(lse + r, loadu(shifts + r) * splat(kLn2) + log(sum));
  }
  for (int64_t r = 0; r < tile.count; ++r) p.lse[(b * p.num_heads + h) * p.length + tile.position(r)] = lse[r];
  for (int64_t r = 0; r < tile.count; ++r)
    store_row(const_cast<T*>(row_of<T>(p.out, b, h, tile.position(r))), w.o + r * w.dim, p.head_dim, inverse[r]);
}

template <typename T>
void run_forward(const Params& p) {
  const Layout layout(p, kLanes);
  const BiasTable bias(layout);
  const int64_t group = p.num_heads / p.num_kv_heads;
  parallel_for(p.batch * p.num_kv_heads, [&](int64_t task) {
    const int64_t b = task / p.num_kv_heads, kv = task % p.num_kv_heads;
    const Workspace w = carve(p, layout, false);
    pack_rows<T>(w.v, w, layout, p.k, b, kv, p.head_dim);
    pack_transposed(w.kt, w.v, w);
    pack_rows<T>(w.v, w, layout, p.v, b, kv, p.head_dim);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for_each_tile(layout, [&](const Tile& tile) { forward_tile<T>(p, layout, w, bias, tile, b, h); });
  });
}

// ---- backward

template <typename T>
void backward_tile(const Params& p, const Layout& layout, const Workspace& w, const BiasTable& bias, const Tile& tile,
                   int64_t b, int64_t h) {
  const Columns c(layout, tile, kLanes, kLanes);
  float delta[kTile];
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t l = tile.position(r);
    load_row(w.q + r * w.dim, row_of<T>(p.q, b, h, l), p.head_dim, w.dim, p.scale * kLog2e);
    load_row(w.o + r * w.dim, row_of<T>(p.out, b, h, l), p.head_dim, w.dim);
    load_row(w.dout + r * w.dim, row_of<T>(p.dout, b, h, l), p.head_dim, w.dim);
    VecF sum = {};
    for (int64_t d = 0; d < w.dim; d += kLanes) sum += loadu(w.o + r * w.dim + d) * loadu(w.dout + r * w.dim + d);
    delta[r] = hsum(sum);
  }
  scores(w.s, w.q, w.kt, w, layout, tile, c, p.head_dim);
  scores(w.dp, w.dout, w.vt, w, layout, tile, c, p.head_dim);
  for (int64_t r = 0; r < tile.count; ++r) {
    float* s = w.s + r * w.width;
    float* dp = w.dp + r * w.width;
    const VecF lse = splat(p.lse[(b * p.num_heads + h) * p.length + tile.position(r)] * kLog2e);
    for_each_vector(c, bias, tile, r, 0, c.image_padded, [&](int64_t i, VecI seen, auto all) {
      const VecF e = exp2_fast(loadu(s + i) - lse);
      const VecF ds = e * (loadu(dp + i) - splat(delta[r]));
      storeu(s + i, all ? e : select(seen, e, VecF{}));
      storeu(dp + i, all ? ds : select(seen, ds, VecF{}));
    });
  }
  accumulate(w.o, w.dp, w.k, w, layout, tile, c);
  gemm<true, true>(w.dv, w.dim, w.s, w.width, w.dout, kLanes, w.dim, c.text, w.dim, tile.count);
  gemm<true, true>(w.dk, w.dim, w.dp, w.width, w.q, kLanes, w.dim, c.text, w.dim, tile.count);
  if (c.image) {
    const int64_t at = c.text_padded + c.skip, keys = c.image - c.skip;
    const int64_t row = (layout.image_base + c.begin + c.skip) * w.dim;
    gemm<true, true>(w.dv + row, w.dim, w.s + at, w.width, w.dout, kLanes, w.dim, keys, w.dim, tile.count);
    gemm<true, true>(w.dk + row, w.dim, w.dp + at, w.width, w.q, kLanes, w.dim, keys, w.dim, tile.count);
  }
  for (int64_t r = 0; r < tile.count; ++r)
    store_row(const_cast<T*>(row_of<T>(p.dq, b, h, tile.position(r))), w.o + r * w.dim, p.head_dim, p.scale);
}

template <typename T>
void run_backward(const Params& p) {
  const Layout layout(p, kLanes);
  const BiasTable bias(layout);
  const int64_t group = p.num_heads / p.num_kv_heads;
  parallel_for(p.batch * p.num_kv_heads, [&](int64_t task) {
    const int64_t b = task / p.num_kv_heads, kv = task % p.num_kv_heads;
    const Workspace w = carve(p, layout, true);
    pack_rows<T>(w.k, w, layout, p.k, b, kv, p.head_dim);
    pack_transposed(w.kt, w.k, w);
    pack_rows<T>(w.v, w, layout, p.v, b, kv, p.head_dim);
    pack_transposed(w.vt, w.v, w);
    zero(w.dk, w.columns * w.dim);
    zero(w.dv, w.columns * w.dim);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for_each_tile(layout, [&](const Tile& tile) { backward_tile<T>(p, layout, w, bias, tile, b, h); });
    for_each_position(layout, [&](int64_t position, int64_t slot) {  // q was scaled, and dk with it
      store_row(const_cast<T*>(row_of<T>(p.dk, b, kv, position)), w.dk + slot * w.dim, p.head_dim, kLn2);
      store_row(const_cast<T*>(row_of<T>(p.dv, b, kv, position)), w.dv + slot * w.dim, p.head_dim);
    });
  });
}

}  // namespace

void forward(const Params& p) {
  switch (p.dtype) {
    case DType::kBFloat16: return run_forward<bf16>(p);
    case DType::kFloat16: return run_forward<fp16>(p);
    default: return run_forward<float>(p);
  }
}

void backward(const Params& p) {
  switch (p.dtype) {
    case DType::kBFloat16: return run_backward<bf16>(p);
    case DType::kFloat16: return run_backward<fp16>(p);
    default: return run_backward<float>(p);
  }
}

void mask(const MaskParams& p) {
  for (int64_t q = 0; q < p.length; ++q)
    for (int64_t k = 0; k < p.length; ++k) p.mask[q * p.length + k] = may_attend(p.pattern, q, k);
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::sparse_attention
