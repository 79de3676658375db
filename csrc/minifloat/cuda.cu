// SPDX-License-Identifier: MIT
// Four elements a thread and trip: 16 bytes of floats, 8 of codes. Floor: 6 bytes an element.
#include "../core/device_math.cuh"
#include "minifloat.h"

namespace dalle_fast::minifloat {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 4;

using Floats = Four<float>;
using Codes = Four<uint16_t>;

template <bool kSigned, bool kEncode>
__device__ __forceinline__ void convert(uint16_t& code, float& value) {
  if (kEncode)
    code = minifloat_encode<kSigned>(value);
  else
    value = minifloat_decode<kSigned>(code);
}

template <bool kSigned, bool kEncode>
__global__ void __launch_bounds__(kThreads) convert_all(uint16_t* code, float* value, int64_t count, bool aligned) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t wide = aligned ? count / kWidth : 0;
  for (int64_t i = thread; i < wide; i += step) {
    Codes c;
    Floats f;
    if (kEncode)
      f = reinterpret_cast<const Floats*>(value)[i];
    else
      c = reinterpret_cast<const Codes*>(code)[i];
    DF_UNROLL
    for (int k = 0; k < kWidth; ++k) convert<kSigned, kEncode>(c.at[k], f.at[k]);
    if (kEncode)
      reinterpret_cast<Codes*>(code)[i] = c;
    else
      reinterpret_cast<Floats*>(value)[i] = f;
  }
  for (int64_t i = wide * kWidth + thread; i < count; i += step) convert<kSigned, kEncode>(code[i], value[i]);
}

template <bool kEncode>
void launch(const Params& p, void* stream) {
  if (p.count == 0) return;
  const DeviceGuard guard(p.device.index);
  const bool aligned = reinterpret_cast<uintptr_t>(p.value) % 16 == 0 && reinterpret_cast<uintptr_t>(p.code) % 8 == 0;
  const int64_t blocks = (p.count + kThreads * kWidth - 1) / (kThreads * kWidth);
  const unsigned grid = static_cast<unsigned>(blocks < 4096 ? blocks : 4096);
  if (p.has_sign)
    DF_LAUNCH((convert_all<true, kEncode>), grid, kThreads, 0, stream, p.code, p.value, p.count, aligned);
  else
    DF_LAUNCH((convert_all<false, kEncode>), grid, kThreads, 0, stream, p.code, p.value, p.count, aligned);
}

}  // namespace

void encode_cuda(const Params& p, void* stream) { launch<true>(p, stream); }
void decode_cuda(const Params& p, void* stream) { launch<false>(p, stream); }

}  // namespace dalle_fast::minifloat
