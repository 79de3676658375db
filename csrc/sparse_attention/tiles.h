// SPDX-License-Identifier: MIT
// Which keys a tile of queries meets, for the CPU kernels: all text, and one contiguous range of image keys. For the
// column pattern the image is packed column by column, so that its range is contiguous too.
#pragma once

#include "../core/parallel.h"
#include "../core/simd.h"
#include "sparse_attention.h"

namespace dalle_fast::sparse_attention {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

constexpr int64_t kTile = 32;  // queries of a tile
const float kMinusInf = -__builtin_inff();

// Image positions in packed order. Column pattern: column by column, `height` slots each; a prefix leaves some empty.
struct Layout {
  const Pattern* pattern;
  int64_t num_text;    // text positions that exist
  int64_t num_image;   // image positions that exist, the first in raster order
  int64_t image_base;  // packed index of the first image slot
  int64_t slots;       // packed slots in all
  bool by_column;

  // the image starts on a multiple of `align`
  Layout(const Params& p, int64_t align) : pattern(&p.pattern) {
    num_text = p.length < p.pattern.text_len ? p.length : p.pattern.text_len;
    num_image = p.length - num_text;
    by_column = p.pattern.kind == PatternKind::kColumn;
    image_base = round_up(num_text, align);
    slots = image_base + (by_column && num_image ? p.pattern.image_len() : num_image);
  }
  int64_t packed(int64_t image) const {
    if (!by_column) return image_base + image;
    return image_base + image % pattern->width * pattern->height + image / pattern->width;
  }
  int64_t column_len(int64_t column) const {
    return num_image > column ? (num_image - column - 1) / pattern->width + 1 : 0;
  }
};

// A tile: queries first, first + step, ... of the stream, and the image keys [key_begin, key_end) in packed order
// relative to image_base; `local` is the packed index of its first query, likewise relative. After `run` queries comes
// the next column: a tile of short columns has several, and a query sees none of those before its own.
struct Tile {
  int64_t first, step, count;
  bool text;
  int64_t local, key_begin, key_end;
  int64_t run = kTile;

  int64_t position(int64_t r) const { return first + r % run * step + r / run; }
  int64_t skipped(int64_t r) const { return r / run * run; }  // keys of other columns
};

template <typename F>
DF_INLINE void for_each_tile(const Layout& layout, F&& f) {
  const Pattern& pattern = *layout.pattern;
  for (int64_t q = 0; q < layout.num_text; q += kTile) {
    const int64_t count = layout.num_text - q < kTile ? layout.num_text - q : kTile;
    f(Tile{q, 1, count, true, q, 0, q + count});
  }
  if (layout.by_column) {
    const int64_t height = pattern.height, together = kTile / height;
    if (together > 1 && layout.num_image == pattern.image_len()) {
      for (int64_t column = 0; column < pattern.width; column += together) {
        const int64_t columns = pattern.width - column < together ? pattern.width - column : together;
        const int64_t local = column * height, count = columns * height;
        f(Tile{pattern.text_len + column, pattern.width, count, false, local, local, local + count, height});
      }
      return;
    }
    for (int64_t column = 0; column < pattern.width; ++column) {
      const int64_t length = layout.column_len(column), base = column * pattern.height;
      for (int64_t r = 0; r < length; r += kTile) {
        const int64_t count = length - r < kTile ? length - r : kTile;
        f(Tile{pattern.text_len + r * pattern.width + column, pattern.width, count, false, base + r, base,
               base + r + count});
      }
    }
    return;
  }
  for (int64_t q = 0; q < layout.num_image; q += kTile) {
    const int64_t count = layout.num_image - q < kTile ? layout.num_image - q : kTile;
    f(Tile{pattern.text_len + q, 1, count, false, q, first_image_key(pattern, q), q + count});
  }
}

// Score columns of a tile: all text, then image keys from `begin`, a multiple of `align`; each part padded to `block`.
struct Columns {
  int64_t text, text_padded;
  int64_t begin, skip, image, image_padded;  // the first `skip` of `image` belong to nobody here
  int64_t width() const { return text_padded + image_padded; }

  Columns(const Layout& layout, const Tile& tile, int64_t align, int64_t block) {
    text = tile.text ? tile.key_end : layout.num_text;
    text_padded = round_up(text, block);
    begin = tile.text ? 0 : tile.key_begin / align * align;
    skip = tile.text ? 0 : tile.key_begin - begin;
    image = tile.text ? 0 : tile.key_end - begin;
    image_padded = round_up(image, block);
  }
};

// allowed[phase][key - query + shift] in packed order: 0 or -Inf. Only a conv window that respects row ends needs a
// phase per column of the query. Built once a call, by the calling thread, in that thread's scratch.
struct BiasTable {
  float* data;
  int64_t shift, row, phases;

  static int64_t phases_of(const Pattern& p) { return p.kind == PatternKind::kConv && !p.wraparound ? p.width : 1; }
  static int64_t row_of(int64_t n) { return 2 * n + 6 * kTile; }  // a range is read in whole blocks

  explicit BiasTable(const Layout& layout)
      : shift(layout.num_image + kTile), row(row_of(layout.num_image)), phases(phases_of(*layout.pattern)) {
    static thread_local ThreadScratch scratch;
    const Pattern& p = *layout.pattern;
    data = scratch.floats(phases * row);
    for (int64_t phase = 0; phase < phases; ++phase) {
      float* table = data + phase * row;
      for (int64_t i = 0; i < row; ++i) table[i] = kMinusInf;
      for (int64_t back = 0; back <= layout.num_image; ++back) {
        bool yes = true;  // column: the tile's range stays in its column
        if (p.kind == PatternKind::kRow) yes = back < p.extent;
        if (p.kind == PatternKind::kConv) yes = conv_allows(p, phase, back);
        if (yes) table[shift - back] = 0.0f;
      }
    }
  }
  // a query of column `phase`, far enough down, and the key `back` before it
  static bool conv_allows(const Pattern& p, int64_t phase, int64_t back) {
    const int64_t q = p.width * (back / p.width + 2) + phase;
    return image_may_attend(p, q, q - back);
  }
  const float* of(int64_t query, int64_t key_begin) const {
    const int64_t phase = phases == 1 ? 0 : query % phases;
    return data + phase * row + (key_begin - query + shift);
  }
};

template <typename T>
DF_INLINE const T* row_of(const Tensor4& t, int64_t b, int64_t h, int64_t l) {
  return static_cast<const T*>(t.data) + b * t.stride_b + h * t.stride_h + l * t.stride_l;
}

template <typename T>
DF_INLINE void load_row(float* to, const T* from, int64_t n, int64_t padded, float factor = 1.0f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) storeu(to + i, loadu(from + i) * splat(factor));
  if (i < n) {
    storeu(to + i, load_n(from + i, static_cast<int>(n - i)) * splat(factor));
    i += kLanes;
  }
  for (; i < padded; i += kLanes) storeu(to + i, VecF{});
}

template <typename T>
DF_INLINE void store_row(T* to, const float* from, int64_t n, float factor = 1.0f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) storeu(to + i, loadu(from + i) * splat(factor));
  if (i < n) store_n(to + i, loadu(from + i) * splat(factor), static_cast<int>(n - i));
}

// f(stream position, packed slot) of every position
template <typename F>
DF_INLINE void for_each_position(const Layout& layout, F&& f) {
  for (int64_t l = 0; l < layout.num_text; ++l) f(l, l);
  for (int64_t i = 0; i < layout.num_image; ++i) f(layout.pattern->text_len + i, layout.packed(i));
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::sparse_attention
