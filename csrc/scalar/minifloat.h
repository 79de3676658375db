// SPDX-License-Identifier: MIT
// The 16-bit formats of the paper's appendix D: 1-6-9 (sign, exponent, significand) and 0-6-10. Exponent code 63 is
// Inf/NaN, 0 is gradual underflow, rounding is to nearest even; the bias is a parameter. Storage only: arithmetic is
// float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hd.h"

namespace dalle_fast {

inline constexpr int kMinifloatBias = 59;  // largest finite value of 1-6-9: 2^3 * (2 - 2^-9) = 15.984375

template <bool kSigned>
struct Minifloat {
  static constexpr int kBits = kSigned ? 9 : 10;  // of the significand
  static constexpr uint32_t kInf = 63u << kBits;
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

// |x| (0 for a negative x where there is no sign) rounded to the format; 2^(63 - bias), the first power of two beyond
// it, stands for Inf and NaN. The sum of a number in [2^e, 2^(e+1)) and 2^(e + 23 - kBits) keeps kBits behind its
// point.
template <bool kSigned>
DF_HD float minifloat_round(float x, int bias = kMinifloatBias) {
  constexpr float kShift = static_cast<float>(1 << (23 - Minifloat<kSigned>::kBits));
  const float a = kSigned ? fabsf(x) : x > 0.0f ? x : 0.0f;
  const uint32_t exponent = float_bits(a) & 0x7f800000u, first_normal = static_cast<uint32_t>(128 - bias) << 23;
  const float ruler = bits_float(exponent > first_normal ? exponent : first_normal) * kShift;
  const float rounded = (a + ruler) - ruler, beyond = power_of_two(63 - bias);
  return rounded < beyond ? rounded : beyond;
}

// The code, less its sign, of a result of minifloat_round: scaled, that has exponent and significand of the code in its
// own, subnormals included.
template <bool kSigned>
DF_HD uint32_t minifloat_pack(float rounded, int bias = kMinifloatBias) {
  return float_bits(rounded * power_of_two(bias - 127)) >> (23 - Minifloat<kSigned>::kBits);
}

// The number of a code; Inf and NaN give numbers of at least 2^(63 - bias).
template <bool kSigned>
DF_HD float minifloat_unpack(uint16_t h, int bias = kMinifloatBias) {
  constexpr int kShift = 23 - Minifloat<kSigned>::kBits;
  const auto extended = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(h)));  // its top bits: the sign
  const uint32_t u = kSigned ? extended << kShift & 0x9fffffffu : static_cast<uint32_t>(h) << kShift;
  return bits_float(u) * power_of_two(127 - bias);
}

template <bool kSigned>
DF_HD uint16_t minifloat_encode(float x, int bias = kMinifloatBias) {
  constexpr int kBits = Minifloat<kSigned>::kBits;
  const uint32_t u = float_bits(x), sign = kSigned ? u >> 16 & 0x8000u : 0u;
  uint32_t code = minifloat_pack<kSigned>(minifloat_round<kSigned>(x, bias), bias);
  // NaN: as much of the payload as fits, never empty
  if (x != x) code = Minifloat<kSigned>::kInf | 1u << (kBits - 1) | (u & 0x7fffffu) >> (23 - kBits);
  return static_cast<uint16_t>(sign | code);
}

template <bool kSigned>
DF_HD float minifloat_decode(uint16_t h, int bias = kMinifloatBias) {
  const float x = minifloat_unpack<kSigned>(h, bias);
  return fabsf(x) < power_of_two(63 - bias) ? x : bits_float(float_bits(x) | 0x7f800000u);
}

}  // namespace dalle_fast
