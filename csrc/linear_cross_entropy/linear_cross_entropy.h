// SPDX-License-Identifier: MIT
// The part of linear + cross-entropy between the matrix products: logits -> loss and dlogits.
// Per row with target t:  loss = logsumexp(x) - x[t];  dx = scale / count * (softmax(x) - onehot(t)).
// The products themselves are torch's; see dalle_fast/ops/linear_cross_entropy/op.py.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor.h"

namespace dalle_fast::linear_cross_entropy {

struct CheckParams {
  int64_t* stats;         // [2]: number of targets that count; on CPU also the first row out of range, or -1
  const int64_t* target;  // [num_rows], `target_stride` elements apart
  int64_t target_stride;
  int64_t num_rows;
  int64_t num_codes;
  int64_t ignore_index;
  Device device;
};

struct Params {
  float* row_loss;        // [num_rows]
  void* grad;             // [num_rows, num_codes], rows dense, or null: dlogits; on CPU the logits themselves
  float* dbias;           // [num_codes] or null: grows by the column sums of dlogits
  void* logits;           // [num_rows, num_codes], rows dense
  const int64_t* target;  // [num_rows], `target_stride` elements apart; on CUDA one out of range makes the row NaN
  const int64_t* stats;   // from the check
  int64_t target_stride;
  int64_t num_rows;
  int64_t num_codes;
  int64_t logits_stride;
  int64_t grad_stride;
  int64_t ignore_index;
  float grad_scale;
  DType dtype;       // of the logits: float32 or bfloat16
  DType grad_dtype;  // the same, or float16 beside float32 logits (CUDA)
  Device device;
};

struct MeanParams {
  float* loss;            // [1]: the sum of row_loss over the targets that count
  const float* row_loss;  // [num_rows]
  const int64_t* stats;
  int64_t num_rows;
  Device device;
};

DF_CPU_LAUNCHER(check, CheckParams)
DF_CPU_LAUNCHER(loss_and_grad, Params)
DF_CPU_LAUNCHER(mean, MeanParams)
void check_cuda(const CheckParams& params, void* stream);
void loss_and_grad_cuda(const Params& params, void* stream);
void mean_cuda(const MeanParams& params, void* stream);

}  // namespace dalle_fast::linear_cross_entropy
