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
  // ln((1 + m) 2^e): u = 2^e (1 + m) with 1 + m in [sqrt(1/2), sqrt(2)), or e = 0 and m = -t
  const VecI u_bits = bit_cast<VecI>(u);
  const VecI e = near_one ? VecI{} : (u_bits - 0x3f3504f3) >> 23;
  const VecF m = near_one ? -t : bit_cast<VecF>(u_bits - (e << 23)) - splat(1.0f);
  return -log_normal(-log_reduced(m, __builtin_convertvector(e, VecF)));
}

struct NoiseKey {
  uint32_t k0, k1, c2, c3;
};

DF_INLINE NoiseKey noise_key(uint64_t seed, uint64_t offset) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(offset),
          static_cast<uint32_t>(offset >> 32)};
}

constexpr int kNoiseCodes = 4 * kLanes;  // of kLanes generators

// Noise of codes [first, first + kNoiseCodes) of one row, in their order; first is a multiple of 4.
DF_INLINE void gumbel_of_codes(VecF (&noise)[4], int64_t first, uint32_t row, const NoiseKey& key) {
  const VecU block = (VecU)lane_index() + static_cast<uint32_t>(first / 4);
  const PhiloxLanes lanes = philox_lanes(block, splat_u(row), splat_u(key.c2), splat_u(key.c3), key.k0, key.k1);
  VecU even[2], odd[2], words[4];  // of words 0 and 2, of words 1 and 3
  interleave(lanes.word[0], lanes.word[2], &even[0], &even[1]);
  interleave(lanes.word[1], lanes.word[3], &odd[0], &odd[1]);
  for (int i = 0; i < 2; ++i) interleave(even[i], odd[i], &words[2 * i], &words[2 * i + 1]);
  for (int k = 0; k < 4; ++k) noise[k] = gumbel(words[k]);
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast
