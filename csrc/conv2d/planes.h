// SPDX-License-Identifier: MIT
// What the kernels read: operands, packed weights, planes. A task lays out some rows of an image as planes of words,
// with zeros above and below; a word is a channel's position y W + x (two channels beside each other, in bfloat16).
// Where rows are whole vectors there are zeros between them too, and a tap (i, j) of the kernel is the shift by i pitch
// + j. Elsewhere those would fill vectors, and rows lie one after the other, once for every column of the kernel:
//
//     plane j at p = x at p + j - pad, or 0 where that crosses the edge          tap (i, j) = plane j at + i W
//
// Either way a tap is one constant shift, and no vector is spent on padding.
#pragma once

#include <type_traits>

#include "../core/parallel.h"
#include "../core/simd.h"
#include "conv2d.h"

namespace dalle_fast::conv2d {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

// A type of operands. A word is so many elements of channels at one position, or of positions of one channel.
struct Float32 {
  using T = float;
  static constexpr int kPerWord = 1;

  DF_INLINE VecF dot(VecF sum, VecU a, VecU b) { return sum + bit_cast<VecF>(a) * bit_cast<VecF>(b); }
  DF_INLINE VecU join(VecF a, VecF) { return bit_cast<VecU>(a); }
  DF_INLINE uint32_t join(float a, float) { return bit_cast<uint32_t>(a); }
  DF_INLINE void store(float* to, VecF v) { storeu(to, v); }
};

// ---- loads and stores

// kLanes elements of a plane from position p on, zeros outside the plane
template <typename T>
DF_INLINE VecF load_within(const T* plane, int64_t p, int64_t pixels) {
  if (p >= 0 && p + kLanes <= pixels) return loadu(plane + p);
  const int64_t first = p < 0 ? (p < -kLanes ? kLanes : -p) : 0, rest = pixels - p;
  const int64_t last = rest < 0 ? 0 : rest < kLanes ? rest : kLanes;
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>(0xffffu << first & ((1u << last) - 1u));
  if constexpr (std::is_same_v<T, float>)
    return (VecF)_mm512_maskz_loadu_ps(mask, plane + p);
  else
    return from_bf16((VecH)_mm256_maskz_loadu_epi16(mask, plane + p));
#else
  T some[kLanes] = {};
  for (int64_t i = first; i < last; ++i) some[i] = plane[p + i];
  return loadu(some);
#endif
}

template <typename E>
DF_INLINE void store_elements(typename E::T* to, VecF v, int64_t n) {
  if (n >= kLanes)
    E::store(to, v);
  else if (n > 0)
    store_n(to, v, static_cast<int>(n));
}
DF_INLINE VecU load_word(const void* from) {
  VecU v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

DF_INLINE VecF relu_if(bool relu, VecF v) { return relu && v <= splat(0.0f) ? VecF{} : v; }  // NaN stays

// ---- what all tasks read

// Planes of a band, read in vectors of `step` words.
struct Layout {
  int64_t rows, count;            // of a band, of an image's bands
  int64_t pitch, copies, stride;  // between rows; planes of a channel; between those
  int64_t lead;                   // zeros before a row, 0: rows lie one after the other
  const uint32_t* masks;          // [kernel, stride], all bits or none; null: nothing to hide
  const uint32_t* offsets;        // of each vector

  Layout(const Shape& s, int64_t step, float* memory) : rows(band_rows(s)), count(num_bands(s)) {
    const bool rowed = s.kernel > 1 && s.width % step == 0 && s.pad() <= kLanes;
    lead = rowed ? kLanes : 0;
    pitch = s.width + lead;
    copies = rowed ? 1 : s.kernel;
    stride = rowed ? (round_up((rows + 2 * s.pad()) * pitch + lead, 32) / 32 | 1) * 32 : plane_stride(s);
    uint32_t* const offset = reinterpret_cast<uint32_t*>(memory);
    offsets = offset;
    for (int64_t p = 0; p < rows * s.width; p += step)
      offset[p / step] = static_cast<uint32_t>(rowed ? p / s.width * pitch + p % s.width : p);
    masks = nullptr;
    if (rowed || s.kernel == 1) return;
    uint32_t* const mask = offset + plane_stride(s);
    masks = mask;
    for (int64_t j = 0; j < s.kernel; ++j)
      for (int64_t x = 0, p = 0; p < stride; ++p, x = x + 1 == s.width ? 0 : x + 1) {
        const int64_t from = x + j - s.pad();
        mask[j * stride + p] = from >= 0 && from < s.width ? ~0u : 0u;
      }
  }
  int64_t positions(const Shape& s, int64_t y) const { return (s.height - y < rows ? s.height - y : rows) * s.width; }
  int64_t shift(const Shape& s, int64_t tap, int64_t plane) const {
    const int64_t i = tap / s.kernel, j = tap % s.kernel;
    return i * pitch + (lead ? lead + j - s.pad() : j * plane);
  }
};

// Words of `channels` that multiply one word of E.
template <typename E>
constexpr int64_t words(int64_t channels) {
  return (channels + E::kPerWord - 1) / E::kPerWord;
}

// [channels / kRows, words of depth, taps, kRows], zeros after the last channel: of the weight, or with kTurned of its
// other two dimensions with taps read backwards.
template <typename E, bool kTurned>
void pack(uint32_t* to, const Weight& weight, const Shape& s) {
  const int64_t channels = kTurned ? s.num_in : s.num_out, depth = kTurned ? s.num_out : s.num_in, taps = s.taps();
  const int64_t size = words<E>(depth) * taps * kRows;
  parallel_for(
      packed_rows(channels) / kRows,
      [&](int64_t block) {
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t c = block * kRows + r;
          uint32_t* word = to + block * size + r;
          for (int64_t k = 0; k < depth; k += E::kPerWord)
            for (int64_t tap = 0; tap < taps; ++tap, word += kRows) {
              float w[2] = {};
              for (int64_t i = 0; i < E::kPerWord && k + i < depth && c < channels; ++i)
                w[i] = kTurned ? *weight.at(s, k + i, c, taps - 1 - tap) : *weight.at(s, c, k + i, tap);
              *word = E::join(w[0], w[1]);
            }
        }
      },
      s.num_out * s.num_in * taps > kSerialBelow);
}

// ---- planes

// The planes of a channel from row y of its image on: store(plane, place, load(position in the image) and mask).
template <typename Load, typename Store>
DF_INLINE void for_each_vector(const Layout& layout, const Shape& s, int64_t y, Load load, Store store) {
  if (layout.lead) {
    int64_t to = 0;
    for (int64_t row = y - s.pad(); row < y + layout.rows + s.pad(); ++row) {
      store(0, to, VecU{});
      const bool inside = row >= 0 && row < s.height;
      for (int64_t x = 0; x < s.width; x += kLanes)
        store(0, to + kLanes + x, inside ? load(row * s.width + x) : VecU{});
      to += layout.pitch;
    }
    store(0, to, VecU{});
    return;
  }
  for (int64_t j = 0; j < layout.copies; ++j)
    for (int64_t p = 0; p < layout.stride; p += kLanes) {
      const VecU v = load((y - s.pad()) * s.width + p + j - s.pad());
      store(j, p, layout.masks ? v & load_word(layout.masks + j * layout.stride + p) : v);
    }
}

// Words of an image [channels, H W] from row y on: [words, copies, stride].
template <typename E>
void lay_out(uint32_t* to, const typename E::T* image, const Layout& layout, const Shape& s, int64_t channels,
             int64_t y, bool relu) {
  const int64_t pixels = s.pixels();
  for (int64_t c = 0; c < channels; c += E::kPerWord, to += layout.copies * layout.stride) {
    const typename E::T* const plane = image + c * pixels;
    const bool second = E::kPerWord == 2 && c + 1 < channels;
    for_each_vector(
        layout, s, y,
        [&](int64_t at) {
          const VecF a = relu_if(relu, load_within(plane, at, pixels));
          return E::join(a, second ? relu_if(relu, load_within(plane + pixels, at, pixels)) : VecF{});
        },
        [&](int64_t j, int64_t p, VecU word) { __builtin_memcpy(to + j * layout.stride + p, &word, sizeof word); });
  }
}

// Elements of some channels of x in the images of a group: [channels, copies, images, stride].
template <typename E>
void lay_out_elements(typename E::T* to, const typename E::T* x, const Layout& layout, const Shape& s, int64_t channels,
                      int64_t images, int64_t y, bool relu) {
  const int64_t plane = images * layout.stride;
  for (int64_t c = 0; c < channels; ++c, to += layout.copies * plane)
    for (int64_t i = 0; i < images; ++i) {
      const typename E::T* const from = x + (i * s.num_in + c) * s.pixels();
      for_each_vector(
          layout, s, y, [&](int64_t at) { return bit_cast<VecU>(relu_if(relu, load_within(from, at, s.pixels()))); },
          [&](int64_t j, int64_t p, VecU v) { E::store(to + j * plane + i * layout.stride + p, bit_cast<VecF>(v)); });
    }
}

}  // namespace

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::conv2d
