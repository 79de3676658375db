// SPDX-License-Identifier: MIT
// Orthonormal columns of many matrices: Q of the QR decomposition of P + eps I, by Householder reflections.
#pragma once

#include <math.h>

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"
#include "../scalar/minifloat.h"

namespace dalle_fast::householder {

// `count` matrices of one shape. p and q hold float32, or 1-6-9 codes.
struct Batch {
  const void* p;
  void* q;      // [count, rows, columns], dense
  float* work;  // CUDA with codes: as q in float32
  int64_t count, rows, columns;
  int64_t stride, row_stride, column_stride;  // of p
};

struct Params {
  const Batch* batches;
  int64_t num_batches;
  float eps;
  bool codes;
  Device device;
};

// A power of two that brings the largest magnitude of a column near 1, so that squares neither overflow nor vanish.
// Scaling a column by a positive number leaves Q as it is.
DF_HD float column_scale(float largest) {
  const int exponent = static_cast<int>(float_bits(largest) >> 23 & 255u);
  if (exponent == 255) return 1.0f;  // Inf, NaN
  const int e = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  return bits_float(static_cast<uint32_t>(254 - e) << 23);
}

// H = I - tau v v^T with v = (1, x * inverse) takes (alpha, x) to (beta, 0); LAPACK's signs. What dependent columns
// leave of each other shrinks with every reflection, until its squares vanish and tau and v would no longer fit each
// other; far below the rounding of a scaled column it counts as zero.
struct Reflection {
  float tau, inverse;
};
DF_HD Reflection reflection_of(float alpha, float norm2) {  // norm2: of x
  if (norm2 < 0x1p-108f) return {0.0f, 0.0f};
  const float length = sqrtf(alpha * alpha + norm2);
  const float beta = alpha < 0.0f ? length : -length;
  return {(beta - alpha) / beta, 1.0f / (alpha - beta)};
}

DF_CPU_LAUNCHER(orthonormalize, Params)
void orthonormalize_cuda(const Params& params, void* stream);

}  // namespace dalle_fast::householder
