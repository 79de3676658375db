// SPDX-License-Identifier: MIT
// Linear layer and cross-entropy. Per row of logits l with target t:
//   loss = logsumexp(l) - l[t];  dl = scale / count * (softmax(l) - onehot(t)).
// In float32 the CPU does all of it, and in bfloat16 without instructions for it. Else the products are torch's, on a
// chunk of rows whose logits exist, and kernels do what is between them; see dalle_fast/ops/linear_cross_entropy/op.py.
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

// CPU, float32: l = x weight^T + bias, the loss, and dx = dl weight, dweight = dl^T x, dbias = sums of dl where wanted.
struct WholeParams {
  float* loss;            // [1]
  float* dx;              // [num_rows, width] or null
  float* dweight;         // [num_codes, width] or null
  float* dbias;           // [num_codes] or null
  int64_t* stats;         // [2], as of the check; where a target is out of range nothing else is written
  const float* x;         // [num_rows, width]; all matrices dense
  const float* weight;    // [num_codes, width]
  const float* bias;      // [num_codes] or null
  const int64_t* target;  // [num_rows], `target_stride` elements apart
  float* workspace;       // whole_workspace()
  int64_t target_stride;
  int64_t num_rows, num_codes, width;
  int64_t chunk_rows;  // whose logits exist at a time
  int64_t ignore_index;
  float grad_scale;

  bool wants_gradient() const { return dx || dweight || dbias; }
};

// Floats between rows of logits: an odd number of vectors, or rows at one column would meet in the same sets of a
// cache.
constexpr int64_t logits_stride(int64_t num_codes) { return (num_codes + 31) / 32 * 32 + 16; }

// Floats of the losses and of packed weight^T; for gradients of a chunk's logits, of packed weight and a chunk of x
// too.
constexpr int64_t whole_workspace(int64_t num_rows, int64_t num_codes, int64_t width, int64_t chunk_rows, bool grad) {
  const int64_t codes = (num_codes + 15) / 16 * 16, channels = (width + 15) / 16 * 16;
  const int64_t loss = (num_rows + 15) / 16 * 16 + width * codes;
  return grad ? loss + chunk_rows * (logits_stride(num_codes) + channels) + num_codes * channels : loss;
}

DF_CPU_LAUNCHER(check, CheckParams)
DF_CPU_LAUNCHER(whole, WholeParams)
DF_CPU_LAUNCHER(loss_and_grad, Params)
DF_CPU_LAUNCHER(mean, MeanParams)
void check_cuda(const CheckParams& params, void* stream);
void loss_and_grad_cuda(const Params& params, void* stream);
void mean_cuda(const MeanParams& params, void* stream);

}  // namespace dalle_fast::linear_cross_entropy
