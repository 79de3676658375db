// SPDX-License-Identifier: MIT
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, SC 2011) and the Gumbel noise made of it.
#pragma once

#include <cstdint>

#include "hd.h"

namespace dalle_fast {

struct Philox4 {
  uint32_t word[4];
};

inline constexpr uint32_t kPhiloxMul0 = 0xD2511F53u, kPhiloxMul1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

struct WideProduct {
  uint32_t low, high;
};
DF_HD WideProduct multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)  // one instruction; nvcc adds a zero to the upper half of a 64-bit product
  WideProduct p;
  asm("{ .reg .b64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p; }" : "=r"(p.low), "=r"(p.high) : "r"(a), "r"(b));
  return p;
#else
  const uint64_t p = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32)};
#endif
}

// The keys of all rounds: a kernel that gets them as an argument need not add them up.
struct PhiloxKeys {
  uint32_t word[kPhiloxRounds][2];
};
DF_HD PhiloxKeys philox_keys(uint32_t k0, uint32_t k1) {
  PhiloxKeys keys;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.word[round][0] = k0 + kPhiloxWeyl0 * static_cast<uint32_t>(round);
    keys.word[round][1] = k1 + kPhiloxWeyl1 * static_cast<uint32_t>(round);
  }
  return keys;
}

DF_HD Philox4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const PhiloxKeys& keys) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WideProduct p0 = multiply_wide(c0, kPhiloxMul0), p1 = multiply_wide(c2, kPhiloxMul1);
    c0 = p1.high ^ c1 ^ keys.word[round][0];
    c1 = p1.low;
    c2 = p0.high ^ c3 ^ keys.word[round][1];
    c3 = p0.low;
  }
  return {{c0, c1, c2, c3}};
}

DF_HD Philox4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  return philox4x32(c0, c1, c2, c3, philox_keys(k0, k1));
}

}  // namespace dalle_fast
