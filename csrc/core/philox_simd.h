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

struct PhiloxLanes {
  VecU word[4];
};

// The keys of all rounds, in memory: as operands they cost nothing.
struct PhiloxKey {
  VecU k0[kPhiloxRounds], k1[kPhiloxRounds];
};

DF_INLINE PhiloxKey philox_key(uint32_t k0, uint32_t k1) {
  PhiloxKey key;
  for (int i = 0; i < kPhiloxRounds; ++i) {
    key.k0[i] = splat_u(k0 + static_cast<uint32_t>(i) * kPhiloxWeyl0);
    key.k1[i] = splat_u(k1 + static_cast<uint32_t>(i) * kPhiloxWeyl1);
  }
  return key;
}

// The even and the odd generators apart, in 64-bit lanes of which only the lower half counts: so products come and go
// without a shuffle.
DF_INLINE PhiloxLanes philox_lanes(VecU c0, VecU c1, VecU c2, VecU c3, const PhiloxKey& key) {
  VecW a[2] = {(VecW)c0, (VecW)c0 >> 32}, b[2] = {(VecW)c1, (VecW)c1 >> 32};
  VecW c[2] = {(VecW)c2, (VecW)c2 >> 32}, d[2] = {(VecW)c3, (VecW)c3 >> 32};
  const VecU mul0 = splat_u(kPhiloxMul0), mul1 = splat_u(kPhiloxMul1);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < 2; ++i) {
      const VecW product0 = mul_even((VecU)a[i], mul0), product1 = mul_even((VecU)c[i], mul1);
      a[i] = (product1 >> 32) ^ b[i] ^ (VecW)key.k0[round];
      b[i] = product1;
      c[i] = (product0 >> 32) ^ d[i] ^ (VecW)key.k1[round];
      d[i] = product0;
    }
  }
  const auto join = [](const VecW(&x)[2]) { return (VecU)((x[0] & 0xffffffffull) | x[1] << 32); };
  return {{join(a), join(b), join(c), join(d)}};
}

// g = -ln(-ln u), u = (word >> 8 + 0.5) * 2^-24. Near 1, where float32 cannot hold u, ln u comes from the exact 1 - u.
template <int N>
DF_INLINE void gumbel(VecF (&noise)[N], const VecU (&word)[N]) {
  VecF exponent[N];
  for (int k = 0; k < N; ++k) {
    const VecF bits = __builtin_convertvector((VecI)(word[k] >> 8), VecF);
    VecF u = bits * splat(0x1p-24f) + splat(0x1p-25f);
    const VecF minus_t = (bits - splat(16777215.0f)) * splat(0x1p-24f) - splat(0x1p-25f);  // u - 1
    const VecI near_one = minus_t > splat(-0.29289f);
    const VecI e = split_exponent(u);
    noise[k] = near_one ? minus_t : u;
    exponent[k] = __builtin_convertvector(near_one ? VecI{} : e, VecF);
  }
  log_reduced(noise, exponent);
  for (int k = 0; k < N; ++k) {
    noise[k] = -noise[k];
    exponent[k] = __builtin_convertvector(split_exponent(noise[k]), VecF);
  }
  log_reduced(noise, exponent);
  for (int k = 0; k < N; ++k) noise[k] = -noise[k];
}

// The noise of (seed, offset).
struct NoiseKey {
  PhiloxKey key;
  uint32_t c2, c3;
};

DF_INLINE NoiseKey noise_key(uint64_t seed, uint64_t offset) {
  return {philox_key(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)), static_cast<uint32_t>(offset),
          static_cast<uint32_t>(offset >> 32)};
}

constexpr int kNoiseCodes = 4 * kLanes;  // of kLanes generators

// Words of codes [first, first + kNoiseCodes) of one row, in their order; first is a multiple of 4.
DF_INLINE void words_of_codes(VecU (&words)[4], int64_t first, uint32_t row, const NoiseKey& key) {
  VecU block = {};  // generators in the order that join_words undoes
  for (int i = 0; i < kLanes; ++i) block[i] = i % 4 * (kLanes / 4) + i / 4;
  block += static_cast<uint32_t>(first / 4);
  join_words(words, philox_lanes(block, splat_u(row), splat_u(key.c2), splat_u(key.c3), key.key).word);
}

// Their noise.
DF_INLINE void gumbel_of_codes(VecF (&noise)[4], int64_t first, uint32_t row, const NoiseKey& key) {
  VecU words[4];
  words_of_codes(words, first, row, key);
  gumbel(noise, words);
}

// Noise of codes [first, first + 4) of kLanes rows; first is a multiple of 4.
DF_INLINE void gumbel_of_rows(VecF (&noise)[4], int64_t first, VecU row, const NoiseKey& key) {
  const VecU block = splat_u(static_cast<uint32_t>(first / 4));
  gumbel(noise, philox_lanes(block, row, splat_u(key.c2), splat_u(key.c3), key.key).word);
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast
