// SPDX-License-Identifier: MIT
// One task per few images. Their planes lie one after the other with zeros between rows and between images, which both
// neighbours share:
//
//     position of pixel (image, y, x) = (image (H + pad) + y) (W + pad) + x,      tap (i, j) at + i (W + pad) + j
//
// so a tap is one constant shift of all positions, whatever rows and images a vector covers. The convolution goes over
// blocks of kRows channels and kVecs vectors of positions in registers, the gradient of x is the same with the weights
// turned round, and the gradient of a weight is the product of two planes, one of them shifted.
#include "conv2d.h"

#include <type_traits>

#include "../core/parallel.h"
#include "../core/simd.h"

namespace dalle_fast::conv2d {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int kVecs = kLanes == 16 ? 4 : 2;     // of positions beside kRows channels
constexpr int kTapRows = kLanes == 16 ? 6 : 3;  // output channels, and weights of each, whose gradients are summed at a
constexpr int kTaps = kLanes == 16 ? 4 : 3;     // time: shifted loads cross cache lines, so each one serves many

// Planes of the images of a task.
struct Planes {
  int64_t pitch, image, positions, margin, stride;

  Planes(const Shape& s, int64_t images) {
    const int64_t pad = s.kernel / 2;
    pitch = s.width + pad;
    image = (s.height + pad) * pitch;
    positions = images * image;
    margin = round_up(pad * pitch + pad, kLanes);  // zeros before the first position and after the last
    // an odd number of vectors apart: channels at one position would fall into the same sets of a cache
    stride = (round_up(2 * margin + positions + kLanes, kLanes) / kLanes | 1) * kLanes;
  }
  int64_t row(int64_t i, int64_t y) const { return margin + i * image + y * pitch; }
  int64_t shift(const Shape& s, int64_t tap) const {
    return (tap / s.kernel - s.kernel / 2) * pitch + tap % s.kernel - s.kernel / 2;
  }
};

DF_INLINE VecF load_part(const float* from, int64_t n) {
  return n >= kLanes ? loadu(from) : load_n(from, static_cast<int>(n));
}
DF_INLINE void store_part(float* to, VecF v, int64_t n) {
  if (n >= kLanes)
    storeu(to, v);
  else
    store_n(to, v, static_cast<int>(n));
}

// Images [first, first + images) of `from` [B, channels, H / scale, W / scale]. Vectors reach beyond their row with
// zeros, and the next row writes over them: so the room between rows is cleared.
template <bool kRelu>
void lay_out(float* to, const Planes& planes, const float* from, const Shape& s, int64_t channels, int64_t scale,
             int64_t first, int64_t images) {
  const int64_t pad = s.kernel / 2, from_width = s.width / scale;
  VecI twice = {};
  for (int i = 0; i < kLanes; ++i) twice[i] = i / 2;
  for (int64_t c = 0; c < channels; ++c, to += planes.stride) {
    zero(to, planes.margin);
    for (int64_t i = 0; i < images; ++i) {
      const float* const image = from + ((first + i) * channels + c) * s.height / scale * from_width;
      for (int64_t y = 0; y < s.height; ++y) {
        const float* const row = image + y / scale * from_width;
        float* const plane = to + planes.row(i, y);
        for (int64_t x = 0; x < s.width; x += kLanes) {
          VecF v = load_part(row + x / scale, from_width - x / scale);
          if (scale == 2) v = __builtin_shuffle(v, twice);
          storeu(plane + x, kRelu ? (v <= splat(0.0f) ? VecF{} : v) : v);  // NaN stays
        }
        for (int64_t x = s.width; x < planes.pitch; x += kLanes) storeu(plane + x, VecF{});
      }
      zero(to + planes.row(i, s.height), pad * planes.pitch);
    }
    const int64_t end = planes.margin + planes.positions;
    zero(to + end, planes.stride - end);
  }
}

// [channels, depth, taps] times gain as [channels / kRows, depth, taps, kRows], zeros after the last channel. With
// kTurned `weight` is [depth, channels, taps] and taps are read backwards.
template <bool kTurned>
void pack(float* to, const float* weight, int64_t channels, int64_t depth, int64_t taps, float gain) {
  const int64_t blocks = packed_rows(channels) / kRows;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t c = block * kRows + r;
          const int64_t at = kTurned ? (k * channels + c) * taps + taps - 1 - tap : (c * depth + k) * taps + tap;
          *to++ = c < channels ? gain * weight[at] : 0.0f;
        }
}

// kRows channels at V vectors of positions: to[r][...] = sum over depth and taps.
template <int V>
DF_INLINE void convolve_block(float* to, int64_t to_stride, const float* planes, int64_t stride, const float* weight,
                              const int64_t* shifts, int64_t depth, int64_t taps) {
  VecF acc[kRows][V] = {};
  for (int64_t k = 0; k < depth; ++k, planes += stride)
    for (int64_t tap = 0; tap < taps; ++tap, weight += kRows) {
      const float* const from = planes + shifts[tap];
      VecF x[V];
      for (int v = 0; v < V; ++v) x[v] = loadu(from + v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const VecF w = splat(weight[r]);
        for (int v = 0; v < V; ++v) acc[r][v] += w * x[v];
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) storeu(to + r * to_stride + v * kLanes, acc[r][v]);
}

// kRows planes `to` of all positions.
void convolve(float* to, const float* from, const Planes& planes, const float* weight, const int64_t* shifts,
              int64_t depth, int64_t taps) {
  int64_t p = planes.margin;
  const int64_t end = planes.margin + planes.positions;
  const auto blocks = [&](auto vecs) {
    constexpr int V = decltype(vecs)::value;
    for (; p + (V - 1) * kLanes < end; p += V * kLanes)
      convolve_block<V>(to + p, planes.stride, from + p, planes.stride, weight, shifts, depth, taps);
  };
  blocks(std::integral_constant<int, kVecs>());
  if constexpr (kVecs > 2) blocks(std::integral_constant<int, 2>());
  blocks(std::integral_constant<int, 1>());
}

// f(offset in an image, place in the planes, how much there is) for each vector of an image.
template <typename F>
DF_INLINE void for_each_vector(const Planes& planes, int64_t i, int64_t height, int64_t width, int64_t scale, F f) {
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; x += kLanes) f(y * width + x, planes.row(i, y * scale) + x * scale, width - x);
}

// Sums of neighbours, first those of `a`.
DF_INLINE VecF add_neighbours(VecF a, VecF b) {
  VecI even = {};
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

// Lane i is the sum of v[i].
DF_INLINE VecF hsum_each(VecF (&v)[kLanes]) {
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) v[i] = add_neighbours(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// to[r][j] = sum over positions of dout[r] * from[j], for R planes and J shifted ones.
template <int R, int J>
DF_INLINE void correlate(float* to, int64_t to_stride, const float* dout, int64_t stride, const float* const* from,
                         int64_t positions) {
  VecF acc[R][J] = {};
  for (int64_t p = 0; p < positions; p += kLanes) {
    VecF x[J];
    for (int j = 0; j < J; ++j) x[j] = loadu(from[j] + p);
    for (int r = 0; r < R; ++r) {
      const VecF d = loadu(dout + r * stride + p);
      for (int j = 0; j < J; ++j) acc[r][j] += d * x[j];
    }
  }
  for (int first = 0; first < R * J; first += kLanes) {
    VecF some[kLanes] = {};
    for (int i = 0; i < kLanes && first + i < R * J; ++i) some[i] = acc[(first + i) / J][(first + i) % J];
    const VecF sums = hsum_each(some);
    for (int i = 0; i < kLanes && first + i < R * J; ++i) to[(first + i) / J * to_stride + (first + i) % J] = sums[i];
  }
}

// [num_out, num_in * taps] of one task; `sources` are the shifted planes of x.
void correlate_all(float* to, const float* dout, const Planes& planes, const float* const* sources, int64_t count,
                   int64_t num_out) {
  const auto columns = [&](int64_t r, auto rows) {
    constexpr int R = decltype(rows)::value;
    const float* const d = dout + r * planes.stride + planes.margin;
    int64_t j = 0;
    const auto blocks = [&](auto width) {
      constexpr int J = decltype(width)::value;
      for (; j + J <= count; j += J)
        correlate<R, J>(to + r * count + j, count, d, planes.stride, sources + j, planes.positions);
    };
    blocks(std::integral_constant<int, kTaps>());
    blocks(std::integral_constant<int, 2>());
    blocks(std::integral_constant<int, 1>());
  };
  int64_t r = 0;
  for (; r + kTapRows <= num_out; r += kTapRows) columns(r, std::integral_constant<int, kTapRows>());
  if constexpr (kTapRows > 3)
    for (; r + 3 <= num_out; r += 3) columns(r, std::integral_constant<int, 3>());
  for (; r < num_out; ++r) columns(r, std::integral_constant<int, 1>());
}

// What a thread needs for one task.
struct Scratch {
  float *x, *out, *rows;
  int64_t* shifts;
  const float** sources;

  Scratch(ThreadScratch& memory, const Shape& s, const Planes& planes, bool backward) {
    const int64_t pointers = s.taps() * 2 + (backward ? s.num_in * s.taps() * 2 : 0);  // 8 bytes each
    const int64_t head = round_up(pointers, 16);
    const int64_t channels = s.num_in + (backward ? s.num_out : 0) + kRows;
    float* const start = memory.floats(head + channels * planes.stride + 2 * kLanes);
    shifts = reinterpret_cast<int64_t*>(start);
    sources = reinterpret_cast<const float**>(shifts + s.taps());
    x = start + head;
    out = x + s.num_in * planes.stride;
    rows = out + (backward ? s.num_out : 0) * planes.stride;
    for (int64_t tap = 0; tap < s.taps(); ++tap) shifts[tap] = planes.shift(s, tap);
  }
};

// f(images, first, how many) for each task
template <typename F>
void for_each_task(const Shape& s, F f) {
  const int64_t images = images_of_task(s);
  parallel_for(num_tasks(s), [&](int64_t task) {
    const int64_t first = task * images, rest = s.batch - first;
    f(task, first, rest < images ? rest : images);
  });
}

}  // namespace

void forward(const ForwardParams& p) {
  const Shape& s = p.shape;
  pack<false>(p.workspace, p.weight, s.num_out, s.num_in, s.taps(), p.gain);
  const auto layout = p.relu ? lay_out<true> : lay_out<false>;
  for_each_task(s, [&](int64_t, int64_t first, int64_t images) {
    static thread_local ThreadScratch memory;
    const Planes planes(s, images);
    const Scratch scratch(memory, s, planes, false);
    layout(scratch.x, planes, p.x, s, s.num_in, s.scale, first, images);
    for (int64_t c = 0; c < s.num_out; c += kRows) {
      const float* const weight = p.workspace + c * s.num_in * s.taps();
      convolve(scratch.rows, scratch.x, planes, weight, scratch.shifts, s.num_in, s.taps());
      for (int64_t r = 0; r < kRows && c + r < s.num_out; ++r) {
        const float* const plane = scratch.rows + r * planes.stride;
        const VecF bias = splat(p.gain * p.bias[c + r]);
        for (int64_t i = 0; i < images; ++i) {
          const int64_t base = ((first + i) * s.num_out + c + r) * s.pixels();
          for_each_vector(planes, i, s.height, s.width, 1, [&](int64_t at, int64_t position, int64_t n) {
            VecF v = load_part(plane + position, n) + bias;
            if (p.residual) v += load_part(p.residual + base + at, n);
            store_part(p.out + base + at, v, n);
          });
        }
      }
    }
  });
}

void backward(const BackwardParams& p) {
  const Shape& s = p.shape;
  const int64_t count = s.num_in * s.taps(), sums = s.num_out * (count + 1);
  float* const partial = p.workspace + packed_rows(s.num_in) * s.num_out * s.taps();
  if (p.dx) pack<true>(p.workspace, p.weight, s.num_in, s.num_out, s.taps(), p.gain);
  const auto layout = p.relu ? lay_out<true> : lay_out<false>;
  for_each_task(s, [&](int64_t task, int64_t first, int64_t images) {
    static thread_local ThreadScratch memory;
    const Planes planes(s, images);
    const Scratch scratch(memory, s, planes, true);
    lay_out<false>(scratch.out, planes, p.dout, s, s.num_out, 1, first, images);
    if (p.dweight) {
      layout(scratch.x, planes, p.x, s, s.num_in, s.scale, first, images);
      for (int64_t j = 0; j < count; ++j)
        scratch.sources[j] = scratch.x + j / s.taps() * planes.stride + planes.margin + scratch.shifts[j % s.taps()];
      float* const to = partial + task * sums;
      correlate_all(to, scratch.out, planes, scratch.sources, count, s.num_out);
      for (int64_t c = 0; c < s.num_out; ++c) {
        VecF sum = {};
        const float* const plane = scratch.out + c * planes.stride + planes.margin;
        for (int64_t at = 0; at < planes.positions; at += kLanes) sum += loadu(plane + at);
        to[s.num_out * count + c] = hsum(sum);
      }
    }
    if (!p.dx) return;
    const int64_t height = s.height / s.scale, width = s.width / s.scale;
    for (int64_t c = 0; c < s.num_in; c += kRows) {
      const float* const weight = p.workspace + c * s.num_out * s.taps();
      convolve(scratch.rows, scratch.out, planes, weight, scratch.shifts, s.num_out, s.taps());
      for (int64_t r = 0; r < kRows && c + r < s.num_in; ++r) {
        const float* const plane = scratch.rows + r * planes.stride;
        for (int64_t i = 0; i < images; ++i) {
          const int64_t base = ((first + i) * s.num_in + c + r) * height * width;
          for_each_vector(planes, i, height, width, s.scale, [&](int64_t at, int64_t position, int64_t n) {
            VecF v = loadu(plane + position);
            if (s.scale == 2) {  // the four pixels of one
              const float* const below = plane + position + planes.pitch;
              v = add_neighbours(v + loadu(below), loadu(plane + position + kLanes) + loadu(below + kLanes));
            }
            if (p.relu) v = load_part(p.x + base + at, n) <= splat(0.0f) ? VecF{} : v;
            store_part(p.dx + base + at, v, n);
          });
        }
      }
    }
  });
  if (!p.dweight) return;
  parallel_chunks(sums, 4 * kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      float sum = 0.0f;
      for (int64_t task = 0; task < num_tasks(s); ++task) sum += partial[task * sums + j];
      (j < s.num_out * count ? p.dweight[j] : p.dbias[j - s.num_out * count]) = p.gain * sum;
    }
  });
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::conv2d
