// SPDX-License-Identifier: MIT
// The part of linear + cross-entropy between the matrix products: logits -> loss and, in place, dlogits.
// Per row with target t:  loss = logsumexp(x) - x[t];  dx = scale * (softmax(x) - onehot(t)).
// The products themselves are torch's; see dalle_fast/ops/linear_cross_entropy/op.py.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"

namespace dalle_fast::linear_cross_entropy {

struct CheckParams {
  int64_t* stats;         // [2]: number of targets that count; row of the first target out of range, or -1
  const int64_t* target;  // [num_rows], `target_stride` elements apart
  int64_t target_stride;
  int64_t num_rows;
  int64_t num_codes;
  int64_t ignore_index;
  Device device;
};

struct Params {
  double* loss_sum;       // [1]: grows by the losses of these rows, in row order
  float* row_loss;        // [num_rows]
  void* logits;           // [num_rows, num_codes], rows dense; becomes dlogits when write_grad
  float* dbias;           // [num_codes] or null: grows by the column sums of dlogits
  const int64_t* target;  // [num_rows], `target_stride` elements apart; checked already
  int64_t target_stride;
  int64_t num_rows;
  int64_t num_codes;
  int64_t row_stride;
  int64_t ignore_index;
  float scale;
  bool write_grad;
  DType dtype;  // float32 or bfloat16
  Device device;
};

DF_CPU_LAUNCHER(check, CheckParams)
DF_CPU_LAUNCHER(loss_and_grad, Params)
void check_cuda(const CheckParams& params, void* stream);
void loss_and_grad_cuda(const Params& params, void* stream);

}  // namespace dalle_fast::linear_cross_entropy
