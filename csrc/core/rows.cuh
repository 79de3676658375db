// SPDX-License-Identifier: MIT
// Kernels over dense rows: blocks of (threads of a row, rows), elements in pieces of 16 bytes, softmax statistics in
// base 2, and sums over the threads of a row in a fixed order. Rows of at most kMaxHeld elements stay in registers.
#pragma once

#include <cfloat>

#include "device_math.cuh"

namespace dalle_fast {

constexpr int kHeld = 32;  // elements a thread holds
constexpr int kMaxRowThreads = 512, kMaxHeld = kMaxRowThreads * kHeld;

struct RowLaunch {
  dim3 block;
  unsigned blocks;
  bool full;  // every thread holds kHeld elements

  // A warp for a short row, eight of them in a block; otherwise a block for a row.
  RowLaunch(int64_t rows, int64_t count) {
    const int64_t warps = count ? (count + 32 * kHeld - 1) / (32 * kHeld) : 1;
    block = dim3(static_cast<unsigned>(32 * warps < kMaxRowThreads ? 32 * warps : kMaxRowThreads), warps == 1 ? 8 : 1);
    blocks = static_cast<unsigned>((rows + block.y - 1) / block.y);
    full = count == static_cast<int64_t>(block.x) * kHeld;
  }
};

__device__ __forceinline__ int64_t row_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// ---- pieces

template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t word[kWords];
};
using Piece = Words<4>;

template <typename T>
inline constexpr int kPiece = 16 / static_cast<int>(sizeof(T));  // elements

// How rows lie in memory: as whole, aligned pieces, kHeld elements for every thread; as such pieces; otherwise.
enum class Rows { kFull, kPieces, kElements };

template <typename T>
bool rows_are_pieces(const void* rows, int64_t count, int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(rows) % 16 == 0 && count % kPiece<T> == 0 && stride % kPiece<T> == 0;
}

// f(std::integral_constant<Rows, ...>)
template <typename F>
void with_rows(bool pieces, bool full, F&& f) {
  if (!pieces) return f(std::integral_constant<Rows, Rows::kElements>{});
  full ? f(std::integral_constant<Rows, Rows::kFull>{}) : f(std::integral_constant<Rows, Rows::kPieces>{});
}

// f(std::integral_constant<Rows, ...>), for kernels that hold no whole row
template <typename F>
void with_pieces(bool pieces, F&& f) {
  pieces ? f(std::integral_constant<Rows, Rows::kPieces>{}) : f(std::integral_constant<Rows, Rows::kElements>{});
}

__device__ __forceinline__ uint32_t bits_of(float x) { return float_bits(x); }
template <typename T>
__device__ __forceinline__ uint32_t bits_of(T x) {
  return x.bits;
}

// By value: given the place, nvcc would read it word by word.
template <typename T>
__device__ __forceinline__ void unpack_piece(float* v, const Piece raw) {
  DF_UNROLL
  for (int i = 0; i < kPiece<T>; ++i) {
    if constexpr (sizeof(T) == 4)
      v[i] = bits_float(raw.word[i]);
    else
      v[i] = unpack<T>(raw.word[i / 2], i % 2);
  }
}

// kCount elements as words
template <typename T, int kCount>
__device__ __forceinline__ auto pack(const float (&v)[kCount]) {
  constexpr int kInWord = 4 / static_cast<int>(sizeof(T));
  Words<kCount / kInWord> raw;
  DF_UNROLL
  for (int i = 0; i < kCount; i += kInWord) {
    if constexpr (kInWord == 1)
      raw.word[i] = float_bits(v[i]);
    else
      raw.word[i / 2] = pack2<T>(v[i], v[i + 1]);
  }
  return raw;
}

// Elements [at, at + kPiece) of a row of `count`, packed; what does not exist is zero.
template <Rows kRows, typename T>
__device__ __forceinline__ Piece load_piece(const T* row, int at, int count) {
  if constexpr (kRows != Rows::kElements) {
    return *reinterpret_cast<const Piece*>(row + at);
  } else {
    constexpr int kInWord = 4 / static_cast<int>(sizeof(T));
    Piece raw{};
    DF_UNROLL
    for (int i = 0; i < kPiece<T>; ++i)
      if (at + i < count) raw.word[i / kInWord] |= bits_of(row[at + i]) << 16 * (i % kInWord);
    return raw;
  }
}

// The same as floats, where what does not exist is -Inf: it adds nothing to a softmax.
template <Rows kRows, typename T>
__device__ __forceinline__ void unpack_codes(float* v, const Piece raw, int at, int count) {
  unpack_piece<T>(v, raw);
  if constexpr (kRows == Rows::kElements) {
    DF_UNROLL
    for (int i = 0; i < kPiece<T>; ++i) v[i] = at + i < count ? v[i] : -INFINITY;
  }
}

// Elements [at, at + kCount) of a row of `count`, as far as they exist
template <Rows kRows, typename T, int kCount>
__device__ __forceinline__ void store_piece(T* row, int at, int count, const float (&v)[kCount]) {
  if constexpr (kRows != Rows::kElements) {
    const auto raw = pack<T>(v);
    *reinterpret_cast<std::remove_const_t<decltype(raw)>*>(row + at) = raw;
  } else {
    DF_UNROLL
    for (int i = 0; i < kCount; ++i)
      if (at + i < count) from_float(&row[at + i], v[i]);
  }
}

// ---- softmax

__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * kLog2e); }

// Sum of 2^(t - shift), where all terms use the same rounded shift, so that its rounding cancels. A t of -Inf adds
// nothing; NaN or Inf spoil the sum, as in torch.softmax, and so does a row of -Inf: its sum is 0.
struct SoftmaxState {
  float shift, sum;
};
constexpr SoftmaxState kNoSoftmax{-FLT_MAX, 0.0f};

__device__ __forceinline__ float softmax_shift(float largest) { return fmaxf(largest, -FLT_MAX); }

// Adds t = factor * v to the sums of kRows rows. A shift need not be the maximum, only near it: they stay while no term
// passes 2^24.
template <int kRows, int kCount>
__device__ __forceinline__ void softmax_add(SoftmaxState* state, const float (*v)[kCount], float factor) {
  constexpr float kSlack = 24.0f;
  float largest[kRows], most = -INFINITY;
  DF_UNROLL
  for (int r = 0; r < kRows; ++r) {
    largest[r] = v[r][0];
    DF_UNROLL
    for (int i = 1; i < kCount; ++i) largest[r] = fmaxf(largest[r], v[r][i]);
    most = fmaxf(most, fmaf(largest[r], factor, -state[r].shift));
  }
  if (most > kSlack) {
    DF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float shift = fmaxf(state[r].shift, largest[r] * factor);
      state[r].sum *= fast_exp2(state[r].shift - shift);
      state[r].shift = shift;
    }
  }
  DF_UNROLL
  for (int r = 0; r < kRows; ++r) {
    DF_UNROLL
    for (int i = 0; i < kCount; ++i) state[r].sum += fast_exp2(fmaf(v[r][i], factor, -state[r].shift));
  }
}

// ---- over the threads of a row

struct Add {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Larger {  // of NaN and a number the number
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over the lanes that differ in bits `from` and above; all of them get the same bits.
template <typename T, typename Combine>
__device__ __forceinline__ T over_lanes(T x, Combine combine, unsigned from = 1) {
  DF_UNROLL
  for (unsigned bits = 16; bits > 0; bits /= 2)
    if (bits >= from) x = combine(x, __shfl_xor_sync(0xffffffffu, x, bits));
  return x;
}
__device__ __forceinline__ SoftmaxState over_lanes(SoftmaxState s, unsigned from = 1) {
  const float shift = over_lanes(s.shift, Larger{}, from);
  return {shift, over_lanes(s.sum * fast_exp2(s.shift - shift), Add{}, from)};
}
template <typename T>
__device__ __forceinline__ T over_lanes(T x) {
  return over_lanes(x, Add{});
}

// Over the row's threads, once in a kernel; `part` has a place for each warp.
template <typename T>
__device__ __forceinline__ T over_row(T x, T* part, T none) {
  x = over_lanes(x);
  if (blockDim.x == 32) return x;
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  return over_lanes(lane < blockDim.x / 32 ? part[lane] : none);
}

}  // namespace dalle_fast
