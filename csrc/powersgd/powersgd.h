// SPDX-License-Identifier: MIT
// The products of PowerSGD with an error buffer in 1-6-9 codes (paper appendix E): E += gradient and E X in one pass,
// and G = P Q^T with E -= G in one pass.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"

namespace dalle_fast::powersgd {

// out[rows, rank] = clamp(scale * E[rows, depth] X[depth, rank]), after E += inverse_grad_scale * grad where all of
// grad is finite. E(i, k) is at i * stride + k, or at k * stride + i when transposed; so is grad, with its own stride.
struct ProjectParams {
  uint16_t* error;
  const void* grad;    // float32 or bfloat16, or null
  const void* factor;  // X, dense: codes or float32
  uint16_t* out;       // dense
  int32_t* status;     // [3], ones on entry; zero: grad, E, out (before clamping) is not finite
  float* workspace;    // CUDA: as large as ProjectPlan says
  int64_t rows, depth, rank;
  int64_t error_stride, grad_stride;
  float inverse_grad_scale, scale;
  bool grad_is_bf16, factor_is_codes, transposed;
  Device device;
};

// How the CUDA kernels cut a product: blocks of 128 rows and a share of the depth, so that there are enough of them for
// some 130 multiprocessors. Shares are summed in one order; they do not depend on the device.
struct ProjectPlan {
  static constexpr int64_t kRows = 128, kDepth = 64;
  int tiles;  // of eight columns, in one pass over E
  int64_t width, passes, row_blocks, depth_tiles, per_split, splits;
  int64_t factor_floats, workspace_floats;  // X as fragments; with the sums of all shares behind it

  ProjectPlan(int64_t rows, int64_t depth, int64_t rank) {
    tiles = rank <= 32 ? 4 : rank <= 112 ? 14 : 16;
    width = tiles * 8;
    passes = (rank + width - 1) / width;
    row_blocks = (rows + kRows - 1) / kRows;
    depth_tiles = (depth + kDepth - 1) / kDepth;
    per_split = (depth_tiles * row_blocks + 131) / 132;
    if (per_split < 2) per_split = 2;
    splits = (depth_tiles + per_split - 1) / per_split;
    factor_floats = passes * depth_tiles * kDepth * width;
    workspace_floats = factor_floats + passes * splits * rows * width;
  }
};

// G = left[rows, rank] right[columns, rank]^T; grad = grad_factor * G; E -= error_factor * G.
struct ReconstructParams {
  const uint16_t* left;
  const uint16_t* right;
  uint16_t* error;  // or null
  float* grad;
  int64_t rows, columns, rank;
  int64_t error_stride, grad_stride;
  float grad_factor, error_factor;
  Device device;
};

DF_CPU_LAUNCHER(project, ProjectParams)
DF_CPU_LAUNCHER(reconstruct, ReconstructParams)
void project_cuda(const ProjectParams& params, void* stream);
void reconstruct_cuda(const ReconstructParams& params, void* stream);

}  // namespace dalle_fast::powersgd
