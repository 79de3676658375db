// SPDX-License-Identifier: MIT
// Which image keys an image query attends to (paper section 2.2 and appendix B), by raster index. Text is the same in
// all kinds: text queries see text up to themselves, image queries see all text.
#pragma once

#include <cstdint>

#include "hd.h"

namespace dalle_fast {

enum class PatternKind : int { kRow, kColumn, kConv, kDense };

struct Pattern {
  PatternKind kind;
  int64_t text_len;
  int64_t height;
  int64_t width;
  int64_t extent;  // row: keys, the query itself included
  int64_t kernel;  // conv: side, odd
  bool wraparound;

  constexpr int64_t image_len() const { return height * width; }
  constexpr int64_t length() const { return text_len + image_len(); }
};

// q, k: raster indices of the image, k <= q or not.
DF_HD bool image_may_attend(const Pattern& p, int64_t q, int64_t k) {
  const int64_t offset = q - k;
  if (offset < 0) return false;
  switch (p.kind) {
    case PatternKind::kRow: return offset < p.extent;
    case PatternKind::kColumn: return offset % p.width == 0;
    case PatternKind::kDense: return true;
    case PatternKind::kConv: break;
  }
  const int64_t half = p.kernel / 2;
  if (!p.wraparound) {
    const int64_t rows = q / p.width - k / p.width;
    const int64_t columns = q % p.width - k % p.width;
    return rows <= half && columns <= half && -columns <= half;
  }
  // offset = width * rows + columns for some rows in [0, half], |columns| <= half (wide windows overlap themselves):
  // the most rows that leave columns >= -half
  const int64_t most = (offset + half) / p.width, rows = most < half ? most : half;
  return offset - p.width * rows <= half;
}

// The smallest raster index that image query q may attend to.
DF_HD int64_t first_image_key(const Pattern& p, int64_t q) {
  int64_t back = q;
  if (p.kind == PatternKind::kRow) back = p.extent - 1;
  if (p.kind == PatternKind::kConv) back = p.kernel / 2 * (p.width + 1);
  return q > back ? q - back : 0;
}

// Positions of the whole stream.
DF_HD bool may_attend(const Pattern& p, int64_t q, int64_t k) {
  if (q < p.text_len) return k <= q;
  if (k < p.text_len) return true;
  return image_may_attend(p, q - p.text_len, k - p.text_len);
}

}  // namespace dalle_fast
