// SPDX-License-Identifier: MIT
// The two parts of a row's softmax: the text's, 16 rows of a warp on tensor cores, and the image window's, one row of a
// warp by vectors. Exponents are those of 2.
#pragma once

#include "../core/mma.cuh"
#include "window.cuh"

namespace dalle_fast::decode_attention {

// kLarge: more of a window in flight, where two blocks an SM (one of 256 channels) have the memory for it.
template <typename T, int kDim, bool kLarge>
struct Shape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr bool kHasSmall = kDim == 64 || kDim == 256 || (kWide && kDim == 128);
  static_assert(kLarge || kHasSmall, "no such plan");
  static constexpr int kWarps = kWide && kDim == 256 && !kLarge ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kChannels = kDim;
  static constexpr int kChunk = 16 / sizeof(T);  // elements of a 16-byte load
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kStride = kTileStride<kDim, T>;  // of rows in shared memory
  // rows of a block, where there are many
  static constexpr int kManyRows = kDim == 256 ? 16 : 16 * kWarps;

  // text: two stages of tiles of keys and values
  static constexpr int kKeys = (kDim == 256 ? 32 : 64) / (kWide ? 2 : 1);
  static constexpr int kTile = kKeys * kStride;
  static constexpr int kTileBytes = 4 * kTile * static_cast<int>(sizeof(T));
  static constexpr int kStep = kWide ? 8 : 16;                                    // keys of one product
  static constexpr int kShare = kKeys / kWarps > kStep ? kKeys / kWarps : kStep;  // of a warp that has its own keys

  // softmax parts, 16 of a warp; behind the channels of each its row_max and row_sum
  static constexpr int kPartStride = kDim + 8;
  static constexpr int kPartBytes = 16 * kWarps * kPartStride * static_cast<int>(sizeof(float));

  // windows: a warp loads kLoads x kTogether keys at once, kLanes lanes each with kPer chunks of a key
  static constexpr int kLanes = kChunks < 32 ? kChunks : 32;
  static constexpr int kPer = kChunks / kLanes;
  static constexpr int kTogether = 32 / kLanes;
  static constexpr int kManyLoads = kTogether > 4 ? 32 / kTogether : (kDim <= 64 ? 8 : 4) / kPer;
  static constexpr int kFewLoads = kDim == 256 ? 2 : kDim == 128 ? 3 : 4;
  static constexpr int kLoads = kLarge ? kManyLoads : kFewLoads;
  static constexpr int kBatch = kLoads * kTogether;
  static constexpr int kHeld = kPer * kChunk;                  // channels of a lane
  static constexpr int kStage = 2 * (kLoads + 1) * kPer * 32;  // vectors: keys, values; one load more for the new token
  static constexpr int kWindowBytes = 2 * kStage * kWarps * 16;

  // windows follow the parts, which follow the text
  static constexpr int kWorkBytes = kTileBytes > kPartBytes + kWindowBytes ? kTileBytes : kPartBytes + kWindowBytes;
  static constexpr int kBlocks = kDim == 256 ? 1 : 2;  // resident, where the device has the memory
  static constexpr std::size_t bytes(int rows) {
    return kWorkBytes + sizeof(T) * static_cast<std::size_t>(rows * kStride);
  }
};

struct alignas(8) RowStats {
  float row_max, row_sum;
};

// combined with the lanes whose numbers differ in some of the bits first, 2 * first, ... below end
template <int kFirst, int kEnd, typename F>
__device__ __forceinline__ float across(float x, F combine) {
  DF_UNROLL
  for (int bits = kFirst; bits < kEnd; bits *= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, bits));
  return x;
}
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }  // a NaN in a leaves b
__device__ __forceinline__ float add(float a, float b) { return a + b; }
// what exponents are taken relative to
__device__ __forceinline__ float shift_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// s[0] += q . keys^T
template <int kCount, int kDim, typename T, std::enable_if_t<sizeof(T) == 2, int> = 0>
__device__ __forceinline__ void score(float (&s)[1][kCount / 8][4], const T* q, const T* keys) {
  multiply_transposed<kDim>(s, [&](uint32_t* a, int, int c) { load_a<kDim>(a, q, 0, c); }, keys, 0);
}
template <int kCount, int kDim>
__device__ __forceinline__ void score(float (&s)[1][kCount / 8][4], const float* q, const float* keys) {
  constexpr int kStride = kTileStride<kDim, float>;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  DF_UNROLL
  for (int k = 0; k < kDim; k += 8) {
    uint32_t a[2][4];
    DF_UNROLL
    for (int i = 0; i < 4; ++i) split_tf32(a[0][i], a[1][i], q[(g + i % 2 * 8) * kStride + k + t + i / 2 * 4]);
    DF_UNROLL
    for (int n = 0; n < kCount / 8; ++n) {
      uint32_t b[2][2];
      DF_UNROLL
      for (int i = 0; i < 2; ++i) split_tf32(b[0][i], b[1][i], keys[(n * 8 + g) * kStride + k + t + i * 4]);
      multiply_split(s[0][n], a, b);
    }
  }
}

// out = out * keep + weights . values
template <int kCount, int kDim, typename T, std::enable_if_t<sizeof(T) == 2, int> = 0>
__device__ __forceinline__ void accumulate(float (&out)[kDim / 8][4], const float* keep,
                                           const float (&weights)[1][kCount / 8][4], const T* values) {
  DF_UNROLL
  for (int n = 0; n < kDim / 8; ++n)
    for (int i = 0; i < 4; ++i) out[n][i] *= keep[i / 2];
  multiply_add<kDim>(&out, weights, values, 0);
}
// Columns t and t + 4 of a fragment of weights are keys 2t and 2t + 1: what a C fragment holds. The sum of a tile is
// made apart, because tensor cores round sums towards zero, unless registers are short.
template <int kCount, int kDim>
__device__ __forceinline__ void accumulate(float (&out)[kDim / 8][4], const float* keep,
                                           const float (&weights)[1][kCount / 8][4], const float* values) {
  constexpr int kStride = kTileStride<kDim, float>;
  constexpr bool kApart = kDim < 256;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint32_t a[kCount / 8][2][4];
  DF_UNROLL
  for (int k = 0; k < kCount / 8; ++k)
    for (int i = 0; i < 4; ++i) split_tf32(a[k][0][i], a[k][1][i], weights[0][k][i % 2 * 2 + i / 2]);
  DF_UNROLL
  for (int n = 0; n < kDim / 8; ++n) {
    float c[4] = {};
    DF_UNROLL
    for (int i = 0; i < 4; ++i) out[n][i] *= keep[i / 2];
    DF_UNROLL
    for (int k = 0; k < kCount / 8; ++k) {
      uint32_t b[2][2];
      DF_UNROLL
      for (int i = 0; i < 2; ++i) split_tf32(b[0][i], b[1][i], values[(k * 8 + 2 * t + i) * kStride + n * 8 + g]);
      multiply_split(kApart ? c : out[n], a[k], b);
    }
    DF_UNROLL
    for (int i = 0; i < 4; ++i) out[n][i] += c[i];
  }
}

// The text's part of the softmax of a warp's 16 rows, as C fragments; exponents are those of 2.
template <int kDim>
struct TextPart {
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, out[kDim / 8][4] = {};

  // Keys and values of kCount rows of a tile, the first `there` of which exist.
  template <int kCount, typename T>
  __device__ __forceinline__ void add_keys(const T* q, const T* keys, const T* values, int there, float factor) {
    float scores[1][kCount / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, shift[2], keep[2];
    float (&s)[kCount / 8][4] = scores[0];
    score<kCount, kDim>(scores, q, keys);
    DF_UNROLL
    for (int n = 0; n < kCount / 8; ++n)
      for (int i = 0; i < 4; ++i) {
        const int key = n * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2;
        s[n][i] = key < there ? s[n][i] * factor : -INFINITY;
        top[i / 2] = larger(s[n][i], top[i / 2]);
      }
    DF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float now = larger(across<1, 4>(top[i], larger), largest[i]);
      shift[i] = shift_of(now);
      keep[i] = fast_exp2(largest[i] - shift[i]);
      largest[i] = now;
      sum[i] *= keep[i];
    }
    DF_UNROLL
    for (int n = 0; n < kCount / 8; ++n)
      for (int i = 0; i < 4; ++i) {
        s[n][i] = fast_exp2(s[n][i] - shift[i / 2]);
        sum[i / 2] += s[n][i];
      }
    accumulate<kCount, kDim>(out, keep, scores, values);
  }
};

// ---- the window, by vectors

// Row i of a tensor; the launch sees to it that the stride of vectors fits 32 bits, in bytes.
template <bool kVectors, typename T>
__device__ __forceinline__ const T* row_at(const T* base, int i, int64_t stride) {
  if constexpr (kVectors)
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) +
                                      static_cast<uint64_t>(static_cast<uint32_t>(i)) *
                                          (static_cast<uint32_t>(stride) * static_cast<uint32_t>(sizeof(T))));
  else
    return base + i * stride;
}

template <typename T>
__device__ __forceinline__ void unpack_chunk(float* x, const Vector16& chunk) {
  DF_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = chunk.word[i];
    if constexpr (sizeof(T) == 4) {
      x[i] = bits_float(word);
    } else {
      x[2 * i] = to_float(T{static_cast<uint16_t>(word)});
      x[2 * i + 1] = to_float(T{static_cast<uint16_t>(word >> 16)});
    }
  }
}
// A part of one row's softmax, spread over a warp: lane l has chunks l % kLanes, + kLanes, ... of the channels.
template <typename S, typename T>
struct RowPart {
  float largest = -INFINITY, sum = 0.0f, out[S::kHeld] = {};

  __device__ __forceinline__ static int channel(int u) {
    return (static_cast<int>(threadIdx.x) % S::kLanes + u * S::kLanes) * S::kChunk;
  }
  // part i of those in shared memory
  __device__ __forceinline__ void merge(const float* parts, int i) {
    const float* part = parts + i * S::kPartStride;
    const RowStats its = *reinterpret_cast<const RowStats*>(part + S::kChannels);
    const float now = larger(its.row_max, largest), shift = shift_of(now);
    const float keep = fast_exp2(largest - shift), weight = fast_exp2(its.row_max - shift);
    largest = now;
    sum = sum * keep + its.row_sum * weight;
    DF_UNROLL
    for (int j = 0; j < S::kHeld; ++j) out[j] = out[j] * keep + part[channel(j / S::kChunk) + j % S::kChunk] * weight;
  }
  __device__ __forceinline__ void store(float* parts, int i) const {
    float* part = parts + i * S::kPartStride;
    __syncwarp();  // everybody has merged what was there
    if (threadIdx.x % 32 < S::kLanes) {
      DF_UNROLL
      for (int j = 0; j < S::kHeld; ++j) part[channel(j / S::kChunk) + j % S::kChunk] = out[j];
    }
    if (threadIdx.x % 32 == 0) *reinterpret_cast<RowStats*>(part + S::kChannels) = {largest, sum};
    __syncwarp();
  }

  // A stage of keys and values: load i has the keys i x kTogether + lane / kLanes of a batch, if their bits are set in
  // `there`, and the last one the new token, if it is `first`.
  __device__ __forceinline__ RowPart(const float* q, const Vector16* stage, unsigned there, bool first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    there >>= lane / S::kLanes;
    const Vector16* const keys = stage + lane;
    const Vector16* const values = keys + S::kStage / 2;
    float s[S::kLoads + 1];
    DF_UNROLL
    for (int i = 0; i <= S::kLoads; ++i) {
      s[i] = 0.0f;
      DF_UNROLL
      for (int u = 0; u < S::kPer; ++u) {
        float x[S::kChunk];
        unpack_chunk<T>(x, keys[(i * S::kPer + u) * 32]);
        DF_UNROLL
        for (int j = 0; j < S::kChunk; ++j) s[i] += q[u * S::kChunk + j] * x[j];
      }
      s[i] = across<1, S::kLanes>(s[i], add);
      if (!(i < S::kLoads ? there >> i * S::kTogether & 1u : first && lane < S::kLanes)) s[i] = -INFINITY;
      largest = larger(s[i], largest);
    }
    largest = across<S::kLanes, 32>(largest, larger);
    const float shift = shift_of(largest);
    DF_UNROLL
    for (int i = 0; i <= S::kLoads; ++i) {
      const float weight = fast_exp2(s[i] - shift);
      sum += weight;
      DF_UNROLL
      for (int u = 0; u < S::kPer; ++u) {
        float x[S::kChunk];
        unpack_chunk<T>(x, values[(i * S::kPer + u) * 32]);
        DF_UNROLL
        for (int j = 0; j < S::kChunk; ++j) out[u * S::kChunk + j] += weight * x[j];
      }
    }
    sum = across<S::kLanes, 32>(sum, add);
    DF_UNROLL
    for (int i = 0; i < S::kHeld; ++i) out[i] = across<S::kLanes, 32>(out[i], add);
  }
  RowPart() = default;
};

}  // namespace dalle_fast::decode_attention
