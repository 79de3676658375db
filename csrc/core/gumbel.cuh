// SPDX-License-Identifier: MIT
// Gumbel noise on the device: g = -ln(-ln u) of the words of Philox4x32-10, u = (word >> 8 + 1/2) * 2^-24.
//
// Two logarithms of the special function unit. Its absolute error near 1 would spoil log2 u there, and float32 cannot
// hold u: for 1 - u < 1/8 a polynomial in the exact 1 - u takes its place. With the unit as coarse as documented g is
// off by at most 2e-6 where g < 6 (99.8% of all draws), by 3.7e-6 for the largest, g = 17. On sm_90 37 instructions
// make the words of four codes and 13 turn each into a perturbed logit.
#pragma once

#include "../scalar/philox.h"
#include "device_math.cuh"

namespace dalle_fast {

// The noise of (seed, offset), made on the host for the kernel's arguments.
struct NoiseSource {
  PhiloxKeys keys;
  uint32_t offset[2];

  NoiseSource(uint64_t seed, uint64_t at)
      : keys(philox_keys(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32))),
        offset{static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32)} {}
  // of codes 4 * group ... 4 * group + 3 of a row
  __device__ __forceinline__ Philox4 words(uint32_t group, uint32_t row) const {
    return philox4x32(group, row, offset[0], offset[1], keys);
  }
};

// log2 u < 0
__device__ __forceinline__ float log2_uniform(uint32_t word) {
  const float f = static_cast<float>(word >> 8);
  const float log2_u = fast_log2(fmaf(f, 0x1p-24f, 0x1p-25f));
  const float q = fmaf(f, -0x1p-24f, 1.0f - 0x1p-24f);  // 1 - u - 2^-25, exact where it is used
  float p = -0.37924019f;                               // log2(1 - q) / q
  p = fmaf(p, q, -0.35014465f);
  p = fmaf(p, q, -0.4813824f);
  p = fmaf(p, q, -0.7213398f);
  p = fmaf(p, q, -1.442695f);
  return q < 0.125f ? fmaf(p, q, -0x1.715476p-25f) : log2_u;
}

// x + g + ln(ln 2): argmax and softmax do not see a constant that all codes have.
__device__ __forceinline__ float add_gumbel(float x, uint32_t word) {
  return fmaf(fast_log2(-log2_uniform(word)), -0.69314718f, x);
}

}  // namespace dalle_fast
