// SPDX-License-Identifier: MIT
// Arrays of float32 <-> arrays of 16-bit codes.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"

namespace dalle_fast::minifloat {

struct Params {
  uint16_t* code;  // encode: written; decode: read
  float* value;    // encode: read; decode: written
  int64_t count;
  bool has_sign;  // 1-6-9, else 0-6-10
  Device device;
};

DF_CPU_LAUNCHER(encode, Params)
DF_CPU_LAUNCHER(decode, Params)
void encode_cuda(const Params& params, void* stream);
void decode_cuda(const Params& params, void* stream);

}  // namespace dalle_fast::minifloat
