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
  int text_len, num_text, num_image, slots, height, width, extent, half;
  Divisor by_height, by_width;

  Walk(const Pattern& p, int64_t length) : kind(p.kind), wraparound(p.wraparound) {
    const int64_t image = p.image_len(), side = p.height > p.width ? p.height : p.width;
    text_len = static_cast<int>(p.text_len);
    num_text = static_cast<int>(length < p.text_len ? length : p.text_len);
    num_image = static_cast<int>(length - num_text);
    slots = num_image && kind == PatternKind::kColumn ? static_cast<int>(image) : num_image;
    height = static_cast<int>(p.height);
    width = static_cast<int>(p.width);
    extent = static_cast<int>(p.extent < image ? p.extent : image);
    half = static_cast<int>(p.kernel / 2 < side ? p.kernel / 2 : side);
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
    int back = slot;
    if (kind == PatternKind::kRow) back = extent - 1;
    if (kind == PatternKind::kConv) back = half * (width + 1);
    return slot > back ? slot - back : 0;
  }
  // one behind the last slot that may look at `slot` (or at those before it)
  __device__ __forceinline__ int end_query(int slot) const {
    int64_t end = slots;
    if (kind == PatternKind::kColumn) end = (by_height.divide(slot) + 1) * height;
    if (kind == PatternKind::kRow) end = static_cast<int64_t>(slot) + extent;
    if (kind == PatternKind::kConv) end = slot + static_cast<int64_t>(half) * (width + 1) + 1;
    return end < slots ? static_cast<int>(end) : slots;
  }
  // position in the stream of a text index or an image slot, or -1
  __device__ __forceinline__ int position(bool image, int i) const {
    if (!image) return i < num_text ? i : -1;
    if (i >= slots) return -1;
    const int r = raster(i);
    return r < num_image ? text_len + r : -1;
  }
  // Whether conv, within its range, lets q see k (scalar/pattern.h).
  __device__ __forceinline__ bool in_window(int q, int k) const {
    if (!wraparound) {
      const int q_row = by_width.divide(q), k_row = by_width.divide(k);
      const int columns = (q - q_row * width) - (k - k_row * width);
      return q_row - k_row <= half && columns <= half && -columns <= half;
    }
    const int offset = q - k, most = by_width.divide(offset + half);
    return offset - width * (most < half ? most : half) <= half;
  }
  // Whether an image query sees an image key, both by their slots.
  __device__ __forceinline__ bool sees(int q, int k) const {
    return first_key(q) <= k && k <= q && (kind != PatternKind::kConv || in_window(q, k));
  }
  __host__ __device__ int text_blocks(int rows) const { return (num_text + rows - 1) / rows; }
  __host__ __device__ int blocks(int rows) const { return text_blocks(rows) + (slots + rows - 1) / rows; }
};

// Rows of a block: `begin` counts text indices or image slots.
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
  return Tiles(0, 0, rows.begin, walk.end_query(last), size);
}

template <typename T>
__device__ __forceinline__ T* head_of(const Tensor4& t, int64_t b, int64_t h) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h;
}

void forward_mma(const Params& p, const Walk& walk, void* stream);
void backward_mma(const Params& p, const Walk& walk, void* stream);

}  // namespace dalle_fast::sparse_attention
