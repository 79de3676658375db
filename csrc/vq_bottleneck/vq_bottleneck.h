// SPDX-License-Identifier: MIT
// The discrete bottleneck of the dVAE for rows x [num_rows, C] (grid cells):
//   l = W x + b;  y = softmax((l + g) / tau);  out = codebook y + codebook bias
//   q = softmax(l);  kl = sum q ln q + ln V
//   dl = y (dy - sum y dy) / tau + dkl q (ln q - sum q ln q) with dy = dout codebook
// Noise g: key = seed, counter = (c / 4, first_row + r, offset), word c % 4, as gumbel_softmax draws it.
//
// The CPU does all of it. On CUDA the products are torch's, on a chunk of rows whose logits exist, and kernels do what
// is between them; see dalle_fast/ops/vq_bottleneck/op.py.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/kl.h"
#include "../core/tensor.h"

namespace dalle_fast::vq_bottleneck {

// Both distributions of a row: y = exp((l + g - largest) / tau) * inverse_sum, ln q = l - largest_logit - log_sum.
struct RowStats {
  float largest, inverse_sum, largest_logit, log_sum;
};

// Rows or columns that kernels may write for `n`: whole vectors and tiles on any machine.
constexpr int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

struct Noise {
  uint64_t seed;
  uint64_t offset;
  uint32_t first_row;
  float inverse_tau;
};

// ---- CPU: operands of products all float32, or all bfloat16 where the processor multiplies it; rows dense

struct ForwardParams {
  void* out;  // [num_rows, out_stride]; float32: out_stride >= padded(D), and what is past D may be written
  float* kl;  // [num_rows]
  RowStats* stats;
  const void* x;               // [num_rows, C], rows x_stride apart
  const void* head_weight;     // [V, C]
  const float* head_bias;      // [V] or null
  const void* codebook;        // [D, V]
  const float* codebook_bias;  // [D] or null
  float* workspace;            // forward_workspace()
  int64_t num_rows, num_channels, num_codes, width;
  int64_t x_stride, out_stride;
  Noise noise;
};

struct BackwardParams {
  void* dx;             // [num_rows, dx_stride] or null; float32: dx_stride >= padded(C), as of out
  float* dhead_weight;  // [padded(V), dhead_stride >= padded(C)] or null
  float* dhead_bias;    // [V] or null
  float* dcodebook;     // [padded(D), dcodebook_stride >= padded(V)] or null
  const void* x;
  const void* head_weight;
  const float* head_bias;
  const void* codebook;
  const RowStats* stats;
  const float* kl;
  const void* dout;  // [num_rows, D] dense
  const float* dkl;  // [num_rows]
  float* workspace;  // backward_workspace()
  int64_t num_rows, num_channels, num_codes, width;
  int64_t x_stride, dx_stride, dhead_stride, dcodebook_stride;
  int64_t chunk_rows;  // whose dlogits and y exist at a time
  Noise noise;
};

// Floats between rows of `num_codes`: an odd number of vectors, or rows at one column would fall into the same sets of
// a cache.
constexpr int64_t row_stride(int64_t num_codes) { return padded(num_codes) + 16; }

// Floats of packed matrices and of a chunk, enough for either dtype.
constexpr int64_t forward_workspace(int64_t num_channels, int64_t num_codes, int64_t width) {
  return padded(num_channels) * padded(num_codes) + padded(num_codes) * padded(width);
}
constexpr int64_t backward_workspace(int64_t num_channels, int64_t num_codes, int64_t width, int64_t chunk_rows) {
  const int64_t codes = padded(num_codes), channels = padded(num_channels), outputs = padded(width);
  return (2 * channels + outputs) * codes + padded(chunk_rows) * (channels + outputs + 2 * row_stride(num_codes));
}

DF_CPU_LAUNCHER(forward, ForwardParams)
DF_CPU_LAUNCHER(backward, BackwardParams)
DF_BF16_LAUNCHER(forward, ForwardParams)
DF_BF16_LAUNCHER(backward, BackwardParams)

// ---- CUDA: a chunk's matrices are dense [num_rows, stride], stride a multiple of 16; padding may be written

struct RelaxParams {
  void* y;              // dtype; float32 may be the logits themselves
  float* kl;            // [num_rows]
  RowStats* stats;      // [num_rows]
  const float* logits;  // without the bias
  const float* bias;    // [V] or null
  int64_t num_rows, num_codes, stride;
  Noise noise;
  DType dtype;  // float32 or bfloat16
  Device device;
};

struct GradientParams {
  void* y;              // dtype; float32 may be dy itself
  void* dlogits;        // dtype; float32 may be the logits themselves
  const float* logits;  // without the bias
  const float* bias;    // [V] or null
  const float* dy;
  const RowStats* stats;  // [num_rows]
  const float* kl;        // [num_rows]
  const float* dkl;       // [num_rows]
  int64_t num_rows, num_codes, stride;
  Noise noise;
  DType dtype;
  Device device;
};

void relax_cuda(const RelaxParams& params, void* stream);
void gradient_cuda(const GradientParams& params, void* stream);

}  // namespace dalle_fast::vq_bottleneck
