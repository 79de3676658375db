// SPDX-License-Identifier: MIT
// The largest of each two by two pixels, where width is the innermost dimension: torch is fast there only with channels
// innermost. The gradient goes to the first of the largest, which the backward pass finds again in x.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"

namespace dalle_fast::max_pool2d {

struct Params {
  void* out;                      // [planes, H / 2, W / 2]; backward: dx, as x
  const void* x;                  // [planes, H, W], H and W even
  const void* dout;               // backward: as the result
  int64_t planes, height, width;  // of the result
  DType dtype;                    // float32 or bfloat16
};

DF_CPU_LAUNCHER(forward, Params)
DF_CPU_LAUNCHER(backward, Params)

}  // namespace dalle_fast::max_pool2d
