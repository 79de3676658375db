// SPDX-License-Identifier: MIT
// scalar/minifloat.h, kLanes at a time, at the default bias.
#pragma once

#include "../scalar/minifloat.h"
#include "simd.h"

namespace dalle_fast {
namespace DF_CPU_NAMESPACE {

// With e the exponent of |x|, but at least that of the least normal code: |x| 2^(kBits - e) plus a number of
// [2^23, 2^24) rounds to an integer, ties to even. That number brings along the exponent code, so that the lowest bits
// of the sum are the code, of subnormals too.
template <bool kSigned>
DF_INLINE VecH minifloat_encode(VecF x) {
  constexpr int kBits = Minifloat<kSigned>::kBits, kShift = 23 - kBits;
  constexpr uint32_t kLeast = 128 - kMinifloatBias;  // exponent of the least normal code in float32
  const VecU u = bit_cast<VecU>(x);
  const VecF a = vmin(kSigned ? vabs(x) : vmax(x, splat(0.0f)), splat(power_of_two(63 - kMinifloatBias)));
  const VecI own = bit_cast<VecI>(a) & 0x7f800000, least = splat_i(kLeast << 23);
  const VecU exponent = (VecU)(own > least ? own : least);
  const VecF scale = bit_cast<VecF>(splat_u((254u + kBits) << 23) - exponent);
  const VecF base = bit_cast<VecF>((exponent >> kShift) + (0x4b000000u - (kLeast << kBits)));
  VecU code = bit_cast<VecU>(a * scale + base);
  const VecU nan = (u >> kShift & ((1u << kBits) - 1u)) | (Minifloat<kSigned>::kInf | 1u << (kBits - 1));
  code = (VecI)(x != x) ? nan : code;
  if (kSigned) code |= u >> 16 & 0x8000u;
  return narrow(code);
}

// The code's bits with an exponent of float32 that makes Inf and NaN of those codes, times a power of two; that is
// (1 + f) least / 2 where f least is right, for exponent code 0, and only there not the smaller of the two.
template <bool kSigned>
DF_INLINE VecF minifloat_decode(VecH h) {
  constexpr int kExponent = 255 - 63;
  const VecU all = widen(h), code = kSigned ? all & 0x7fffu : all;
  const VecF x = bit_cast<VecF>((code << (23 - Minifloat<kSigned>::kBits)) + (static_cast<uint32_t>(kExponent) << 23));
  const float scale = power_of_two(127 - kMinifloatBias - kExponent), least = power_of_two(1 - kMinifloatBias);
  const VecF value = vmin(x * splat(scale), x * splat(2.0f * scale) - splat(least));
  return kSigned ? bit_cast<VecF>(bit_cast<VecU>(value) | (all << 16 & 0x80000000u)) : value;
}

// The code of x, which becomes the number of that code; a short way where all are normal numbers.
template <bool kSigned>
DF_INLINE VecH minifloat_round(VecF& x) {
  constexpr int kBits = Minifloat<kSigned>::kBits, kShift = 23 - kBits;
  constexpr uint32_t kFirst = static_cast<uint32_t>(128 - kMinifloatBias) << 23;   // the first normal number
  constexpr uint32_t kBeyond = static_cast<uint32_t>(190 - kMinifloatBias) << 23;  // what is Inf
  const VecU u = bit_cast<VecU>(x), sign = kSigned ? u & 0x80000000u : VecU{};
  const VecU a = u - sign;
  const VecU rounded = a + ((1u << (kShift - 1)) - 1u) + (a >> kShift & 1u);
  // as rounding may reach kFirst from below, a number just under it goes the short way too: to the same code
  if (__builtin_expect(any((VecI)(rounded - kFirst >= kBeyond - kFirst)), 0)) {
    const VecH code = minifloat_encode<kSigned>(x);
    x = minifloat_decode<kSigned>(code);
    return code;
  }
  x = bit_cast<VecF>((rounded & ~((1u << kShift) - 1u)) | sign);
  const VecU code = (rounded >> kShift) - (static_cast<uint32_t>(127 - kMinifloatBias) << kBits);
  return narrow(code | sign >> 16);
}

DF_INLINE VecH load_h(const uint16_t* p, int n = kLanes) {
  VecH h = {};
  if (n == kLanes)
    __builtin_memcpy(&h, p, sizeof h);
  else
    for (int i = 0; i < n; ++i) h[i] = p[i];
  return h;
}
DF_INLINE void store_h(uint16_t* p, VecH h, int n = kLanes) {
  if (n == kLanes)
    __builtin_memcpy(p, &h, sizeof h);
  else
    for (int i = 0; i < n; ++i) p[i] = h[i];
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast
