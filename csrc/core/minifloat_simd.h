// SPDX-License-Identifier: MIT
// scalar/minifloat.h, kLanes at a time, at the default bias. Vectors of normal numbers take a short way; zeros,
// subnormals, infinities and NaN the long one.
#pragma once

#include "../scalar/minifloat.h"
#include "simd.h"

namespace dalle_fast {
namespace DF_CPU_NAMESPACE {

template <bool kSigned>
DF_INLINE VecH minifloat_encode_any(VecF x) {
  constexpr int kBits = Minifloat<kSigned>::kBits;
  constexpr int kShift = 23 - kBits;
  constexpr uint32_t kInf = Minifloat<kSigned>::kInf;
  const VecU u = bit_cast<VecU>(x);
  const VecU a = u & 0x7fffffffu;
  const VecU rounded = (a + ((1u << (kShift - 1)) - 1u) + ((a >> kShift) & 1u)) >> kShift;
  const VecU normal = rounded - (static_cast<uint32_t>(127 - kMinifloatBias) << kBits);
  const VecF steps = bit_cast<VecF>(a) * splat(power_of_two(kBits + kMinifloatBias - 1));
  const VecU tiny = bit_cast<VecU>(steps + splat(8388608.0f)) & 0x7fffffu;
  const uint32_t first_normal = static_cast<uint32_t>(127 - kMinifloatBias + 1) << 23;
  VecU code = (VecI)(a < first_normal) ? tiny : normal;
  code = (VecI)(a >= first_normal) & (VecI)(normal > kInf) ? splat_u(kInf) : code;
  if (!kSigned) code = (VecI)u < 0 ? splat_u(0u) : code;
  const VecU nan = kInf | 1u << (kBits - 1) | (a & 0x7fffffu) >> kShift;
  code = (VecI)(a > 0x7f800000u) ? nan : code;
  if (kSigned) code |= u >> 31 << 15;
  return __builtin_convertvector(code, VecH);
}

template <bool kSigned>
DF_INLINE VecF minifloat_decode_any(VecH h) {
  constexpr int kBits = Minifloat<kSigned>::kBits;
  const VecU all = __builtin_convertvector(h, VecU);
  const VecU code = kSigned ? all & 0x7fffu : all;
  const VecU sign = kSigned ? all >> 15 << 31 : VecU{};
  const VecU exponent = code >> kBits, fraction = code & ((1u << kBits) - 1u);
  const VecU normal = (exponent + static_cast<uint32_t>(127 - kMinifloatBias)) << 23 | fraction << (23 - kBits);
  const VecF tiny = __builtin_convertvector((VecI)fraction, VecF) * splat(power_of_two(1 - kMinifloatBias - kBits));
  VecU bits = (VecI)(exponent == 0u) ? bit_cast<VecU>(tiny) : normal;
  bits = (VecI)(exponent == 63u) ? 0x7f800000u | fraction << (23 - kBits) : bits;
  return bit_cast<VecF>(bits | sign);
}

template <bool kSigned>
DF_INLINE VecF minifloat_decode(VecH h) {
  constexpr int kBits = Minifloat<kSigned>::kBits;
  const VecU all = __builtin_convertvector(h, VecU), code = kSigned ? all & 0x7fffu : all;
  if (__builtin_expect(any((VecI)(code - (1u << kBits) >= Minifloat<kSigned>::kInf - (1u << kBits))), 0))
    return minifloat_decode_any<kSigned>(h);
  const VecU bits = (code << (23 - kBits)) + (static_cast<uint32_t>(127 - kMinifloatBias) << 23);
  return bit_cast<VecF>(kSigned ? bits | all >> 15 << 31 : bits);
}

// The code of x, which becomes the number of that code.
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
    const VecH code = minifloat_encode_any<kSigned>(x);
    x = minifloat_decode_any<kSigned>(code);
    return code;
  }
  x = bit_cast<VecF>((rounded & ~((1u << kShift) - 1u)) | sign);
  const VecU code = (rounded >> kShift) - (static_cast<uint32_t>(127 - kMinifloatBias) << kBits);
  return __builtin_convertvector(code | sign >> 16, VecH);
}

template <bool kSigned>
DF_INLINE VecH minifloat_encode(VecF x) {
  return minifloat_round<kSigned>(x);
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
