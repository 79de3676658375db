// SPDX-License-Identifier: MIT
// The kernels, for operands of type E::T. The convolution goes over blocks of kRows channels and kVecs vectors of
// positions in registers, the gradient of x is the same with the weights turned round, and the gradient of a weight is
// the product of a plane of dout and a plane of x, whose lanes are positions in either dtype. Floor: the products.
#pragma once

#include "planes.h"

namespace dalle_fast::conv2d {
namespace DF_CPU_NAMESPACE {

namespace {

constexpr int kVecs = kLanes == 16 ? 4 : 2;     // of positions beside kRows channels
constexpr int64_t kChunkBlocks = 4;             // of positions, before the next channels
constexpr int kTapRows = kLanes == 16 ? 6 : 3;  // output channels, and weights of each, whose gradients are summed at a
constexpr int kTaps = kLanes == 16 ? 4 : 3;     // time

// ---- the convolution

// Planes that a convolution reads: words of `depth` channels, `stride` apart.
struct Source {
  const uint32_t* data;
  int64_t depth, stride;
};

// kRows channels at V vectors of positions: store(channel of these, vector, sums over words and taps).
template <typename E, int V, bool kRelu, typename Store>
DF_INLINE void convolve_block(const Source& planes, const uint32_t* offsets, const uint32_t* weight,
                              const int64_t* shifts, int64_t taps, Store store) {
  VecF acc[kRows][V] = {};
  const uint32_t* from[V];
  for (int v = 0; v < V; ++v) from[v] = planes.data + offsets[v];
  for (int64_t k = 0; k < planes.depth; ++k)
    for (int64_t tap = 0; tap < taps; ++tap, weight += kRows) {
      const int64_t at = k * planes.stride + shifts[tap];
      VecU x[V];
      for (int v = 0; v < V; ++v) x[v] = load_word(from[v] + at);
      if (kRelu)
        for (int v = 0; v < V; ++v) x[v] = bit_cast<VecU>(relu_if(true, bit_cast<VecF>(x[v])));
      for (int r = 0; r < kRows; ++r) {
        const VecU w = splat_u(weight[r]);
        for (int v = 0; v < V; ++v) acc[r][v] = E::dot(acc[r][v], w, x[v]);
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) store(r, v, acc[r][v]);
}

// store(channel, position, sums, how many are of the band) for all channels of a band. Some blocks of positions stay in
// the nearest caches while the channels go by, and are enough for a channel's stores to be a stream.
template <typename E, bool kRelu, typename Store>
void convolve(const Source& planes, const Layout& layout, const Shape& s, const uint32_t* weight, int64_t channels,
              int64_t positions, Store store) {
  int64_t* const shifts = static_cast<int64_t*>(__builtin_alloca(static_cast<std::size_t>(s.taps()) * sizeof(int64_t)));
  for (int64_t tap = 0; tap < s.taps(); ++tap) shifts[tap] = layout.shift(s, tap, layout.stride);
  const int64_t vectors = (positions + kLanes - 1) / kLanes;
  for (int64_t begin = 0; begin < vectors; begin += kChunkBlocks * kVecs) {
    const int64_t end = begin + kChunkBlocks * kVecs < vectors ? begin + kChunkBlocks * kVecs : vectors;
    for (int64_t c = 0; c < channels; c += kRows) {
      const uint32_t* const w = weight + c * planes.depth * s.taps();
      int64_t u = begin;
      const auto blocks = [&](auto vecs) {
        constexpr int V = decltype(vecs)::value;
        for (; u + V <= end; u += V)
          convolve_block<E, V, kRelu>(planes, layout.offsets + u, w, shifts, s.taps(), [&](int r, int v, VecF sum) {
            const int64_t p = (u + v) * kLanes;
            if (c + r < channels) store(c + r, p, sum, positions - p);
          });
      };
      blocks(std::integral_constant<int, kVecs>());
      if constexpr (kVecs > 2) blocks(std::integral_constant<int, 2>());
      blocks(std::integral_constant<int, 1>());
    }
  }
}

// The same for a band of an image [num_channels, H W] from row y on, which is read where it lies if that can be.
template <typename E, typename Store>
void convolve_image(const typename E::T* image, int64_t num_channels, int64_t y, const Layout& layout, const Shape& s,
                    bool relu, const uint32_t* weight, int64_t channels, Store store) {
  static thread_local ThreadScratch memory;
  const int64_t positions = layout.positions(s, y), depth = words<E>(num_channels),
                stride = layout.copies * layout.stride;
  if (E::kPerWord == 1 && s.kernel == 1 && positions % kLanes == 0) {
    const Source planes{reinterpret_cast<const uint32_t*>(image + y * s.width), depth, s.pixels()};
    if (relu)
      convolve<E, true>(planes, layout, s, weight, channels, positions, store);
    else
      convolve<E, false>(planes, layout, s, weight, channels, positions, store);
    return;
  }
  uint32_t* const planes = reinterpret_cast<uint32_t*>(memory.floats(depth * stride));
  lay_out<E>(planes, image, layout, s, num_channels, y, relu);
  convolve<E, false>({planes, depth, stride}, layout, s, weight, channels, positions, store);
}

// f(image, first row) for each band, on all threads
template <typename F>
void for_each_band(const Layout& layout, const Shape& s, F f) {
  parallel_for(s.batch * layout.count,
               [&](int64_t task) { f(task / layout.count, task % layout.count * layout.rows); });
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
        store_elements<E>(out + at + to, pixels, n);
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
        store_elements<E>(to + row * width + x, add_neighbours(sums[0], sums[1]), width - x);
      }
    }
  });
}

// ---- the gradient of the weight

// Planes of some images: a plane's vectors in one image, its next image.
template <typename T>
struct Images {
  const T* data;
  int64_t plane, image;
};

// to[r][j] (+)= sum over images and positions of dout[r] * x[j], for R planes of dout and J shifted ones of x.
template <typename E, int R, int J>
DF_INLINE void correlate(float* to, int64_t to_stride, const Images<typename E::T>& dout,
                         const typename E::T* const* sources, const Layout& layout, int64_t images, int64_t vectors,
                         bool add) {
  VecF acc[R][J] = {};
  for (int64_t i = 0; i < images; ++i)
    for (int64_t u = 0; u < vectors; ++u) {
      const int64_t at = i * layout.stride + layout.offsets[u], dout_at = i * dout.image + u * kLanes * E::kPerWord;
      VecU x[J];
      for (int j = 0; j < J; ++j) x[j] = load_word(sources[j] + at);
      for (int r = 0; r < R; ++r) {
        const VecU d = load_word(dout.data + r * dout.plane + dout_at);
        for (int j = 0; j < J; ++j) acc[r][j] = E::dot(acc[r][j], d, x[j]);
      }
    }
  constexpr int kSums = (R * J + kLanes - 1) / kLanes;
  VecF flat[kSums][kLanes];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) flat[(r * J + j) / kLanes][(r * J + j) % kLanes] = acc[r][j];
  for (int i = R * J; i < kSums * kLanes; ++i) flat[i / kLanes][i % kLanes] = VecF{};
  float sums[kSums * kLanes];
  for (int i = 0; i < kSums; ++i) storeu(sums + i * kLanes, sums_of(flat[i]));
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) {
      float& sum = to[r * to_stride + j];
      sum = add ? sum + sums[r * J + j] : sums[r * J + j];
    }
}

// [num_out, count], rows to_stride apart, for `count` sources
template <typename E>
void correlate_all(float* to, int64_t to_stride, Images<typename E::T> dout, const typename E::T* const* sources,
                   const Layout& layout, int64_t count, int64_t num_out, int64_t images, int64_t vectors, bool add) {
  const auto rows = [&](auto height) {
    constexpr int R = decltype(height)::value;
    int64_t j = 0;
    const auto blocks = [&](auto width) {
      constexpr int J = decltype(width)::value;
      for (; j + J <= count; j += J)
        correlate<E, R, J>(to + j, to_stride, dout, sources + j, layout, images, vectors, add);
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
void weight_gradients(float* partial, const typename E::T* dout, const typename E::T* x, const Layout& layout,
                      const Shape& s, bool relu) {
  using T = typename E::T;
  constexpr int64_t kStep = kLanes * E::kPerWord;
  const int64_t count = s.num_in * s.taps(), group = images_of_group(s);
  const int64_t chunks = s.num_in ? (s.num_in + kTaskChannels - 1) / kTaskChannels : 1;
  parallel_for(num_groups(s) * chunks, [&](int64_t task) {
    static thread_local ThreadScratch memory;
    const int64_t first = task / chunks * group, images = s.batch - first < group ? s.batch - first : group;
    const int64_t c = task % chunks * kTaskChannels;
    const int64_t channels = s.num_in - c < kTaskChannels ? s.num_in - c : kTaskChannels;
    float* const to = partial + task / chunks * s.num_out * (count + 1);
    const int64_t image = layout.stride, plane = images * image, sources_count = channels * s.taps();
    const int64_t head = round_up(2 * sources_count, 16), planes = (channels * layout.copies + s.num_out) * plane;
    const T** const sources = reinterpret_cast<const T**>(memory.floats(head + planes));
    T* const laid_out = reinterpret_cast<T*>(reinterpret_cast<float*>(sources) + head);
    T* const copy = laid_out + channels * layout.copies * plane;
    for (int64_t j = 0; j < sources_count; ++j)
      sources[j] = laid_out + j / s.taps() * layout.copies * plane + layout.shift(s, j % s.taps(), plane);
    int64_t y = 0;
    do {
      const int64_t positions = layout.positions(s, y), vectors = (positions + kStep - 1) / kStep;
      lay_out_elements<E>(laid_out, x + (first * s.num_in + c) * s.pixels(), layout, s, channels, images, y, relu);
      Images<T> d{dout + first * s.num_out * s.pixels() + y * s.width, s.pixels(), s.num_out * s.pixels()};
      if (positions % kStep) {  // zeros after the last position
        for (int64_t k = 0; k < s.num_out; ++k)
          for (int64_t i = 0; i < images; ++i) {
            T* const zeros = copy + k * plane + i * image;
            __builtin_memcpy(zeros, d.data + k * d.plane + i * d.image,
                             static_cast<std::size_t>(positions) * sizeof(T));
            __builtin_memset(zeros + positions, 0, static_cast<std::size_t>(image - positions) * sizeof(T));
          }
        d = {copy, plane, image};
      }
      correlate_all<E>(to + c * s.taps(), count, d, sources, layout, sources_count, s.num_out, images, vectors, y > 0);
      if (c > 0) continue;
      for (int64_t k = 0; k < s.num_out; ++k) {
        VecF sum = {};
        for (int64_t i = 0; i < images; ++i)
          for (int64_t p = 0; p < positions; p += kLanes)
            sum += load_part(d.data + k * d.plane + i * d.image + p, positions - p);
        float& db = to[s.num_out * count + k];
        db = y > 0 ? db + hsum(sum) : hsum(sum);
      }
    } while ((y += layout.rows) < s.height);
  });
}

// ---- both directions

template <typename E>
void run_forward(const ForwardParams& p) {
  using T = typename E::T;
  const Shape& s = p.shape;
  const int64_t pixels = s.pixels() * s.scale * s.scale;
  uint32_t* const weight = reinterpret_cast<uint32_t*>(p.workspace);
  pack<E, false>(weight, p.weight, s);
  const Layout layout(s, kLanes, p.workspace + packed_rows(s.num_out) * s.num_in * s.taps());
  for_each_band(layout, s, [&](int64_t image, int64_t y) {
    const T* const x = static_cast<const T*>(p.x) + image * s.num_in * s.pixels();
    T* const out = static_cast<T*>(p.out) + image * s.num_out * pixels;
    const T* const residual = p.residual ? static_cast<const T*>(p.residual) + image * s.num_out * pixels : nullptr;
    const auto result = [&](int64_t c, VecF sum) { return splat(p.gain) * (sum + splat(p.bias[c])); };
    if (s.scale == 1) {
      convolve_image<E>(x, s.num_in, y, layout, s, p.relu, weight, s.num_out,
                        [&](int64_t c, int64_t at, VecF sum, int64_t n) {
                          const int64_t to = c * pixels + y * s.width + at;
                          VecF v = result(c, sum);
                          if (residual) v += load_part(residual + to, n);
                          store_elements<E>(out + to, v, n);
                        });
      return;
    }
    static thread_local ThreadScratch memory;
    float* const low = memory.floats(s.num_out * layout.stride + kLanes);
    convolve_image<E>(
        x, s.num_in, y, layout, s, p.relu, weight, s.num_out,
        [&](int64_t c, int64_t at, VecF sum, int64_t) { storeu(low + c * layout.stride + at, result(c, sum)); });
    for (int64_t c = 0; c < s.num_out; ++c)
      expand<E>(out + c * pixels, residual ? residual + c * pixels : nullptr, low + c * layout.stride, y,
                layout.positions(s, y) / s.width, s.width);
  });
}

template <typename E>
void run_backward(const BackwardParams& p) {
  using T = typename E::T;
  const Shape& s = p.shape;
  const int64_t sums = s.num_out * (s.num_in * s.taps() + 1);
  float* const layouts = p.workspace + packed_rows(s.num_in) * s.num_out * s.taps();
  float* const partial = layouts + 2 * layout_words(s);
  const T* const x = static_cast<const T*>(p.x);
  const T* dout = static_cast<const T*>(p.dout);
  if (s.scale == 2) {
    T* const pooled = reinterpret_cast<T*>(partial + num_groups(s) * sums);
    pool<E>(pooled, dout, s.batch * s.num_out, s.height, s.width);
    dout = pooled;
  }
  if (p.dx) {
    uint32_t* const weight = reinterpret_cast<uint32_t*>(p.workspace);
    pack<E, true>(weight, p.weight, s);
    const Layout layout(s, kLanes, layouts);
    for_each_band(layout, s, [&](int64_t image, int64_t y) {
      const int64_t first = image * s.num_in * s.pixels() + y * s.width;
      convolve_image<E>(dout + image * s.num_out * s.pixels(), s.num_out, y, layout, s, false, weight, s.num_in,
                        [&](int64_t c, int64_t at, VecF sum, int64_t n) {
                          const int64_t to = first + c * s.pixels() + at;
                          VecF v = splat(p.gain) * sum;
                          if (p.relu) v = load_part(x + to, n) <= splat(0.0f) ? VecF{} : v;
                          store_elements<E>(static_cast<T*>(p.dx) + to, v, n);
                        });
    });
  }
  if (!p.dbias) return;
  weight_gradients<E>(partial, dout, x, Layout(s, kLanes * E::kPerWord, layouts + layout_words(s)), s, p.relu);
  const int64_t count = s.num_in * s.taps(), groups = num_groups(s);
  parallel_for(
      s.num_out + 1,  // rows of the weight, and the bias
      [&](int64_t row) {
        float* const total = partial + row * count;
        const int64_t n = row < s.num_out ? count : s.num_out;
        for (int64_t j = 0; j < n; j += kLanes) {
          VecF sum = {};
          for (int64_t group = 0; group < groups; ++group) sum += load_part(total + group * sums + j, n - j);
          store_part(total + j, splat(p.gain) * sum, n - j);
        }
        if (row == s.num_out)
          return static_cast<void>(__builtin_memcpy(p.dbias, total, static_cast<std::size_t>(n) * 4));
        for (int64_t c = 0; c < s.num_in; ++c)
          for (int64_t tap = 0; tap < s.taps(); ++tap) *p.dweight.at(s, row, c, tap) = total[c * s.taps() + tap];
      },
      groups * sums > kSerialBelow);
}

}  // namespace

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::conv2d
