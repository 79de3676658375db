// SPDX-License-Identifier: MIT
// The two parts of a row's softmax: the text's, 16 rows of a warp on tensor cores, and the image window's, one row of a
// warp by vector loads. Exponents are those of 2.
#pragma once

#include "../core/mma.cuh"
#include "window.cuh"

namespace dalle_fast::decode_attention {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kMostRows = 16 * kWarps;  // of a block

template <typename T, int kDim>
struct Shape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kChunk = 16 / sizeof(T);  // elements of a 16-byte load
  static constexpr int kStride = kDim + kChunk;  // of rows in shared memory: eight at one column lie in other banks
  static constexpr int kKeys = (kDim == 256 ? 32 : 64) / (kWide ? 2 : 1);  // of a text tile
  static constexpr int kTile = kKeys * kStride;
  static constexpr int kStep = kWide ? 8 : 16;                                    // keys of one product
  static constexpr int kShare = kKeys / kWarps > kStep ? kKeys / kWarps : kStep;  // of a warp that has its own keys
  static constexpr int kPartStride = kDim + 8;
  static constexpr int kStageBytes = 4 * kTile * static_cast<int>(sizeof(T));  // two stages of keys and values
  static constexpr int kPartBytes = kMostRows * kPartStride * 4;
  static constexpr int kWorkBytes = kStageBytes > kPartBytes ? kStageBytes : kPartBytes;
  // blocks of a multiprocessor: as many as shared memory holds, and registers without spills
  static constexpr int kBlocks = kDim <= 64 ? 3 : kDim == 128 ? 2 : 1;
  // lanes of the window: kLanes of them share a key, each with kPer chunks of its channels
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kLanes = kChunks < 32 ? kChunks : 32;
  static constexpr int kPer = kChunks / kLanes;
  static constexpr int kTogether = 32 / kLanes;  // keys of a warp's load
  // loads of keys, and of values, in flight: what a row of 32 keys needs, or 16 chunks
  static constexpr int kLoads = kTogether > 4 ? 32 / kTogether : 8 / kPer;
  static constexpr int kHeld = kPer * kChunk;  // channels of a lane
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

// c += a . b for parts of float32, small products first
__device__ __forceinline__ void multiply_split(float* c, const uint32_t (*a)[4], const uint32_t (*b)[2]) {
  mma_16x8x8_tf32(c, a[0], b[1]);
  mma_16x8x8_tf32(c, a[1], b[0]);
  mma_16x8x8_tf32(c, a[0], b[0]);
}

// s[n] = q . keys^T
template <int kCount, int kDim, typename T>
__device__ __forceinline__ void score(float (*s)[4], const T* q, const T* keys) {
  multiply_transposed<kDim, kCount, T>(s, [&](uint32_t* a, int c) { load_a<kDim>(a, q, 0, c); }, keys);
}
template <int kCount, int kDim>
__device__ __forceinline__ void score(float (*s)[4], const float* q, const float* keys) {
  constexpr int kStride = Shape<float, kDim>::kStride;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  DF_UNROLL
  for (int n = 0; n < kCount / 8; ++n)
    for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
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
      multiply_split(s[n], a, b);
    }
  }
}

// out = out * keep + weights . values
template <int kCount, int kDim, typename T>
__device__ __forceinline__ void accumulate(float (*out)[4], const float* keep, const float (*weights)[4],
                                           const T* values) {
  DF_UNROLL
  for (int n = 0; n < kDim / 8; ++n)
    for (int i = 0; i < 4; ++i) out[n][i] *= keep[i / 2];
  multiply_add<kCount, kDim, T>(out, weights, values);
}
// Columns t and t + 4 of a fragment of weights are keys 2t and 2t + 1: what a C fragment holds. The sum of a tile is
// made apart, because tensor cores round sums towards zero.
template <int kCount, int kDim>
__device__ __forceinline__ void accumulate(float (*out)[4], const float* keep, const float (*weights)[4],
                                           const float* values) {
  constexpr int kStride = Shape<float, kDim>::kStride;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint32_t a[kCount / 8][2][4];
  DF_UNROLL
  for (int k = 0; k < kCount / 8; ++k)
    for (int i = 0; i < 4; ++i) split_tf32(a[k][0][i], a[k][1][i], weights[k][i % 2 * 2 + i / 2]);
  DF_UNROLL
  for (int n = 0; n < kDim / 8; ++n) {
    float c[4] = {};
    DF_UNROLL
    for (int k = 0; k < kCount / 8; ++k) {
      uint32_t b[2][2];
      DF_UNROLL
      for (int i = 0; i < 2; ++i) split_tf32(b[0][i], b[1][i], values[(k * 8 + 2 * t + i) * kStride + n * 8 + g]);
      multiply_split(c, a[k], b);
    }
    DF_UNROLL
    for (int i = 0; i < 4; ++i) out[n][i] = out[n][i] * keep[i / 2] + c[i];
  }
}

// The text's part of the softmax of a warp's 16 rows, as C fragments; exponents are those of 2.
template <int kDim>
struct TextPart {
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, out[kDim / 8][4] = {};

  // Keys and values of kCount rows of a tile, the first `there` of which exist.
  template <int kCount, typename T>
  __device__ __forceinline__ void add_keys(const T* q, const T* keys, const T* values, int there, float factor) {
    float s[kCount / 8][4], top[2] = {-INFINITY, -INFINITY}, shift[2], keep[2];
    score<kCount, kDim>(s, q, keys);
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
    accumulate<kCount, kDim>(out, keep, s, values);
  }
};

// ---- the window, by vector loads

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

// 16 bytes of a row from channel c on; zeros where there is no row or no channel.
template <bool kVectors, typename T>
__device__ __forceinline__ Vector16 load_chunk(const T* row, int c, int dim) {
  constexpr int kChunk = 16 / sizeof(T);
  Vector16 chunk{};
  if (!row || c >= dim) return chunk;
  if constexpr (kVectors) {
    chunk = *reinterpret_cast<const Vector16*>(row + c);
  } else {
    DF_UNROLL
    for (int j = 0; j < kChunk; ++j) {
      if (c + j >= dim) continue;
      if constexpr (sizeof(T) == 4)
        chunk.word[j] = float_bits(row[c + j]);
      else
        chunk.word[j / 2] |= static_cast<uint32_t>(row[c + j].bits) << 16 * (j % 2);
    }
  }
  return chunk;
}
template <bool kVectors, typename T>
__device__ __forceinline__ void store_chunk(T* row, int c, int dim, const Vector16& chunk) {
  constexpr int kChunk = 16 / sizeof(T);
  if (c >= dim) return;
  if constexpr (kVectors) {
    *reinterpret_cast<Vector16*>(row + c) = chunk;
  } else {
    DF_UNROLL
    for (int j = 0; j < kChunk; ++j) {
      if (c + j >= dim) continue;
      if constexpr (sizeof(T) == 4)
        row[c + j] = bits_float(chunk.word[j]);
      else
        row[c + j].bits = static_cast<uint16_t>(chunk.word[j / 2] >> 16 * (j % 2));
    }
  }
}

// One row's softmax, spread over a warp: lane l holds chunks l % kLanes, + kLanes, ... of the channels.
template <typename T, int kDim>
struct RowPart {
  using S = Shape<T, kDim>;
  float largest = -INFINITY, sum = 0.0f, out[S::kHeld] = {};

  __device__ __forceinline__ static int channel(int u) {
    return (static_cast<int>(threadIdx.x) % S::kLanes + u * S::kLanes) * S::kChunk;
  }
  __device__ __forceinline__ static float dot(const float* q, const Vector16* key) {
    float score = 0.0f;
    DF_UNROLL
    for (int u = 0; u < S::kPer; ++u) {
      float x[S::kChunk];
      unpack_chunk<T>(x, key[u]);
      DF_UNROLL
      for (int j = 0; j < S::kChunk; ++j) score += q[u * S::kChunk + j] * x[j];
    }
    return across<1, S::kLanes>(score, add);
  }
  // `its_sum` and `value(i)` are relative to `its_largest`
  template <typename F>
  __device__ __forceinline__ void merge(float its_largest, float its_sum, F value) {
    const float now = larger(its_largest, largest), shift = shift_of(now);
    const float keep = fast_exp2(largest - shift), weight = fast_exp2(its_largest - shift);
    largest = now;
    sum = sum * keep + its_sum * weight;
    DF_UNROLL
    for (int i = 0; i < S::kHeld; ++i) out[i] = out[i] * keep + value(i) * weight;
  }
  // to and from shared memory
  __device__ __forceinline__ void merge(const float* parts, const float* all_largest, const float* all_sum, int i) {
    const float* part = parts + i * S::kPartStride;
    merge(all_largest[i], all_sum[i], [&](int j) { return part[channel(j / S::kChunk) + j % S::kChunk]; });
  }
  __device__ __forceinline__ void store(float* parts, float* all_largest, float* all_sum, int i) const {
    float* part = parts + i * S::kPartStride;
    DF_UNROLL
    for (int j = 0; j < S::kHeld; ++j) part[channel(j / S::kChunk) + j % S::kChunk] = out[j];
    if (channel(0) > 0) return;
    all_largest[i] = largest;
    all_sum[i] = sum;
  }
  // Key i of the window for i % step == first; a step is what a warp loads at once.
  template <bool kVectors>
  __device__ __forceinline__ void add_window(const float* q, const T* keys, const T* values, int64_t key_stride,
                                             int64_t value_stride, const Window& window, const Token& token, int dim,
                                             int first, int step) {
    constexpr int kLoads = kVectors ? S::kLoads : 1, kBatch = kLoads * S::kTogether;
    const int mine = static_cast<int>(threadIdx.x) % 32 / S::kLanes;
    for (int begin = first * kBatch; begin < token.count; begin += step * kBatch) {
      Vector16 k[kLoads][S::kPer], v[kLoads][S::kPer];
      float s[kLoads];
      DF_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const int slot = window.slot(token, begin + i * S::kTogether + mine);
        s[i] = slot < 0 ? -INFINITY : 0.0f;
        DF_UNROLL
        for (int u = 0; u < S::kPer; ++u) {
          k[i][u] = load_chunk<kVectors>(slot < 0 ? nullptr : keys + slot * key_stride, channel(u), dim);
          v[i][u] = load_chunk<kVectors>(slot < 0 ? nullptr : values + slot * value_stride, channel(u), dim);
        }
      }
      float now = largest;
      DF_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        s[i] += dot(q, k[i]);
        now = larger(s[i], now);
      }
      const float shift = shift_of(now), keep = fast_exp2(largest - shift);
      largest = now;
      sum *= keep;
      DF_UNROLL
      for (int i = 0; i < S::kHeld; ++i) out[i] *= keep;
      DF_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const float weight = fast_exp2(s[i] - shift);
        sum += weight;
        DF_UNROLL
        for (int u = 0; u < S::kPer; ++u) {
          float x[S::kChunk];
          unpack_chunk<T>(x, v[i][u]);
          DF_UNROLL
          for (int j = 0; j < S::kChunk; ++j) out[u * S::kChunk + j] += weight * x[j];
        }
      }
    }
    // the lanes that held other keys
    const float all = across<S::kLanes, 32>(largest, larger), keep = fast_exp2(largest - shift_of(all));
    largest = all;
    sum = across<S::kLanes, 32>(sum * keep, add);
    DF_UNROLL
    for (int i = 0; i < S::kHeld; ++i) out[i] = across<S::kLanes, 32>(out[i] * keep, add);
  }
};

}  // namespace dalle_fast::decode_attention
