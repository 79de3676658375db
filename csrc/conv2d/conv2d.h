// SPDX-License-Identifier: MIT
// out = residual + gain (conv(relu(x)) + bias): stride 1, odd kernel, "same" zero padding, for few channels; x may come
// at half the size and counts as doubled. A library fills its vectors with channels, which leaves them half empty at 6
// or 12; here lanes are pixels.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"

namespace dalle_fast::conv2d {

struct Shape {
  int64_t batch, num_in, num_out, height, width, kernel;  // of the output
  int64_t scale;                                          // x is [B, num_in, H / scale, W / scale], 1 or 2

  int64_t pixels() const { return height * width; }
  int64_t taps() const { return kernel * kernel; }
};

// Output channels whose accumulators are in registers at a time; weights are packed that many together.
constexpr int64_t kRows = 6;
constexpr int64_t packed_rows(int64_t channels) { return (channels + kRows - 1) / kRows * kRows; }

// Images that one task lays out side by side, so that small ones fill vectors. A function of the shape alone: sums over
// the batch are the same at any number of threads.
constexpr int64_t kMaxImages = 4, kMaxPlaneFloats = 1 << 15;
inline int64_t images_of_task(const Shape& s) {
  const int64_t floats = (s.num_in > s.num_out ? s.num_in : s.num_out) * s.pixels();
  const int64_t fitting = floats ? kMaxPlaneFloats / floats : 1;
  return fitting < 1 ? 1 : fitting < kMaxImages ? fitting : kMaxImages;
}
inline int64_t num_tasks(const Shape& s) { return (s.batch + images_of_task(s) - 1) / images_of_task(s); }

inline int64_t forward_workspace(const Shape& s) { return packed_rows(s.num_out) * s.num_in * s.taps(); }
// packed weights, and the sums of each task for the gradients of weight and bias
inline int64_t backward_workspace(const Shape& s) {
  return packed_rows(s.num_in) * s.num_out * s.taps() + num_tasks(s) * s.num_out * (s.num_in * s.taps() + 1);
}

// Everything is float32 and contiguous.
struct ForwardParams {
  Shape shape;
  float* out;             // [B, num_out, H, W]
  const float* x;         // [B, num_in, H / scale, W / scale]
  const float* weight;    // [num_out, num_in, kernel, kernel]
  const float* bias;      // [num_out]
  const float* residual;  // as `out`, or null
  float* workspace;       // forward_workspace
  float gain;
  bool relu;
};

struct BackwardParams {
  Shape shape;
  float* dx;       // as `x`, or null
  float* dweight;  // [num_out, num_in, kernel, kernel]; null only together with dbias
  float* dbias;    // [num_out]
  const float* dout;
  const float* x;
  const float* weight;
  float* workspace;  // backward_workspace
  float gain;
  bool relu;
};

DF_CPU_LAUNCHER(forward, ForwardParams)
DF_CPU_LAUNCHER(backward, BackwardParams)

}  // namespace dalle_fast::conv2d
