// SPDX-License-Identifier: MIT
// Where the new token is, and in which slots lie the image keys it sees: arithmetic on its position, in the kernel.
#pragma once

#include "../core/device_math.cuh"
#include "decode_attention.h"

namespace dalle_fast::decode_attention {

constexpr int64_t kMostPositions = int64_t{1} << 28;  // so that products of sizes fit an int

struct Token {
  bool text;
  int position, num_text;  // text keys before it
  int raster, column, slot, count;
};

// The image keys before a token that its pattern may let it see, nearest first.
struct Window {
  PatternKind kind;
  bool wraparound;
  int text_len, width, ring, extent, half, reach, columns;
  Divisor by_columns;

  explicit Window(const Params& p) : kind(p.pattern.kind), wraparound(p.pattern.wraparound) {
    const auto least = [](int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); };
    const int64_t height = p.pattern.height, side = height > p.pattern.width ? height : p.pattern.width;
    const int64_t image = p.pattern.image_len();
    text_len = static_cast<int>(p.pattern.text_len);
    width = static_cast<int>(p.pattern.width);
    ring = least(p.ring_len, kMostPositions);
    extent = least(p.pattern.extent, image);
    half = least(p.pattern.kernel / 2, side);
    reach = wraparound ? half : least(half, width - 1);
    columns = wraparound ? least(2 * reach + 1, width) : 2 * reach + 1;  // rows of a wide window overlap
    by_columns = Divisor(static_cast<uint32_t>(columns));
  }
  __device__ __forceinline__ Token token(int position) const {
    Token t{position < text_len, position, position < text_len ? position : text_len, 0, 0, 0, 0};
    if (t.text) return t;
    t.raster = position - text_len;
    t.column = t.raster % width;
    t.slot = t.raster % ring;
    t.count = t.raster;
    if (kind == PatternKind::kRow) t.count = t.raster < extent - 1 ? t.raster : extent - 1;
    if (kind == PatternKind::kColumn) t.count = t.raster / width;
    if (kind == PatternKind::kConv) {
      const int above = (t.raster + reach) / width;
      t.count = reach + (half < above ? half : above) * columns;
    }
    return t;
  }
  // the slot of key i, or -1
  __device__ __forceinline__ int slot(const Token& t, int i) const {
    if (i >= t.count) return -1;
    int back = i + 1;
    if (kind == PatternKind::kColumn) back *= width;
    if (kind == PatternKind::kConv) {
      int left = back;  // columns to the left of the token
      if (i >= reach) {
        const int row = by_columns.divide(i - reach);
        left = i - row * columns + 1 - columns;
        back = (row + 1) * width + left;
      }
      const int column = t.column - left;
      if (back > t.raster || (!wraparound && (column < 0 || column >= width))) return -1;
    }
    const int at = t.slot - back;
    return at < 0 ? at + ring : at;
  }
};

}  // namespace dalle_fast::decode_attention
