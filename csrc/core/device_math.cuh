// SPDX-License-Identifier: MIT
// What kernels of several rooms share: 16-bit loads and stores, fast functions, dtypes, tables of work.
#pragma once

#include <type_traits>

#include "../scalar/minifloat.h"
#include "device.cuh"
#include "tensor.h"

namespace dalle_fast {

struct alignas(16) Vector16 {
  uint32_t word[4];
};

// Four elements that are loaded and stored at once.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// What one 16-byte access moves.
template <typename T>
struct alignas(16) PieceOf {
  static constexpr int kCount = 16 / sizeof(T);
  T at[kCount];
};

// Whether lines of `length` elements, `stride` apart, are made of aligned pieces.
template <typename T>
bool has_pieces(const void* base, int64_t stride, int64_t length) {
  constexpr int64_t kCount = PieceOf<T>::kCount;
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % kCount == 0 && length % kCount == 0;
}

// The vector that begins at element `index`, a multiple of its length, of aligned memory. Counted in vectors, nvcc sees
// the alignment of a store; by way of a pointer to the element it may write 4 bytes at a time.
template <typename Vector, typename T>
__device__ __forceinline__ Vector& vector_at(T* base, int64_t index) {
  return reinterpret_cast<Vector*>(base)[static_cast<uint64_t>(index) / (sizeof(Vector) / sizeof(T))];
}

struct bf16_t {
  uint16_t bits;
};
struct fp16_t {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16_t x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(fp16_t x) {  // exact, subnormals, Inf and NaN included
#if defined(DF_SIMT)
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  if (magnitude >= (0x7c00u << 13)) return bits_float(sign | (magnitude + (224u << 23)));
  return bits_float(sign | float_bits(bits_float(magnitude) * 0x1p112f));
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

__device__ __forceinline__ void from_float(float* to, float x) { *to = x; }
#if defined(DF_SIMT)
__device__ __forceinline__ void from_float(bf16_t* to, float x) {  // nearest even; NaN stays NaN
  const uint32_t u = float_bits(x);
  to->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
__device__ __forceinline__ void from_float(fp16_t* to, float x) {  // nearest even, gradual underflow, overflow to Inf
  const uint32_t u = float_bits(x), a = u & 0x7fffffffu;
  uint32_t r;
  if (a > 0x7f800000u)
    r = 0x7e00u;
  else if (a >= 0x47800000u)
    r = 0x7c00u;
  else if (a < 0x38800000u)  // adding 0.5 aligns the last bit of a subnormal half with that of a float in [0.5, 1)
    r = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;
  else
    r = (a - (112u << 23) + 0xfffu + (a >> 13 & 1u)) >> 13;
  to->bits = static_cast<uint16_t>(r | (u >> 16 & 0x8000u));
}
#else
__device__ __forceinline__ void from_float(bf16_t* to, float x) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
}
__device__ __forceinline__ void from_float(fp16_t* to, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
}
#endif

// Two 16-bit elements in a word.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
#if defined(DF_SIMT)
  T a, b;
  from_float(&a, low);
  from_float(&b, high);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
#else
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16_t>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}
template <typename T>
__device__ __forceinline__ float unpack(uint32_t pair, int which) {
  if constexpr (std::is_same_v<T, bf16_t>)
    return bits_float(which ? pair & 0xffff0000u : pair << 16);
  else
    return to_float(T{static_cast<uint16_t>(pair >> 16 * which)});
}

// 2^x, about 2 ulp; what would be subnormal is 0
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float fast_exp2(float x) {
#if defined(DF_SIMT)
  return x < -126.0f ? 0.0f : exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log2 of a normal x > 0, off by at most 2^-22 between 1/2 and 2, elsewhere by 2 ulp. The executor's is made as coarse.
__device__ __forceinline__ float fast_log2(float x) {
#if defined(DF_SIMT)
  const float y = log2f(x);
  return fabsf(y) < 1.0f ? rintf(y * 0x1p21f) * 0x1p-21f : bits_float((float_bits(y) + 2u) & ~3u);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Brings the line of an address into the second-level cache, if there is time.
__device__ __forceinline__ void prefetch_line(const void* at) {
#if !defined(DF_SIMT)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#else
  (void)at;
#endif
}

// Root and quotient within 2 ulp (of the quotient below 2^126), a third of the instructions of the exact ones.
__device__ __forceinline__ float fast_sqrt(float x) {
#if defined(DF_SIMT)
  return sqrtf(x);
#else
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float fast_divide(float a, float b) {
#if defined(DF_SIMT)
  return a / b;
#else
  return __fdividef(a, b);
#endif
}

// Division of n in [0, 2^31) by a constant: a product and a shift (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t magic = 1, shift = 0;
  Divisor() = default;
  explicit Divisor(uint32_t by) {
    while ((uint64_t{1} << shift) < by) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }
  __device__ __forceinline__ int divide(int n) const {
    const auto u = static_cast<uint32_t>(n);
    return static_cast<int>((__umulhi(u, magic) + u) >> shift);
  }
};

// f(T{}) with the element type T of a floating tensor.
template <typename F>
void with_element_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(bf16_t{});
    case DType::kFloat16: return f(fp16_t{});
    default: return f(float{});
  }
}

// Items that share a launch, each with its own number of blocks; travels as a kernel argument.
template <typename Item, int kCapacity>
struct LaunchTable {
  Item item[kCapacity];
  unsigned first_block[kCapacity];
  int count;
  unsigned blocks;

  void add(const Item& one, int64_t its_blocks) {
    item[count] = one;
    first_block[count++] = blocks;
    blocks += static_cast<unsigned>(its_blocks);
  }
  bool full() const { return count == kCapacity; }
  // the last item whose first block is not behind `block`
  __device__ __forceinline__ int of_block(unsigned block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_block[middle] <= block ? low : high) = middle;
    }
    return low;
  }
};

}  // namespace dalle_fast
