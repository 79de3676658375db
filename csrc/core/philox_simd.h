// SPDX-License-Identifier: MIT
// kLanes Philox4x32-10 generators side by side, and Gumbel noise; the numbers are those of scalar/philox.h.
#pragma once

#include "../scalar/philox.h"
#include "simd.h"

namespace dalle_fast {
namespace DF_CPU_NAMESPACE {

typedef uint64_t VecW __attribute__((vector_size(kVecBytes)));  // half as many 64-bit lanes

// products of the even 32-bit lanes
DF_INLINE VecW mul_even(VecU a, VecU b) {
#if defined(__AVX512F__)
  return (VecW)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VecW)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (VecW)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return ((VecW)a & 0xffffffffull) * ((VecW)b & 0xffffffffull);
#endif
}

DF_INLINE void mul_wide(VecU a, uint32_t m, VecU* high, VecU* low) {
  const VecU factor = splat_u(m);
  const VecW even = mul_even(a, factor);
  const VecW odd = mul_even((VecU)((VecW)a >> 32), factor);
  *high = (VecU)((even >> 32) | (odd & 0xffffffff00000000ull));
  *low = (VecU)((even & 0xffffffffull) | (odd << 32));
}

struct PhiloxLanes {
  VecU word[4];
};

DF_INLINE PhiloxLanes philox_lanes(VecU c0, VecU c1, VecU c2, VecU c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    VecU high0, low0, high1, low1;
    mul_wide(c0, kPhiloxMul0, &high0, &low0);
    mul_wide(c2, kPhiloxMul1, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// g = -ln(-ln u), u = (word >> 8 + 0.5) * 2^-24. Near 1, where float32 cannot hold u, ln u comes from the exact 1 - u.
DF_INLINE VecF gumbel(VecU word) {
  const VecI bits = (VecI)(word >> 8);
  const VecF u = (__builtin_convertvector(bits, VecF) + splat(0.5f)) * splat(0x1p-24f);
  const VecF t = (__builtin_convertvector(splat_i(0xffffff) - bits, VecF) + splat(0.5f)) * splat(0x1p-24f);
  const VecI near_one = t < splat(0.29289f);
  return -log(near_one ? -log_reduced(-t, VecF{}) : -log(u));
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast
