// SPDX-License-Identifier: MIT
// One block a row: statistics in one pass over the logits, dlogits in a second that finds them in the cache. Sums over
// rows (loss, bias) run in a fixed order, so that results are the same at every call. Floor: one read and one write of
// the logits.
#include "../core/device_math.cuh"
#include "linear_cross_entropy.h"

namespace dalle_fast::linear_cross_entropy {
namespace {

constexpr unsigned kThreads = 256;

__global__ void __launch_bounds__(kThreads) check_targets(const CheckParams p) {
  DF_SHARED(int64_t, part, kThreads);
  int64_t count = 0, bad = INT64_MAX;
  for (int64_t row = threadIdx.x; row < p.num_rows; row += kThreads) {
    const int64_t target = p.target[row * p.target_stride];
    if (target == p.ignore_index) continue;
    ++count;
    if ((target < 0 || target >= p.num_codes) && row < bad) bad = row;
  }
  count = reduce_groups(count, &part[0], 1, kThreads, [](int64_t a, int64_t b) { return a + b; });
  bad = reduce_groups(bad, &part[0], 1, kThreads, [](int64_t a, int64_t b) { return a < b ? a : b; });
  if (threadIdx.x == 0) {
    p.stats[0] = count;
    p.stats[1] = bad == INT64_MAX ? -1 : bad;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rows(const Params p) {
  DF_SHARED(SoftmaxState, part, kThreads);
  const int64_t row = blockIdx.x;
  T* const x = static_cast<T*>(p.logits) + row * p.row_stride;
  const int64_t target = p.target[row * p.target_stride];
  if (target == p.ignore_index || target < 0 || target >= p.num_codes) {  // others were refused before
    if (threadIdx.x == 0) p.row_loss[row] = 0.0f;
    if (p.write_grad)
      for (int64_t c = threadIdx.x; c < p.num_codes; c += kThreads) from_float(&x[c], 0.0f);
    return;
  }
  const float at_target = to_float(x[target]);
  SoftmaxState state{-INFINITY, 0.0f};
  for (int64_t c = threadIdx.x; c < p.num_codes; c += kThreads)
    state = softmax_merge(state, {to_float(x[c]), 1.0f}, 1.0f);
  state = reduce_groups(state, &part[0], 1, kThreads,
                        [](SoftmaxState a, SoftmaxState b) { return softmax_merge(a, b, 1.0f); });
  if (threadIdx.x == 0) p.row_loss[row] = logf(state.sum) + (state.largest - at_target);
  if (!p.write_grad) return;
  const float factor = p.scale / state.sum;
  for (int64_t c = threadIdx.x; c < p.num_codes; c += kThreads) {
    const float d = expf(to_float(x[c]) - state.largest) * factor;
    from_float(&x[c], c == target ? d - p.scale : d);
  }
}

__global__ void __launch_bounds__(kThreads) sum_losses(const Params p) {
  DF_SHARED(double, part, kThreads);
  double sum = 0.0;
  for (int64_t row = threadIdx.x; row < p.num_rows; row += kThreads) sum += static_cast<double>(p.row_loss[row]);
  sum = reduce_groups(sum, &part[0], 1, kThreads, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) *p.loss_sum += sum;
}

// 32 columns a block, eight threads a column
template <typename T>
__global__ void __launch_bounds__(kThreads) column_sums(const Params p) {
  DF_SHARED(float, part, kThreads);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  const T* grad = static_cast<const T*>(p.logits);
  float sum = 0.0f;
  if (c < p.num_codes)
    for (int64_t row = threadIdx.x / 32; row < p.num_rows; row += kThreads / 32)
      sum += to_float(grad[row * p.row_stride + c]);
  sum = reduce_groups(sum, &part[0], 32, kThreads / 32, [](float a, float b) { return a + b; });
  if (c < p.num_codes && threadIdx.x < 32) p.dbias[c] += sum;
}

template <typename T>
void run(const Params& p, void* stream) {
  DF_LAUNCH(rows<T>, static_cast<unsigned>(p.num_rows), kThreads, 0, stream, p);
  DF_LAUNCH(sum_losses, 1, kThreads, 0, stream, p);
  if (p.write_grad && p.dbias && p.num_codes)
    DF_LAUNCH(column_sums<T>, static_cast<unsigned>((p.num_codes + 31) / 32), kThreads, 0, stream, p);
}

}  // namespace

void check_cuda(const CheckParams& p, void* stream) {
  const DeviceGuard guard(p.device.index);
  DF_LAUNCH(check_targets, 1, kThreads, 0, stream, p);
}

void loss_and_grad_cuda(const Params& p, void* stream) {
  if (p.num_rows == 0) return;
  const DeviceGuard guard(p.device.index);
  if (p.dtype == DType::kFloat32)
    run<float>(p, stream);
  else
    run<bf16_t>(p, stream);
}

}  // namespace dalle_fast::linear_cross_entropy
