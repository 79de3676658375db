// SPDX-License-Identifier: MIT
// Tiles of queries against the keys they may see: all text, and one contiguous range of image keys. For the column
// pattern the image is packed column by column, so that its range is contiguous too; no tensor is transposed outside of
// the packed copy. Inside a tile, S = Q K^T and O = P V are one micro-kernel (rows x vectors of accumulators), and what
// a query may not see is masked by a table over (key - query), so no index arithmetic runs per pair.
//
// One task is a (batch, key-value head): it packs keys and values once in float32 and serves all heads of its group.
// The backward pass recomputes P from the log-sum-exp and adds up dk and dv tile by tile in a fixed order.
#include "sparse_attention.h"

#include "../core/parallel.h"
#include "../core/simd.h"
#include "tiles.h"

namespace dalle_fast::sparse_attention {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int kRows = 4;                     // of the micro-kernel
constexpr int kVecs = kLanes == 16 ? 4 : 2;  // 16 or 8 accumulators
constexpr int64_t kPanel = kVecs * kLanes;

// ---- C[M, N] (+)= A[M, K] B[K, N]; B and C rows are dense; N counts whole vectors, the memory behind is there

template <int R, int V, bool kAdd>
DF_INLINE void micro(float* c, int64_t ldc, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb,
                     int64_t depth) {
  VecF acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = kAdd ? loadu(c + r * ldc + v * kLanes) : VecF{};
  for (int64_t k = 0; k < depth; ++k) {
    VecF row[V];
    for (int v = 0; v < V; ++v) row[v] = loadu(b + k * ldb + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const VecF x = splat(a[r * a_row + k * a_k]);
      for (int v = 0; v < V; ++v) acc[r][v] += x * row[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) storeu(c + r * ldc + v * kLanes, acc[r][v]);
}

template <int V, bool kAdd>
DF_INLINE void micro_rows(float* c, int64_t ldc, const float* a, int64_t a_row, int64_t a_k, const float* b,
                          int64_t ldb, int64_t rows, int64_t depth) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    micro<kRows, V, kAdd>(c + r * ldc, ldc, a + r * a_row, a_row, a_k, b, ldb, depth);
  for (; r < rows; ++r) micro<1, V, kAdd>(c + r * ldc, ldc, a + r * a_row, a_row, a_k, b, ldb, depth);
}

template <bool kAdd>
void gemm(float* c, int64_t ldc, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb, int64_t rows,
          int64_t columns, int64_t depth) {
  int64_t n = 0;
  for (; n + kPanel <= columns; n += kPanel)
    micro_rows<kVecs, kAdd>(c + n, ldc, a, a_row, a_k, b + n, ldb, rows, depth);
  for (; n < columns; n += kLanes) micro_rows<1, kAdd>(c + n, ldc, a, a_row, a_k, b + n, ldb, rows, depth);
}

// ---- memory of a task

struct Workspace {
  float* kt;  // [D, columns]: keys transposed
  float* v;   // [columns, Dp]
  float* k;   // [columns, Dp], backward
  float* vt;  // [D, columns], backward
  float *dk, *dv;
  float *q, *o, *dout;  // [tile, Dp]
  float *s, *dp;        // [tile, width]
  float* bias;
  int64_t columns, dim, width;
};

DF_INLINE Workspace carve(const Params& p, const Layout& layout, bool backward) {
  static thread_local ThreadScratch scratch;
  Workspace w;
  w.dim = round_up(p.head_dim, kLanes);
  w.columns = round_up(layout.slots, kLanes) + kPanel;
  w.width = round_up(layout.num_text, kLanes) + round_up(layout.slots - layout.image_base, kLanes) + kPanel;
  const int64_t sheet = w.columns * w.dim, strip = kTile * w.dim, scores = kTile * w.width;
  const int64_t table = BiasTable::size(p.pattern, layout.num_image);
  float* at = scratch.floats((backward ? 6 : 2) * sheet + 3 * strip + 2 * scores + table + 64);
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
  w.bias = take(table);
  return w;
}

DF_INLINE void zero(float* to, int64_t n) { __builtin_memset(to, 0, static_cast<std::size_t>(n) * sizeof(float)); }

template <typename T>
void pack_rows(float* rows, const Workspace& w, const Layout& layout, const Tensor4& t, int64_t b, int64_t h,
               int64_t head_dim) {
  zero(rows, w.columns * w.dim);
  for_each_position(layout, [&](int64_t position, int64_t slot) {
    load_row(rows + slot * w.dim, row_of<T>(t, b, h, position), head_dim, w.dim);
  });
}

// [columns, Dp] -> [D, columns]
void transpose(float* to, const float* rows, const Workspace& w, int64_t head_dim) {
  for (int64_t c0 = 0; c0 < w.columns; c0 += kLanes)
    for (int64_t d = 0; d < head_dim; ++d) {
      float lane[kLanes];
      for (int i = 0; i < kLanes; ++i) lane[i] = rows[(c0 + i) * w.dim + d];
      storeu(to + d * w.columns + c0, loadu(lane));
    }
}

// Scores of a tile into s: text columns [0, text), then image columns from `image_at`. Masked, the gaps -Inf.
struct Extent {
  int64_t text, text_padded, image, image_padded;
  int64_t width() const { return text_padded + image_padded; }
};

DF_INLINE Extent extent_of(const Layout& layout, const Tile& tile) {
  Extent e;
  e.text = tile.text ? tile.key_end : layout.num_text;
  e.text_padded = round_up(e.text, kLanes);
  e.image = tile.text ? 0 : tile.key_end - tile.key_begin;
  e.image_padded = round_up(e.image, kLanes);
  return e;
}

DF_INLINE void scores(float* s, const float* q, const float* kt, const Workspace& w, const Layout& layout,
                      const Tile& tile, const Extent& e, int64_t head_dim) {
  gemm<false>(s, w.width, q, w.dim, 1, kt, w.columns, tile.count, e.text, head_dim);
  gemm<false>(s + e.text_padded, w.width, q, w.dim, 1, kt + layout.image_base + tile.key_begin, w.columns, tile.count,
              e.image, head_dim);
}

DF_INLINE void mask_scores(float* s, const Workspace& w, const BiasTable& bias, const Tile& tile, const Extent& e) {
  for (int64_t r = 0; r < tile.count; ++r) {
    float* row = s + r * w.width;
    const int64_t text = tile.text ? tile.local + r + 1 : e.text;
    for (int64_t c = text; c < e.text_padded; ++c) row[c] = kMinusInf;
    if (!e.image) continue;
    float* image = row + e.text_padded;
    const float* table = bias.of(tile.local + r, tile.key_begin);
    for (int64_t c = 0; c + kLanes <= e.image; c += kLanes) {
      const VecF allowed = loadu(table + c);
      storeu(image + c, allowed < splat(0.0f) ? allowed : loadu(image + c));
    }
    for (int64_t c = e.image / kLanes * kLanes; c < e.image_padded; ++c)
      if (c >= e.image || table[c] < 0.0f) image[c] = kMinusInf;
  }
}

// ---- forward

template <typename T>
void forward_tile(const Params& p, const Layout& layout, const Workspace& w, const BiasTable& bias, const Tile& tile,
                  int64_t b, int64_t h) {
  const Extent e = extent_of(layout, tile);
  for (int64_t r = 0; r < tile.count; ++r)
    load_row(w.q + r * w.dim, row_of<T>(p.q, b, h, tile.first + r * tile.step), p.head_dim, w.dim, p.scale);
  scores(w.s, w.q, w.kt, w, layout, tile, e, p.head_dim);
  mask_scores(w.s, w, bias, tile, e);
  float inverse[kTile];
  for (int64_t r = 0; r < tile.count; ++r) {
    float* row = w.s + r * w.width;
    VecF best = splat(kMinusInf);
    for (int64_t c = 0; c < e.width(); c += kLanes) best = vmax(loadu(row + c), best);
    const float shift = hmax(best);
    VecF sum = {};
    for (int64_t c = 0; c < e.width(); c += kLanes) {
      const VecF x = exp(loadu(row + c) - splat(shift));
      storeu(row + c, x);
      sum += x;
    }
    const float total = hsum(sum);
    inverse[r] = 1.0f / total;
    p.lse[(b * p.num_heads + h) * p.length + tile.first + r * tile.step] = shift + log(splat(total))[0];
  }
  gemm<false>(w.o, w.dim, w.s, w.width, 1, w.v, w.dim, tile.count, w.dim, e.text);
  if (e.image)
    gemm<true>(w.o, w.dim, w.s + e.text_padded, w.width, 1, w.v + (layout.image_base + tile.key_begin) * w.dim, w.dim,
               tile.count, w.dim, e.image);
  for (int64_t r = 0; r < tile.count; ++r)
    store_row(const_cast<T*>(row_of<T>(p.out, b, h, tile.first + r * tile.step)), w.o + r * w.dim, p.head_dim,
              inverse[r]);
}

template <typename T>
void run_forward(const Params& p) {
  const Layout layout(p, kLanes);
  const int64_t group = p.num_heads / p.num_kv_heads;
  parallel_for(p.batch * p.num_kv_heads, [&](int64_t task) {
    const int64_t b = task / p.num_kv_heads, kv = task % p.num_kv_heads;
    const Workspace w = carve(p, layout, false);
    const BiasTable bias(w.bias, layout);
    pack_rows<T>(w.v, w, layout, p.k, b, kv, p.head_dim);
    transpose(w.kt, w.v, w, p.head_dim);
    pack_rows<T>(w.v, w, layout, p.v, b, kv, p.head_dim);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for_each_tile(layout, [&](const Tile& tile) { forward_tile<T>(p, layout, w, bias, tile, b, h); });
  });
}

// ---- backward

template <typename T>
void backward_tile(const Params& p, const Layout& layout, const Workspace& w, const BiasTable& bias, const Tile& tile,
                   int64_t b, int64_t h) {
  const Extent e = extent_of(layout, tile);
  float delta[kTile];
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t l = tile.first + r * tile.step;
    load_row(w.q + r * w.dim, row_of<T>(p.q, b, h, l), p.head_dim, w.dim, p.scale);
    load_row(w.o + r * w.dim, row_of<T>(p.out, b, h, l), p.head_dim, w.dim);
    load_row(w.dout + r * w.dim, row_of<T>(p.dout, b, h, l), p.head_dim, w.dim);
    VecF sum = {};
    for (int64_t d = 0; d < w.dim; d += kLanes) sum += loadu(w.o + r * w.dim + d) * loadu(w.dout + r * w.dim + d);
    delta[r] = hsum(sum);
  }
  scores(w.s, w.q, w.kt, w, layout, tile, e, p.head_dim);
  mask_scores(w.s, w, bias, tile, e);
  scores(w.dp, w.dout, w.vt, w, layout, tile, e, p.head_dim);
  for (int64_t r = 0; r < tile.count; ++r) {
    float* s = w.s + r * w.width;
    float* dp = w.dp + r * w.width;
    const VecF lse = splat(p.lse[(b * p.num_heads + h) * p.length + tile.first + r * tile.step]);
    for (int64_t c = 0; c < e.width(); c += kLanes) {
      const VecF probability = exp(loadu(s + c) - lse);
      const VecF ds = probability * (loadu(dp + c) - splat(delta[r]));
      storeu(s + c, probability);
      storeu(dp + c, probability == splat(0.0f) ? splat(0.0f) : ds);  // the gaps of dp hold anything
    }
  }
  const int64_t image = (layout.image_base + tile.key_begin) * w.dim;
  gemm<false>(w.o, w.dim, w.dp, w.width, 1, w.k, w.dim, tile.count, w.dim, e.text);
  gemm<true>(w.dv, w.dim, w.s, 1, w.width, w.dout, w.dim, e.text, w.dim, tile.count);
  gemm<true>(w.dk, w.dim, w.dp, 1, w.width, w.q, w.dim, e.text, w.dim, tile.count);
  if (e.image) {
    const int64_t at = e.text_padded;
    gemm<true>(w.o, w.dim, w.dp + at, w.width, 1, w.k + image, w.dim, tile.count, w.dim, e.image);
    gemm<true>(w.dv + image, w.dim, w.s + at, 1, w.width, w.dout, w.dim, e.image, w.dim, tile.count);
    gemm<true>(w.dk + image, w.dim, w.dp + at, 1, w.width, w.q, w.dim, e.image, w.dim, tile.count);
  }
  for (int64_t r = 0; r < tile.count; ++r)
    store_row(const_cast<T*>(row_of<T>(p.dq, b, h, tile.first + r * tile.step)), w.o + r * w.dim, p.head_dim, p.scale);
}

template <typename T>
void run_backward(const Params& p) {
  const Layout layout(p, kLanes);
  const int64_t group = p.num_heads / p.num_kv_heads;
  parallel_for(p.batch * p.num_kv_heads, [&](int64_t task) {
    const int64_t b = task / p.num_kv_heads, kv = task % p.num_kv_heads;
    const Workspace w = carve(p, layout, true);
    const BiasTable bias(w.bias, layout);
    pack_rows<T>(w.k, w, layout, p.k, b, kv, p.head_dim);
    transpose(w.kt, w.k, w, p.head_dim);
    pack_rows<T>(w.v, w, layout, p.v, b, kv, p.head_dim);
    transpose(w.vt, w.v, w, p.head_dim);
    zero(w.dk, w.columns * w.dim);
    zero(w.dv, w.columns * w.dim);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for_each_tile(layout, [&](const Tile& tile) { backward_tile<T>(p, layout, w, bias, tile, b, h); });
    for_each_position(layout, [&](int64_t position, int64_t slot) {  // q was scaled, and dk with it
      store_row(const_cast<T*>(row_of<T>(p.dk, b, kv, position)), w.dk + slot * w.dim, p.head_dim);
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
