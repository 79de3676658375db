// SPDX-License-Identifier: MIT
// out = residual + gain (conv(relu(x)) + bias): stride 1, odd kernel, "same" zero padding, for few channels. A library
// fills its vectors with channels, which leaves them half empty at 6 or 12; here lanes are pixels.
//
// A 1x1 kernel may count each pixel of its result as two by two (scale 2): the convolution of a doubled x is the
// doubled convolution of x, at a quarter of its products.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"

namespace dalle_fast::conv2d {

struct Shape {
  int64_t batch, num_in, num_out, height, width, kernel;  // height and width of x
  int64_t scale;                                          // the result's are `scale` times those; 2: kernel is 1

  int64_t pixels() const { return height * width; }
  int64_t taps() const { return kernel * kernel; }
  int64_t pad() const { return kernel / 2; }
};

// Output channels whose accumulators are in registers at a time; weights are packed that many together.
constexpr int64_t kRows = 6;
constexpr int64_t packed_rows(int64_t channels) { return (channels + kRows - 1) / kRows * kRows; }

// A task of a convolution: some rows of one image. All functions of the shape alone: sums over the batch are the same
// at any number of threads.
constexpr int64_t kBandPositions = 1024;
inline int64_t band_rows(const Shape& s) {
  const int64_t rows = s.width ? kBandPositions / s.width : 1;
  return rows < 1 ? 1 : rows < s.height ? rows : s.height;
}
inline int64_t num_bands(const Shape& s) { return s.pixels() ? (s.height + band_rows(s) - 1) / band_rows(s) : 0; }

// Words between the planes of a band that lie row after row: whole vectors on any machine, and an odd number of them,
// or channels at one position would fall into the same sets of a cache.
inline int64_t plane_stride(const Shape& s) {
  return (((band_rows(s) * s.width + 31) / 32 + (2 * s.pad() * s.width + 31) / 32) | 1) * 32;
}
// What a layout (kernels.h) keeps: masks of the shifted planes, offsets of vectors.
inline int64_t layout_words(const Shape& s) { return (s.kernel + 1) * plane_stride(s); }

// A task of the gradient of the weight: a group of images and some channels of x.
constexpr int64_t kGroupPositions = 1024, kTaskChannels = 12;
inline int64_t images_of_group(const Shape& s) {
  const int64_t images = s.pixels() ? kGroupPositions / s.pixels() : 1;
  return images < 1 ? 1 : images < s.batch ? images : s.batch > 0 ? s.batch : 1;
}
inline int64_t num_groups(const Shape& s) {  // one at least, whose sums are zero
  return s.batch ? (s.batch + images_of_group(s) - 1) / images_of_group(s) : 1;
}

// packed weights, a layout
inline int64_t forward_workspace(const Shape& s) {
  return packed_rows(s.num_out) * s.num_in * s.taps() + layout_words(s);
}
// packed weights, two layouts, the sums of each group, and dout at the size of x
inline int64_t backward_workspace(const Shape& s) {
  return packed_rows(s.num_in) * s.num_out * s.taps() + 2 * layout_words(s) +
         num_groups(s) * s.num_out * (s.num_in * s.taps() + 1) + (s.scale - 1) * s.batch * s.num_out * s.pixels();
}

struct Weight {  // [num_out, num_in, kernel, kernel] and the strides of these dimensions
  float* data;
  int64_t stride[4];

  float* at(const Shape& s, int64_t out, int64_t in, int64_t tap) const {
    return data + out * stride[0] + in * stride[1] + tap / s.kernel * stride[2] + tap % s.kernel * stride[3];
  }
};

// Weights and biases are float32; all else is contiguous, float32 or (cpu_bf16.cpp) bfloat16.
struct ForwardParams {
  Shape shape;
  void* out;             // [B, num_out, scale H, scale W]
  const void* x;         // [B, num_in, H, W]
  Weight weight;         // cpu_bf16.cpp rounds it to bfloat16
  const float* bias;     // [num_out]
  const void* residual;  // as `out`, or null
  float* workspace;      // forward_workspace
  float gain;
  bool relu;
};

struct BackwardParams {
  Shape shape;
  void* dx;        // as `x`, or null
  Weight dweight;  // data null: not wanted, nor is dbias
  float* dbias;    // [num_out]
  const void* dout;
  const void* x;
  Weight weight;
  float* workspace;  // backward_workspace
  float gain;
  bool relu;
};

DF_CPU_LAUNCHER(forward, ForwardParams)
DF_CPU_LAUNCHER(backward, BackwardParams)
DF_BF16_LAUNCHER(forward, ForwardParams)
DF_BF16_LAUNCHER(backward, BackwardParams)

}  // namespace dalle_fast::conv2d
