// SPDX-License-Identifier: MIT
// The kernels, for operands of type E::T. A task lays out some rows of an image as words: position p = y W + x of a
// channel (of two channels beside each other, in bfloat16), with zeros above and below, once for every column of the
// kernel, shifted and with zeros where the shift crosses the image's edge:
//
//     plane j at p = x at p + j - pad, or 0          tap (i, j) = plane j at + i W
//
// so a tap is one constant shift, and no vector is spent on padding. The convolution goes over blocks of kRows channels
// and kVecs vectors of positions in registers, the gradient of x is the same with the weights turned round, and the
// gradient of a weight is the product of a plane of dout and a plane of x, whose lanes are positions in either dtype.
#pragma once

#include <type_traits>

#include "../core/parallel.h"
#include "../core/simd.h"
#include "conv2d.h"

namespace dalle_fast::conv2d {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int kVecs = kLanes == 16 ? 4 : 2;     // of positions beside kRows channels
constexpr int kTapRows = kLanes == 16 ? 6 : 3;  // output channels, and weights of each, whose gradients are summed at a
constexpr int kTaps = kLanes == 16 ? 4 : 3;     // time

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

template <typename T>
DF_INLINE VecF load_part(const T* from, int64_t n) {
  return n >= kLanes ? loadu(from) : n > 0 ? load_n(from, static_cast<int>(n)) : VecF{};
}
template <typename E>
DF_INLINE void store_part(typename E::T* to, VecF v, int64_t n) {
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

// Positions of a band, and which of them lie in the image when they are shifted.
struct Bands {
  int64_t rows, count, stride;
  const uint32_t* masks;  // [kernel, stride], all bits or none

  Bands(const Shape& s, uint32_t* memory) : rows(band_rows(s)), count(num_bands(s)), stride(plane_stride(s)) {
    for (int64_t j = 0; j < s.kernel; ++j)
      for (int64_t x = 0, p = 0; p < stride; ++p, x = x + 1 == s.width ? 0 : x + 1) {
        const int64_t from = x + j - s.pad();
        memory[j * stride + p] = from >= 0 && from < s.width ? ~0u : 0u;
      }
    masks = memory;
  }
  int64_t positions(const Shape& s, int64_t y) const { return (s.height - y < rows ? s.height - y : rows) * s.width; }
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

// f(plane, position in it, position in the image, mask) for all vectors of a channel's planes, whose first position is
// `first` in the image
template <typename F>
DF_INLINE void for_each_shifted(const Bands& bands, const Shape& s, int64_t first, F f) {
  for (int64_t j = 0; j < s.kernel; ++j)
    for (int64_t p = 0; p < bands.stride; p += kLanes)
      f(j, p, first + p + j - s.pad(), load_word(bands.masks + j * bands.stride + p));
}

// Words of an image [channels, H W] from row y on: [words, kernel, stride].
template <typename E>
void lay_out(uint32_t* to, const typename E::T* image, const Bands& bands, const Shape& s, int64_t channels, int64_t y,
             bool relu) {
  const int64_t pixels = s.pixels();
  for (int64_t c = 0; c < channels; c += E::kPerWord, to += s.kernel * bands.stride) {
    const typename E::T* const plane = image + c * pixels;
    const bool second = E::kPerWord == 2 && c + 1 < channels;
    for_each_shifted(bands, s, (y - s.pad()) * s.width, [&](int64_t j, int64_t p, int64_t from, VecU mask) {
      const VecF a = relu_if(relu, load_within(plane, from, pixels));
      const VecF b = second ? relu_if(relu, load_within(plane + pixels, from, pixels)) : VecF{};
      const VecU word = E::join(a, b) & mask;
      __builtin_memcpy(to + j * bands.stride + p, &word, sizeof word);
    });
  }
}

// Elements of some channels of x in the images of a group: [channels, kernel, images, stride].
template <typename E>
void lay_out_elements(typename E::T* to, const typename E::T* x, const Bands& bands, const Shape& s, int64_t channels,
                      int64_t images, int64_t y, bool relu) {
  const int64_t plane = images * bands.stride;
  for (int64_t c = 0; c < channels; ++c, to += s.kernel * plane)
    for (int64_t i = 0; i < images; ++i) {
      const typename E::T* const from = x + (i * s.num_in + c) * s.pixels();
      for_each_shifted(bands, s, (y - s.pad()) * s.width, [&](int64_t j, int64_t p, int64_t at, VecU mask) {
        const VecF v = relu_if(relu, load_within(from, at, s.pixels()));
        E::store(to + j * plane + i * bands.stride + p, bit_cast<VecF>(bit_cast<VecU>(v) & mask));
      });
    }
}

// ---- the convolution

// kRows channels at V vectors of positions: store(channel of these, first position, sums over words and taps).
template <typename E, int V, typename Store>
DF_INLINE void convolve_block(const uint32_t* planes, int64_t stride, const uint32_t* weight, const int64_t* shifts,
                              int64_t depth, int64_t taps, Store store) {
  VecF acc[kRows][V] = {};
  for (int64_t k = 0; k < depth; ++k, planes += stride)
    for (int64_t tap = 0; tap < taps; ++tap, weight += kRows) {
      const uint32_t* const from = planes + shifts[tap];
      VecU x[V];
      for (int v = 0; v < V; ++v) x[v] = load_word(from + v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const VecU w = splat_u(weight[r]);
        for (int v = 0; v < V; ++v) acc[r][v] = E::dot(acc[r][v], w, x[v]);
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) store(r, v * kLanes, acc[r][v]);
}

// store(channel, position, sums, how many are of the band) for all channels of a band.
template <typename E, typename Store>
void convolve(const uint32_t* planes, const Bands& bands, const Shape& s, const uint32_t* weight, int64_t depth,
              int64_t channels, int64_t positions, Store store) {
  int64_t* const shifts = static_cast<int64_t*>(__builtin_alloca(static_cast<std::size_t>(s.taps()) * sizeof(int64_t)));
  for (int64_t tap = 0; tap < s.taps(); ++tap)
    shifts[tap] = tap % s.kernel * bands.stride + tap / s.kernel * s.width;
  int64_t p = 0;
  const auto blocks = [&](auto vecs) {
    constexpr int V = decltype(vecs)::value;
    for (; p + (V - 1) * kLanes < positions; p += V * kLanes)
      for (int64_t c = 0; c < channels; c += kRows)
        convolve_block<E, V>(planes + p, s.kernel * bands.stride, weight + c * depth * s.taps(), shifts, depth,
                             s.taps(), [&](int r, int64_t q, VecF sum) {
                               if (c + r < channels) store(c + r, p + q, sum, positions - p - q);
                             });
  };
  blocks(std::integral_constant<int, kVecs>());
  if constexpr (kVecs > 2) blocks(std::integral_constant<int, 2>());
  blocks(std::integral_constant<int, 1>());
}

// f(image, first row) for each band, on all threads
template <typename F>
void for_each_band(const Bands& bands, const Shape& s, F f) {
  parallel_for(s.batch * bands.count, [&](int64_t task) { f(task / bands.count, task % bands.count * bands.rows); });
}

// ---- scale 2

// Sums of neighbours, first those of `a`.
DF_INLINE VecF add_neighbours(VecF a, VecF b) {
  VecI even = {};
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

// Rows [y, y + rows) of one channel of the result, each value two by two; `low` may be read beyond their end.
template <typename E>
void expand(typename E::T* out, const typename E::T* residual, const float* low, int64_t y, int64_t rows,
            int64_t width) {
  using T = typename E::T;
  VecI twice = {};
  for (int i = 0; i < kLanes; ++i) twice[i] = i / 2;
  for (int64_t row = 0; row < 2 * rows; ++row) {
    const int64_t at = (2 * y + row) * 2 * width;
    for (int64_t x = 0; x < width; x += kLanes) {
      const VecF v = loadu(low + row / 2 * width + x);
      for (int half = 0; half < 2; ++half) {
        const int64_t to = 2 * x + half * kLanes, n = 2 * width - to;
        VecF pixels = __builtin_shuffle(v, twice + half * (kLanes / 2));
        if (residual) pixels += load_part<T>(residual + at + to, n);
        store_part<E>(out + at + to, pixels, n);
      }
    }
  }
}

// [planes, 2 H, 2 W] -> [planes, H, W]: sums of two by two
template <typename E>
void pool(typename E::T* to, const typename E::T* from, int64_t planes, int64_t height, int64_t width) {
  using T = typename E::T;
  parallel_chunks(planes * height, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* const above = from + row * 4 * width;
      const T* const below = above + 2 * width;
      for (int64_t x = 0; x < width; x += kLanes) {
        VecF sums[2];
        for (int half = 0; half < 2; ++half) {
          const int64_t at = 2 * x + half * kLanes, n = 2 * width - at;
          sums[half] = load_part<T>(above + at, n) + load_part<T>(below + at, n);
        }
        store_part<E>(to + row * width + x, add_neighbours(sums[0], sums[1]), width - x);
      }
    }
  });
}

// ---- the gradient of the weight

// Lane i is the sum of v[i].
DF_INLINE VecF hsum_each(VecF (&v)[kLanes]) {
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) v[i] = add_neighbours(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// Planes of some images: a plane's vectors in one image, its next image.
template <typename T>
struct Images {
  const T* data;
  int64_t plane, image;
};

// to[r][j] (+)= sum over images and positions of dout[r] * x[j], for R planes of dout and J shifted ones of x.
template <typename E, int R, int J>
DF_INLINE void correlate(float* to, int64_t to_stride, const Images<typename E::T>& dout,
                         const typename E::T* const* sources, int64_t x_image, int64_t images, int64_t positions,
                         bool add) {
  VecF acc[R][J] = {};
  for (int64_t i = 0; i < images; ++i)
    for (int64_t p = 0; p < positions; p += kLanes * E::kPerWord) {
      VecU x[J];
      for (int j = 0; j < J; ++j) x[j] = load_word(sources[j] + i * x_image + p);
      for (int r = 0; r < R; ++r) {
        const VecU d = load_word(dout.data + r * dout.plane + i * dout.image + p);
        for (int j = 0; j < J; ++j) acc[r][j] = E::dot(acc[r][j], d, x[j]);
      }
    }
  for (int first = 0; first < R * J; first += kLanes) {
    VecF some[kLanes] = {};
    for (int i = 0; i < kLanes && first + i < R * J; ++i) some[i] = acc[(first + i) / J][(first + i) % J];
    const VecF sums = hsum_each(some);
    for (int i = 0; i < kLanes && first + i < R * J; ++i) {
      float& sum = to[(first + i) / J * to_stride + (first + i) % J];
      sum = add ? sum + sums[i] : sums[i];
    }
  }
}

// [num_out, count], rows to_stride apart, for `count` sources
template <typename E>
void correlate_all(float* to, int64_t to_stride, Images<typename E::T> dout, const typename E::T* const* sources,
                   int64_t x_image, int64_t count, int64_t num_out, int64_t images, int64_t positions, bool add) {
  const auto rows = [&](auto height) {
    constexpr int R = decltype(height)::value;
    int64_t j = 0;
    const auto blocks = [&](auto width) {
      constexpr int J = decltype(width)::value;
      for (; j + J <= count; j += J)
        correlate<E, R, J>(to + j, to_stride, dout, sources + j, x_image, images, positions, add);
    };
    blocks(std::integral_constant<int, kTaps>());
    blocks(std::integral_constant<int, 2>());
    blocks(std::integral_constant<int, 1>());
    to += R * to_stride;
    dout.data += R * dout.plane;
    num_out -= R;
  };
  while (num_out >= kTapRows) rows(std::integral_constant<int, kTapRows>());
  if constexpr (kTapRows > 3)
    while (num_out >= 3) rows(std::integral_constant<int, 3>());
  while (num_out > 0) rows(std::integral_constant<int, 1>());
}

// Sums of each group: [num_out, num_in * taps] of the weight, then [num_out] of the bias.
template <typename E>
void weight_gradients(float* partial, const typename E::T* dout, const typename E::T* x, const Bands& bands,
                      const Shape& s, bool relu) {
  using T = typename E::T;
  constexpr int64_t kStep = kLanes * E::kPerWord;
  const int64_t count = s.num_in * s.taps(), group = images_of_group(s);
  const int64_t chunks = (s.num_in + kTaskChannels - 1) / kTaskChannels;
  parallel_for(num_groups(s) * chunks, [&](int64_t task) {
    static thread_local ThreadScratch memory;
    const int64_t first = task / chunks * group, images = s.batch - first < group ? s.batch - first : group;
    const int64_t c = task % chunks * kTaskChannels;
    const int64_t channels = s.num_in - c < kTaskChannels ? s.num_in - c : kTaskChannels;
    float* const to = partial + task / chunks * s.num_out * (count + 1);
    const int64_t image = bands.stride, plane = images * image, sources_count = channels * s.taps();
    const int64_t head = round_up(2 * sources_count, 16), planes = (channels * s.kernel + s.num_out) * plane;
    const T** const sources = reinterpret_cast<const T**>(memory.floats(head + planes));
    T* const laid_out = reinterpret_cast<T*>(reinterpret_cast<float*>(sources) + head);
    T* const copy = laid_out + channels * s.kernel * plane;
    for (int64_t j = 0; j < sources_count; ++j) {
      const int64_t tap = j % s.taps();
      sources[j] = laid_out + (j / s.taps() * s.kernel + tap % s.kernel) * plane + tap / s.kernel * s.width;
    }
    for (int64_t y = 0; y < s.height; y += bands.rows) {
      const int64_t positions = bands.positions(s, y);
      lay_out_elements<E>(laid_out, x + (first * s.num_in + c) * s.pixels(), bands, s, channels, images, y, relu);
      Images<T> d{dout + first * s.num_out * s.pixels() + y * s.width, s.pixels(), s.num_out * s.pixels()};
      if (positions % kStep) {  // zeros after the last position
        for (int64_t k = 0; k < s.num_out; ++k)
          for (int64_t i = 0; i < images; ++i) {
            T* const zeros = copy + k * plane + i * image;
            __builtin_memcpy(zeros, d.data + k * d.plane + i * d.image, static_cast<std::size_t>(positions) * sizeof(T));
            __builtin_memset(zeros + positions, 0, static_cast<std::size_t>(image - positions) * sizeof(T));
          }
        d = {copy, plane, image};
      }
      correlate_all<E>(to + c * s.taps(), count, d, sources, image, sources_count, s.num_out, images, positions, y > 0);
      if (c > 0) continue;
      for (int64_t k = 0; k < s.num_out; ++k) {
        VecF sum = {};
        for (int64_t i = 0; i < images; ++i)
          for (int64_t p = 0; p < positions; p += kLanes)
            sum += load_part(d.data + k * d.plane + i * d.image + p, positions - p);
        float& db = to[s.num_out * count + k];
        db = y > 0 ? db + hsum(sum) : hsum(sum);
      }
    }
  });
}

// ---- both directions

template <typename E>
void run_forward(const ForwardParams& p) {
  using T = typename E::T;
  const Shape& s = p.shape;
  const int64_t depth = words<E>(s.num_in), pixels = s.pixels() * s.scale * s.scale;
  uint32_t* const weight = reinterpret_cast<uint32_t*>(p.workspace);
  pack<E, false>(weight, p.weight, s);
  const Bands bands(s, weight + packed_rows(s.num_out) * depth * s.taps());
  for_each_band(bands, s, [&](int64_t image, int64_t y) {
    static thread_local ThreadScratch memory;
    const int64_t size = depth * s.kernel * bands.stride, positions = bands.positions(s, y);
    float* const low = memory.floats(size + s.num_out * bands.stride + kLanes) + size;
    uint32_t* const planes = reinterpret_cast<uint32_t*>(low - size);
    lay_out<E>(planes, static_cast<const T*>(p.x) + image * s.num_in * s.pixels(), bands, s, s.num_in, y, p.relu);
    T* const out = static_cast<T*>(p.out) + image * s.num_out * pixels;
    const T* const residual = p.residual ? static_cast<const T*>(p.residual) + image * s.num_out * pixels : nullptr;
    if (s.scale == 1) {
      convolve<E>(planes, bands, s, weight, depth, s.num_out, positions,
                  [&](int64_t c, int64_t at, VecF sum, int64_t n) {
                    const int64_t to = c * pixels + y * s.width + at;
                    VecF v = splat(p.gain) * (sum + splat(p.bias[c]));
                    if (residual) v += load_part(residual + to, n);
                    store_part<E>(out + to, v, n);
                  });
      return;
    }
    convolve<E>(planes, bands, s, weight, depth, s.num_out, positions, [&](int64_t c, int64_t at, VecF sum, int64_t) {
      storeu(low + c * bands.stride + at, splat(p.gain) * (sum + splat(p.bias[c])));
    });
    for (int64_t c = 0; c < s.num_out; ++c)
      expand<E>(out + c * pixels, residual ? residual + c * pixels : nullptr, low + c * bands.stride, y,
                positions / s.width, s.width);
  });
}

template <typename E>
void run_backward(const BackwardParams& p) {
  using T = typename E::T;
  const Shape& s = p.shape;
  const int64_t depth = words<E>(s.num_out), sums = s.num_out * (s.num_in * s.taps() + 1);
  uint32_t* const weight = reinterpret_cast<uint32_t*>(p.workspace);
  uint32_t* const masks = weight + packed_rows(s.num_in) * depth * s.taps();
  float* const partial = p.workspace + (masks - weight) + s.kernel * plane_stride(s);
  const Bands bands(s, masks);
  const T* const x = static_cast<const T*>(p.x);
  const T* dout = static_cast<const T*>(p.dout);
  if (s.scale == 2) {
    T* const pooled = reinterpret_cast<T*>(partial + num_groups(s) * sums);
    pool<E>(pooled, dout, s.batch * s.num_out, s.height, s.width);
    dout = pooled;
  }
  if (p.dx) {
    pack<E, true>(weight, p.weight, s);
    for_each_band(bands, s, [&](int64_t image, int64_t y) {
      static thread_local ThreadScratch memory;
      uint32_t* const planes = reinterpret_cast<uint32_t*>(memory.floats(depth * s.kernel * bands.stride));
      lay_out<E>(planes, dout + image * s.num_out * s.pixels(), bands, s, s.num_out, y, false);
      convolve<E>(planes, bands, s, weight, depth, s.num_in, bands.positions(s, y),
                  [&](int64_t c, int64_t at, VecF sum, int64_t n) {
                    const int64_t to = (image * s.num_in + c) * s.pixels() + y * s.width + at;
                    VecF v = splat(p.gain) * sum;
                    if (p.relu) v = load_part(x + to, n) <= splat(0.0f) ? VecF{} : v;
                    store_part<E>(static_cast<T*>(p.dx) + to, v, n);
                  });
    });
  }
  if (!p.dbias) return;
  weight_gradients<E>(partial, dout, x, bands, s, p.relu);
  const int64_t count = s.num_in * s.taps();
  parallel_chunks(sums, 4 * kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      float sum = 0.0f;
      for (int64_t group = 0; group < num_groups(s); ++group) sum += partial[group * sums + j];
      const bool bias = j >= s.num_out * count;
      float* const to = bias ? p.dbias + (j - s.num_out * count)
                             : p.dweight.at(s, j / count, j % count / s.taps(), j % s.taps());
      *to = p.gain * sum;
    }
  });
}

}  // namespace

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::conv2d
