// SPDX-License-Identifier: MIT
// The template room: out[i, j] = input[i, j]. It computes nothing, so that only the wiring is left to read.
// <room>.h holds the parameter struct and the launchers; both back ends and the binding include it, nobody else does.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"

namespace dalle_fast::null {

struct Params {
  void* out;          // [num_rows, row_len], contiguous
  const void* input;  // [num_rows, row_len], rows `row_stride` elements apart, each row dense
  int64_t num_rows;
  int64_t row_len;
  int64_t row_stride;
  DType dtype;
  Device device;
};

DF_CPU_LAUNCHER(copy, Params)
void copy_cuda(const Params& params, void* stream);

}  // namespace dalle_fast::null
