// SPDX-License-Identifier: MIT
// Dropout of rows: element (r, c) stays, times 1 / (1 - p), if its Philox word is >= p * 2^32, otherwise it is 0. Key =
// seed, counter = (c / 4, row_offset + r, offset), word c % 4. The gradient is the same map: no mask is kept.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"

namespace dalle_fast::dropout {

struct Params {
  void* out;      // [num_rows, row_len], contiguous
  const void* x;  // [num_rows, row_len], rows `row_stride` elements apart, each row dense
  int64_t num_rows;
  int64_t row_len;
  int64_t row_stride;
  uint32_t last_dropped;  // the largest word that is < p * 2^32
  float scale;            // 1 / (1 - p)
  uint64_t seed;
  uint64_t offset;
  uint32_t row_offset;
  DType dtype;
  Device device;
};

DF_CPU_LAUNCHER(drop, Params)
void drop_cuda(const Params& params, void* stream);

}  // namespace dalle_fast::dropout
