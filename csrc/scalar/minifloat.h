// SPDX-License-Identifier: MIT
// The 16-bit formats of the paper's appendix D: 1-6-9 (sign, exponent, significand) and 0-6-10. Exponent code 63 is
// Inf/NaN, 0 is gradual underflow, rounding is to nearest even; the bias is a parameter. Storage only: arithmetic is
// float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "hd.h"

namespace dalle_fast {

inline constexpr int kMinifloatBias = 59;  // largest finite value of 1-6-9: 2^3 * (2 - 2^-9) = 15.984375

template <bool kSigned>
struct Minifloat {
  static constexpr int kBits = kSigned ? 9 : 10;  // of the significand
  static constexpr uint32_t kInf = 63u << kBits;
  static constexpr uint32_t kMax = kInf - 1;
};

DF_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
DF_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}
// 2^e for -126 <= e <= 127
DF_HD float power_of_two(int e) { return bits_float(static_cast<uint32_t>(e + 127) << 23); }

template <bool kSigned>
DF_HD uint16_t minifloat_encode(float x, int bias = kMinifloatBias) {
  constexpr int kBits = Minifloat<kSigned>::kBits;
  constexpr int kShift = 23 - kBits;
  constexpr uint32_t kInf = Minifloat<kSigned>::kInf;
  const uint32_t u = float_bits(x);
  const uint32_t a = u & 0x7fffffffu;
  const uint32_t sign = kSigned ? u >> 31 << 15 : 0u;
  if (a > 0x7f800000u)  // NaN: as much of the payload as fits, never empty
    return static_cast<uint16_t>(sign | kInf | 1u << (kBits - 1) | (a & 0x7fffffu) >> kShift);
  if (!kSigned && u >> 31) return 0;
  uint32_t code;
  if (static_cast<int>(a >> 23) - 127 + bias >= 1) {
    const uint32_t rounded = (a + (1u << (kShift - 1)) - 1u + (a >> kShift & 1u)) >> kShift;
    code = rounded - (static_cast<uint32_t>(127 - bias) << kBits);
    if (code > kInf) code = kInf;
  } else {  // counted in steps of the smallest subnormal; adding 2^23 rounds to nearest even
    const float steps = bits_float(a) * power_of_two(kBits + bias - 1);
    code = float_bits(steps + 8388608.0f) & 0x7fffffu;
  }
  return static_cast<uint16_t>(sign | code);
}

template <bool kSigned>
DF_HD float minifloat_decode(uint16_t h, int bias = kMinifloatBias) {
  constexpr int kBits = Minifloat<kSigned>::kBits;
  const uint32_t code = kSigned ? h & 0x7fffu : h;
  const uint32_t sign = kSigned ? static_cast<uint32_t>(h >> 15) << 31 : 0u;
  const uint32_t exponent = code >> kBits, fraction = code & ((1u << kBits) - 1u);
  if (exponent == 63u) return bits_float(sign | 0x7f800000u | fraction << (23 - kBits));
  if (exponent == 0u)
    return bits_float(sign | float_bits(static_cast<float>(fraction) * power_of_two(1 - bias - kBits)));
  return bits_float(sign | (exponent + static_cast<uint32_t>(127 - bias)) << 23 | fraction << (23 - kBits));
}

}  // namespace dalle_fast
