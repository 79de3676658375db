// SPDX-License-Identifier: MIT
// Fixed-width vectors for cpu.cpp files, on GCC/Clang vector extensions: the same source compiles for SSE2, AVX2,
// AVX-512 and NEON. Arithmetic and comparison operators work on VecF, VecI, VecU as they are.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#define DF_INLINE static inline __attribute__((always_inline))

namespace dalle_fast {
namespace DF_CPU_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
#else
inline constexpr int kVecBytes = 16;
#endif
inline constexpr int kLanes = kVecBytes / 4;

typedef float VecF __attribute__((vector_size(kVecBytes)));
typedef int32_t VecI __attribute__((vector_size(kVecBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));
typedef int64_t VecL __attribute__((vector_size(kVecBytes)));       // half as many 64-bit lanes
typedef uint16_t VecH __attribute__((vector_size(kVecBytes / 2)));  // 16-bit storage, half as many bytes

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

template <typename To, typename From>
DF_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

DF_INLINE VecF splat(float x) { return x - VecF{}; }  // VecF{} + x is an addition: of -0 it makes 0
DF_INLINE VecI splat_i(int32_t x) { return VecI{} + x; }
DF_INLINE VecU splat_u(uint32_t x) { return VecU{} + x; }

DF_INLINE VecI lane_index() {
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

DF_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
DF_INLINE void zero(float* to, int64_t n) { __builtin_memset(to, 0, static_cast<std::size_t>(n) * sizeof(float)); }

// mask lanes are 0 or -1, as comparisons give them
template <typename V>
DF_INLINE V select(VecI mask, V a, V b) {
  return mask ? a : b;
}
// The instructions by name where gcc would compare and blend. With NaN in either, the second operand.
DF_INLINE VecF vmax(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
DF_INLINE VecF vmin(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
DF_INLINE bool any_greater(VecF a, VecF b) {  // in some lane; NaN is not greater
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(a > b)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)(a > b)) != 0;
#else
  for (int i = 0; i < kLanes; ++i)
    if (a[i] > b[i]) return true;
  return false;
#endif
}
DF_INLINE bool any(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  for (int i = 0; i < kLanes; ++i)
    if (mask[i]) return true;
  return false;
#endif
}
DF_INLINE VecF vabs(VecF a) { return bit_cast<VecF>(bit_cast<VecU>(a) & 0x7fffffffu); }

DF_INLINE VecF vsqrt(VecF a) {
#if defined(__AVX512F__)
  return (VecF)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (VecF)_mm256_sqrt_ps((__m256)a);
#elif defined(__SSE2__)
  return (VecF)_mm_sqrt_ps((__m128)a);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

// ---- 16-bit floats

DF_INLINE VecU widen(VecH h) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, VecU);
#endif
}
DF_INLINE VecH narrow(VecU u) {  // the low halves
#if defined(__AVX512F__)
  return (VecH)_mm512_cvtepi32_epi16((__m512i)u);
#else
  return __builtin_convertvector(u, VecH);
#endif
}

DF_INLINE VecF from_bf16(VecH h) { return bit_cast<VecF>(widen(h) << 16); }

DF_INLINE VecH to_bf16(VecF x) {  // round to nearest even; NaN stays NaN
  const VecU u = bit_cast<VecU>(x);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecI nan = x != x;
  return narrow(nan ? splat_u(0x7fc0u) : rounded);
}

DF_INLINE VecF from_fp16(VecH h) {  // exact, subnormals, Inf and NaN included
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
  const VecU u = widen(h);
  const VecU sign = (u & 0x8000u) << 16;
  const VecU magnitude = (u & 0x7fffu) << 13;
  const VecU special = (VecU)(magnitude >= (0x7c00u << 13)) & (112u << 23);
  const VecF scaled = bit_cast<VecF>(magnitude + special) * splat(0x1p112f);
  const VecU inf = magnitude + (112u << 23) + (112u << 23);
  const VecI is_special = (VecI)(magnitude >= (0x7c00u << 13));
  return bit_cast<VecF>((is_special ? inf : bit_cast<VecU>(scaled)) | sign);
#endif
}

DF_INLINE VecH to_fp16(VecF x) {  // round to nearest even, gradual underflow, overflow to Inf
#if defined(__AVX512F__)
  return (VecH)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (VecH)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VecU u = bit_cast<VecU>(x);
  const VecU sign = (u >> 16) & 0x8000u;
  const VecU a = u & 0x7fffffffu;
  const VecU normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // adding 0.5 aligns the last bit of a subnormal half with the last bit of a float in [0.5, 1)
  const VecU tiny = bit_cast<VecU>(bit_cast<VecF>(a) + splat(0.5f)) - 0x3f000000u;
  VecU r = (VecI)(a < 0x38800000u) ? tiny : normal;
  r = (VecI)(a >= 0x47800000u) ? splat_u(0x7c00u) : r;
  r = (VecI)(a > 0x7f800000u) ? splat_u(0x7e00u) : r;
  return narrow(r | sign);
#endif
}

// ---- loads and stores: any alignment; *_n touches only the first n lanes and zero-fills the rest

DF_INLINE VecF loadu(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
DF_INLINE void storeu(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof v); }

DF_INLINE VecF loadu(const bf16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  return from_bf16(h);
}
DF_INLINE void storeu(bf16* p, VecF v) {
  const VecH h = to_bf16(v);
  __builtin_memcpy(p, &h, sizeof h);
}

DF_INLINE VecF loadu(const fp16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  return from_fp16(h);
}
DF_INLINE void storeu(fp16* p, VecF v) {
  const VecH h = to_fp16(v);
  __builtin_memcpy(p, &h, sizeof h);
}

DF_INLINE VecF load_n(const float* p, int n) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
#elif defined(__AVX2__)
  return (VecF)_mm256_maskload_ps(p, (__m256i)(lane_index() < splat_i(n)));
#else
  VecF v = {};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
DF_INLINE void store_n(float* p, VecF v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

template <typename Half>
DF_INLINE VecF load_n(const Half* p, int n) {
  Half buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return loadu(buffer);
}
template <typename Half>
DF_INLINE void store_n(Half* p, VecF v, int n) {
  Half buffer[kLanes];
  storeu(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

// the first n elements, or a whole vector of more; of none, zeros
template <typename T>
DF_INLINE VecF load_part(const T* p, int64_t n) {
  return n >= kLanes ? loadu(p) : n > 0 ? load_n(p, static_cast<int>(n)) : VecF{};
}
template <typename T>
DF_INLINE void store_part(T* p, VecF v, int64_t n) {
  if (n >= kLanes)
    storeu(p, v);
  else if (n > 0)
    store_n(p, v, static_cast<int>(n));
}

// The first n lanes of p; the others -Inf, which neither raise a maximum nor add to a sum of exponentials.
template <typename T>
DF_INLINE VecF load_tail(const T* p, int n) {
  return lane_index() < splat_i(n) ? load_n(p, n) : splat(-__builtin_inff());
}

// one element
DF_INLINE float load1(const float* p) { return *p; }
DF_INLINE float load1(const bf16* p) { return bit_cast<float>(static_cast<uint32_t>(p->bits) << 16); }
DF_INLINE float load1(const fp16* p) { return load_n(p, 1)[0]; }
DF_INLINE void store1(float* p, float x) { *p = x; }
DF_INLINE void store1(bf16* p, float x) { p->bits = to_bf16(splat(x))[0]; }
DF_INLINE void store1(fp16* p, float x) { p->bits = to_fp16(splat(x))[0]; }

// ---- transposition

// v[i][j] <-> v[j][i], in log2(kLanes) rounds that interleave the halves of the list
DF_INLINE void transpose(VecU (&v)[kLanes]) {
  VecU low = {}, high = {};
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  for (int width = 1; width < kLanes; width *= 2) {
    VecU w[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      w[2 * i] = __builtin_shuffle(v[i], v[i + kLanes / 2], low);
      w[2 * i + 1] = __builtin_shuffle(v[i], v[i + kLanes / 2], high);
    }
    for (int i = 0; i < kLanes; ++i) v[i] = w[i];
  }
}

// The four words of each lane, one after the other: lane 4 j + i becomes words 4 j ... 4 j + 3 of result i. In blocks
// of 128 bits, where shuffles are cheap.
DF_INLINE void join_words(VecU (&out)[4], const VecU (&word)[4]) {
  VecI low = {};
  VecL low_pair = {};
  for (int i = 0; i < kLanes; ++i) low[i] = i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes;
  for (int i = 0; i < kLanes / 2; ++i) low_pair[i] = i / 2 * 2 + i % 2 * (kLanes / 2);
  for (int i = 0; i < 2; ++i) {
    const VecL first = (VecL)__builtin_shuffle(word[0], word[1], low + 2 * i);
    const VecL second = (VecL)__builtin_shuffle(word[2], word[3], low + 2 * i);
    out[2 * i] = (VecU)__builtin_shuffle(first, second, low_pair);
    out[2 * i + 1] = (VecU)__builtin_shuffle(first, second, low_pair + 1);
  }
}

// 32-bit words [kLanes, kLanes]; leading dimensions in words
DF_INLINE void transpose_block(void* to, int64_t ldt, const void* from, int64_t ldf) {
  VecU v[kLanes];
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(&v[i], static_cast<const uint32_t*>(from) + i * ldf, sizeof(VecU));
  transpose(v);
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(static_cast<uint32_t*>(to) + i * ldt, &v[i], sizeof(VecU));
}

// ---- reductions over lanes, in a fixed order

DF_INLINE float hsum(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 a = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
#else
  float a[kLanes];
  storeu(a, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
#endif
}
DF_INLINE float hmax(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 a = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
#else
  float a[kLanes];
  storeu(a, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] = a[i] > a[i + width] ? a[i] : a[i + width];
  return a[0];
#endif
}

// lane i: the sum over the lanes of v[i], in a fixed order; rounds as those of transpose, added up. v is lost.
DF_INLINE VecF sums_of(VecF (&v)[kLanes]) {
  VecI low = {};
  for (int i = 0; i < kLanes; ++i) low[i] = i / 2 + i % 2 * kLanes;
  const VecI high = low + kLanes / 2;
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      v[i] = __builtin_shuffle(v[i], v[i + half], low) + __builtin_shuffle(v[i], v[i + half], high);
  return v[0];
}

// Within its scope this thread takes subnormal numbers for zero and makes none: one of them in a vector may cost some
// 150 cycles, and low temperatures make many.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
#endif
};

// ---- elementary functions (coefficients: Cephes, S. Moshier), about 1 ulp

DF_INLINE VecF round_to_int(VecF x) {  // |x| < 2^22, ties to even
  const VecF magic = splat(12582912.0f);
  return (x + magic) - magic;
}

// e^r for |r| <= ln(2) / 2
DF_INLINE VecF exp_reduced(VecF r) {
  VecF p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  return p * (r * r) + r + splat(1.0f);
}

// Below it exp gives 0. The clamp sits there too: one subnormal result in a vector would cost some 150 cycles.
constexpr float kExpZeroBelow = -87.3f;

// exp(x); below -87.3 gives 0 (so that -Inf masks vanish), above 88.7 gives Inf, NaN stays NaN.
DF_INLINE VecF exp(VecF x) {
#if defined(__AVX512F__)  // rounding and scaling by 2^n are instructions; the second operand of max and min keeps NaN
  const __m512 clamped = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(kExpZeroBelow), (__m512)x));
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(clamped, _mm512_set1_ps(kLog2e)),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  VecF r = (VecF)clamped - (VecF)whole * splat(0.693359375f);
  r = r - (VecF)whole * splat(-2.12194440e-4f);
  const VecF p = exp_reduced(r);
  const __mmask16 tiny = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kExpZeroBelow), _CMP_LT_OQ);
  return (VecF)_mm512_mask_mov_ps(_mm512_scalef_ps((__m512)p, whole), tiny, _mm512_setzero_ps());
#else
  const VecF clamped = vmin(vmax(x, splat(kExpZeroBelow)), splat(88.75f));
  const VecF n = round_to_int(clamped * splat(kLog2e));
  VecF r = clamped - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  const VecF p = exp_reduced(r);
  // 2^n in two factors: n may be 128
  const VecI e = __builtin_convertvector(n, VecI);
  const VecI half = e >> 1;
  const VecF y = p * bit_cast<VecF>((half + 127) << 23) * bit_cast<VecF>((e - half + 127) << 23);
  const VecF low = x < splat(kExpZeroBelow) ? splat(0.0f) : y;
  const VecF high = x > splat(88.72283f) ? splat(__builtin_inff()) : low;
  return x != x ? x : high;
#endif
}

// 2^x for x <= 127, about 1 ulp; below -126 gives 2^-126, since subnormals are slow; NaN stays NaN.
DF_INLINE VecF exp2_fast(VecF x) {
  x = vmax(splat(-126.0f), x);  // the second operand keeps NaN
#if defined(__AVX512F__)
  const VecF n = (VecF)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VecF biased = x + splat(12582912.0f + 127.0f);  // its last nine bits are n + 127
  const VecF n = biased - splat(12582912.0f + 127.0f);
#endif
  const VecF r = x - n;
  VecF p = splat(1.535336188319500e-4f);
  p = p * r + splat(1.339887440266574e-3f);
  p = p * r + splat(9.618437357674640e-3f);
  p = p * r + splat(5.550332471162809e-2f);
  p = p * r + splat(2.402264791363012e-1f);
  p = p * r + splat(6.931472028550421e-1f);
  p = p * r + splat(1.0f);
#if defined(__AVX512F__)
  return (VecF)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * bit_cast<VecF>(bit_cast<VecU>(biased) << 23);
#endif
}

// ln((1 + m) * 2^ef) for m in [sqrt(1/2) - 1, sqrt(2) - 1], in place of m. N vectors side by side: one alone would wait
// for its own chain of products.
template <int N>
DF_INLINE void log_reduced(VecF (&m)[N], const VecF (&ef)[N]) {
  constexpr float kCoefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                                     -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  VecF p[N];
  for (int k = 0; k < N; ++k) p[k] = splat(7.0376836292e-2f);
  for (const float c : kCoefficients)
    for (int k = 0; k < N; ++k) p[k] = p[k] * m[k] + splat(c);
  for (int k = 0; k < N; ++k) {
    const VecF z = m[k] * m[k];
    p[k] = p[k] * m[k] * z + ef[k] * splat(-2.12194440e-4f);
    p[k] = p[k] - splat(0.5f) * z;
  }
  for (int k = 0; k < N; ++k) m[k] = m[k] + p[k] + ef[k] * splat(0.693359375f);
}
DF_INLINE VecF log_reduced(VecF m, VecF ef) {
  VecF result[1] = {m};
  const VecF exponent[1] = {ef};
  log_reduced(result, exponent);
  return result[0];
}

// Normal, finite x > 0 as (1 + m) 2^e with 1 + m in [sqrt(1/2), sqrt(2)); x becomes m.
DF_INLINE VecI split_exponent(VecF& x) {
  const VecI bits = bit_cast<VecI>(x), e = (bits - 0x3f3504f3) >> 23;
  x = bit_cast<VecF>(bits - (e << 23)) - splat(1.0f);
  return e;
}

// log(x) for x > 0; 0 gives -Inf, negative and NaN give NaN, Inf stays Inf. Accurate near 1 (relative to the result).
DF_INLINE VecF log(VecF x) {
  const VecI tiny = x < splat(1.17549435e-38f);
  const VecF scaled = tiny ? x * splat(0x1p25f) : x;
  const VecU u = bit_cast<VecU>(scaled);
  VecI e = bit_cast<VecI>(u >> 23) - 126 - (tiny & 25);
  VecF m = bit_cast<VecF>((u & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  const VecI small = m < splat(0.707106781186547524f);
  e = e + small;  // minus one where small
  m = (small ? m + m : m) - splat(1.0f);
  VecF y = log_reduced(m, __builtin_convertvector(e, VecF));
  y = x == splat(__builtin_inff()) ? x : y;
  y = x == splat(0.0f) ? splat(-__builtin_inff()) : y;
  return (VecI)(x < splat(0.0f)) | (VecI)(x != x) ? splat(__builtin_nanf("")) : y;
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast
