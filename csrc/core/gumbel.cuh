// SPDX-License-Identifier: MIT
// Gumbel noise on the device: g = -ln(-ln u) of the words of Philox4x32-10, u = (word >> 8 + 1/2) * 2^-24.
//
// Two logarithms of the special function unit. Its absolute error near 1 would spoil log2 u there, and float32 cannot
// hold u: for 1 - u < 1/4 a polynomial in the exact 1 - u takes its place. With the unit as coarse as documented g is
// off by at most 1.2e-6 where g < 6 (99.8% of all draws), by 3.7e-6 for the largest, g = 17. On sm_90 37 instructions
// make the words of four codes and 14 turn each into a perturbed logit.
#pragma once

#include "../scalar/philox.h"
#include "device_math.cuh"

namespace dalle_fast {

// The noise of (seed, offset): words of four codes of a row.
struct NoiseSource {
  uint32_t k0, k1, c2, c3;

  __device__ __forceinline__ NoiseSource(uint64_t seed, uint64_t offset)
      : k0(static_cast<uint32_t>(seed)),
        k1(static_cast<uint32_t>(seed >> 32)),
        c2(static_cast<uint32_t>(offset)),
        c3(static_cast<uint32_t>(offset >> 32)) {}
  __device__ __forceinline__ Philox4 words(uint32_t group, uint32_t row) const {
    return philox4x32(group, row, c2, c3, k0, k1);
  }
};

// log2 u < 0
__device__ __forceinline__ float log2_uniform(uint32_t word) {
  const float f = static_cast<float>(word >> 8);
  const float log2_u = fast_log2(fmaf(f, 0x1p-24f, 0x1p-25f));
  const float q = fmaf(f, -0x1p-24f, 1.0f - 0x1p-24f);  // 1 - u - 2^-25, exact where it is used
  float p = -0.49022433f;                               // log2(1 - q) / q
  p = fmaf(p, q, -0.2076255f);
  p = fmaf(p, q, -0.37192598f);
  p = fmaf(p, q, -0.48021063f);
  p = fmaf(p, q, -0.72136265f);
  p = fmaf(p, q, -1.442695f);
  return q < 0.25f ? fmaf(p, q, -0x1.715476p-25f) : log2_u;
}

// x + g + ln(ln 2): argmax and softmax do not see a constant that all codes have.
__device__ __forceinline__ float add_gumbel(float x, uint32_t word) {
  return fmaf(fast_log2(-log2_uniform(word)), -0.69314718f, x);
}

}  // namespace dalle_fast
