// SPDX-License-Identifier: MIT
// The order in which the CUDA kernels walk over positions: text indices 0 ... num_text - 1, then image slots, in which
// what a pattern lets a query see is one range (column by column for the column pattern): an index mapping, no tensor
// is moved. Of all patterns only conv has holes in its ranges.
#pragma once

#include "../core/device_math.cuh"
#include "sparse_attention.h"

namespace dalle_fast::sparse_attention {

struct Walk {
  PatternKind kind;
  bool wraparound;
  int text_len, num_text, num_image, slots, height, width;
  int half;   // conv: of the window's side
  int reach;  // from a slot to the first one that it may look at; column ends at the column's first
  Divisor by_height, by_width;

  Walk(const Pattern& p, int64_t length) : kind(p.kind), wraparound(p.wraparound) {
    const int64_t image = p.image_len(), side = p.height > p.width ? p.height : p.width;
    text_len = static_cast<int>(p.text_len);
    num_text = static_cast<int>(length < p.text_len ? length : p.text_len);
    num_image = static_cast<int>(length - num_text);
    slots = num_image && kind == PatternKind::kColumn ? static_cast<int>(image) : num_image;
    height = static_cast<int>(p.height);
    width = static_cast<int>(p.width);
    half = static_cast<int>(p.kernel / 2 < side ? p.kernel / 2 : side);
    int64_t back = image;
    if (kind == PatternKind::kRow) back = p.extent - 1;
    if (kind == PatternKind::kConv) back = half * (p.width + 1);
    reach = static_cast<int>(back < image ? back : image);
    by_height = Divisor(static_cast<uint32_t>(height));
    by_width = Divisor(static_cast<uint32_t>(width));
  }
  // raster index of an image slot; at least num_image where a prefix has none
  __device__ __forceinline__ int raster(int slot) const {
    if (kind != PatternKind::kColumn) return slot;
    const int column = by_height.divide(slot);
    return (slot - column * height) * width + column;
  }
  // the first slot that `slot` (and those behind it) may look at
  __device__ __forceinline__ int first_key(int slot) const {
    if (kind == PatternKind::kColumn) return by_height.divide(slot) * height;
    return slot > reach ? slot - reach : 0;
  }
  // one behind the last slot that may look at `slot` (or at those before it)
  __device__ __forceinline__ int end_query(int slot) const {
    const int end = kind == PatternKind::kColumn ? (by_height.divide(slot) + 1) * height : slot + reach + 1;
    return end < slots ? end : slots;
  }
  // position in the stream of a text index or an image slot, or -1
  __device__ __forceinline__ int position(bool image, int i) const {
    if (!image) return i < num_text ? i : -1;
    if (i >= slots) return -1;
    const int r = raster(i);
    return r < num_image ? text_len + r : -1;
  }
  __host__ __device__ int text_blocks(int rows) const { return (num_text + rows - 1) / rows; }
  __host__ __device__ int blocks(int rows) const { return text_blocks(rows) + (slots + rows - 1) / rows; }
};

// Rows of a block or a tile: `begin` counts text indices or image slots.
struct Rows {
  bool image;
  int begin;
};
__device__ __forceinline__ Rows rows_of(const Walk& walk, int block, int rows) {
  const int text = walk.text_blocks(rows);
  return block < text ? Rows{false, block * rows} : Rows{true, (block - text) * rows};
}

// A list of tiles: text from `text_begin`, then image from `image_begin`.
struct Tiles {
  int text_begin, text_tiles, image_begin, count, size;

  __device__ __forceinline__ Tiles(int first_text, int end_text, int first_image, int end_image, int size_)
      : text_begin(first_text), image_begin(first_image), size(size_) {
    text_tiles = end_text > first_text ? (end_text - first_text + size - 1) / size : 0;
    count = text_tiles + (end_image > first_image ? (end_image - first_image + size - 1) / size : 0);
  }
  __device__ __forceinline__ Rows operator[](int i) const {
    return i < text_tiles ? Rows{false, text_begin + i * size} : Rows{true, image_begin + (i - text_tiles) * size};
  }
};

// What the queries [begin, begin + count) may see any of, and who may see any of the keys [begin, begin + count).
__device__ __forceinline__ Tiles key_tiles(const Walk& walk, const Rows& rows, int count, int size) {
  const int last = rows.begin + count;
  if (!rows.image) return Tiles(0, last < walk.num_text ? last : walk.num_text, 0, 0, size);
  return Tiles(0, walk.num_text, walk.first_key(rows.begin), last < walk.slots ? last : walk.slots, size);
}
__device__ __forceinline__ Tiles query_tiles(const Walk& walk, const Rows& rows, int count, int size) {
  if (!rows.image) return Tiles(rows.begin, walk.num_text, 0, walk.slots, size);
  const int last = rows.begin + count < walk.slots ? rows.begin + count - 1 : walk.slots - 1;
  return Tiles(rows.begin, 0, rows.begin, walk.end_query(last), size);
}

// Bits low ... high of sixteen; any integers.
__device__ __forceinline__ uint32_t bits_between(int low, int high) {
  low = low > 0 ? low : 0;
  high = high < 15 ? high : 15;
  return low <= high ? 0xffffu >> (15 - high) >> low << low : 0;
}

struct Range {
  int low, high;
};

// Which columns of a tile the rows of a block meet: queries see keys, or keys are seen by queries.
template <bool kRowsAreQueries>
struct Sight {
  const Walk& walk;
  bool rows_image, columns_image;

  __device__ __forceinline__ int num_rows() const { return rows_image ? walk.slots : walk.num_text; }
  __device__ __forceinline__ bool has_holes() const {
    return walk.kind == PatternKind::kConv && rows_image && columns_image;
  }
  // The columns of a row, conv's holes aside; both ends grow with the row.
  __device__ __forceinline__ Range range(int row) const {
    if constexpr (kRowsAreQueries) {
      if (columns_image) return {walk.first_key(row), row};
      return {0, rows_image ? walk.num_text - 1 : row};
    } else {
      if (rows_image != columns_image) return {0, walk.slots - 1};
      return {row, (rows_image ? walk.end_query(row) : walk.num_text) - 1};
    }
  }
  // Bit j: whether `row`, whose range is r, meets column `begin` + j, of sixteen.
  __device__ __forceinline__ uint32_t seen(int row, const Range& r, int begin) const {
    const uint32_t bits = bits_between(r.low - begin, r.high - begin);
    return has_holes() ? bits & window(row, begin) : bits;
  }

 private:
  // conv's window alone: at most half + 1 ranges, `width` apart (scalar/pattern.h)
  __device__ __forceinline__ uint32_t window(int row, int begin) const {
    int left = walk.half, right = walk.half;
    if (!walk.wraparound) {
      const int column = row - walk.by_width.divide(row) * walk.width;
      left = left < column ? left : column;
      right = right < walk.width - 1 - column ? right : walk.width - 1 - column;
    }
    int center = row - begin;  // of the row's own range, among the sixteen
    const int behind = kRowsAreQueries ? center - left - 15 : -center - right;
    int skipped = behind > 0 ? walk.by_width.divide(behind + walk.width - 1) : 0;
    const int step = kRowsAreQueries ? -walk.width : walk.width;
    center += skipped * step;
    uint32_t bits = 0;
    for (; skipped <= walk.half && center + right >= 0 && center - left <= 15; ++skipped, center += step)
      bits |= bits_between(center - left, center + right);
    return bits;
  }
};

}  // namespace dalle_fast::sparse_attention
