// SPDX-License-Identifier: MIT
// A warp or a block owns a row and reads it once: up to 16384 exponentials stay in registers, and dlogits are they
// times one factor. All sums run in a fixed order. Nothing goes back to the host: the number of targets stays on the
// device, and a target out of range makes its row NaN.
//
// Floor: one read and one write of the logits, 4 bytes an element in bfloat16: 62 us for 8192 x 8192 at 4.3 TB/s.
#include "../core/rows.cuh"
#include "linear_cross_entropy.h"

namespace dalle_fast::linear_cross_entropy {
namespace {

constexpr unsigned kSumThreads = 1024;  // at most, of the kernels that have one block

__global__ void __launch_bounds__(kSumThreads) count_targets(const CheckParams p) {
  DF_SHARED(int64_t, part, kSumThreads / 32);
  int64_t count = 0;
  for (int64_t row = threadIdx.x; row < p.num_rows; row += blockDim.x)
    count += p.target[row * p.target_stride] != p.ignore_index;
  count = over_row(count, &part[0], int64_t{0});
  if (threadIdx.x == 0) p.stats[0] = count;
}

__global__ void __launch_bounds__(kSumThreads) mean_of_losses(const MeanParams p) {
  DF_SHARED(double, part, kSumThreads / 32);
  double sum = 0.0;
  for (int64_t row = threadIdx.x; row < p.num_rows; row += blockDim.x) sum += static_cast<double>(p.row_loss[row]);
  sum = over_row(sum, &part[0], 0.0);
  if (threadIdx.x == 0) *p.loss = static_cast<float>(sum / static_cast<double>(p.stats[0]));
}

// The logit of the target, for the one thread that meets it.
struct Target {
  int code;
  float logit;
  bool met;

  __device__ __forceinline__ bool in(int at, int count) const {
    return static_cast<unsigned>(code - at) < static_cast<unsigned>(count);
  }
  template <int kCount>
  __device__ __forceinline__ void look(int at, const float (&v)[kCount]) {
    if (!in(at, kCount)) return;
    met = true;
    DF_UNROLL
    for (int i = 0; i < kCount; ++i) logit = at + i == code ? v[i] : logit;
  }
};

template <typename T, typename G, Rows kRows>
__global__ void __launch_bounds__(kMaxRowThreads, kRows == Rows::kElements ? 1 : 2) loss_and_grad(const Params p) {
  DF_SHARED(SoftmaxState, part, kMaxRowThreads / 32);
  constexpr int kN = kPiece<T>;
  const int count = static_cast<int>(p.num_codes), step = kN * blockDim.x, first = kN * threadIdx.x;
  const auto there = [&](int at) { return kRows == Rows::kFull || at < count; };
  const int rest = kRows == Rows::kFull ? count : first + kHeld / kN * step;  // does not fit: it is read again
  const int64_t row = row_of_thread();
  if (row >= p.num_rows) return;
  const T* x = static_cast<const T*>(p.logits) + row * p.logits_stride;
  G* grad = static_cast<G*>(p.grad) + row * p.grad_stride;
  const int64_t code = p.target[row * p.target_stride];
  if (code == p.ignore_index || code < 0 || code >= p.num_codes) {
    float nothing[kN];
    DF_UNROLL
    for (int i = 0; i < kN; ++i) nothing[i] = code == p.ignore_index ? 0.0f : NAN;
    if (threadIdx.x == 0) p.row_loss[row] = nothing[0];
    if (p.grad)
      for (int at = first; at < count; at += step) store_piece<kRows>(grad, at, count, nothing);
    return;
  }

  Target target{static_cast<int>(code), 0.0f, false};
  float v[kHeld / kN][kN], largest = -INFINITY;
  DF_UNROLL
  for (int j = 0, at = first; j < kHeld / kN; ++j, at += step)
    if (there(at)) unpack_codes<kRows, T>(v[j], load_piece<kRows>(x, at, count), at, count);
  DF_UNROLL
  for (int j = 0, at = first; j < kHeld / kN; ++j, at += step) {
    if (!there(at)) break;
    target.look(at, v[j]);
    DF_UNROLL
    for (int i = 0; i < kN; ++i) largest = fmaxf(largest, v[j][i]);
  }
  SoftmaxState mine{softmax_shift(largest * kLog2e), 0.0f};
  const float held_shift = mine.shift;
  DF_UNROLL
  for (int j = 0, at = first; j < kHeld / kN; ++j, at += step) {
    if (!there(at)) break;
    DF_UNROLL
    for (int i = 0; i < kN; ++i) {
      v[j][i] = fast_exp2(fmaf(v[j][i], kLog2e, -held_shift));
      mine.sum += v[j][i];
    }
  }
  for (int at = rest; at < count; at += step) {
    float more[1][kN];
    unpack_codes<kRows, T>(more[0], load_piece<kRows>(x, at, count), at, count);
    target.look(at, more[0]);
    softmax_add<1, kN>(&mine, more, kLog2e);
  }
  const SoftmaxState all = over_row(mine, &part[0], kNoSoftmax);
  if (target.met) p.row_loss[row] = kLn2 * (log2f(all.sum) - fmaf(target.logit, kLog2e, -all.shift));
  if (!p.grad) return;

  const float scale = p.grad_scale / static_cast<float>(p.stats[0]), factor = scale / all.sum;
  const auto write = [&](int at, float (&e)[kN], float by) {
    if (target.in(at, kN)) {
      DF_UNROLL
      for (int i = 0; i < kN; ++i) e[i] = fmaf(e[i], by, at + i == target.code ? -scale : 0.0f);
    } else {
      DF_UNROLL
      for (int i = 0; i < kN; ++i) e[i] *= by;
    }
    store_piece<kRows>(grad, at, count, e);
  };
  const float held_factor = fast_exp2(held_shift - all.shift) * factor;
  DF_UNROLL
  for (int j = 0, at = first; j < kHeld / kN; ++j, at += step) {
    if (!there(at)) break;
    write(at, v[j], held_factor);
  }
  for (int at = rest; at < count; at += step) {
    float more[kN];
    unpack_codes<kRows, T>(more, load_piece<kRows>(x, at, count), at, count);
    DF_UNROLL
    for (int i = 0; i < kN; ++i) more[i] = fast_exp2(fmaf(more[i], kLog2e, -all.shift));
    write(at, more, factor);
  }
}

// 32 columns a block; a thread sums a piece of them over every few rows.
constexpr int kColumns = 32;
constexpr unsigned kColumnThreads = 256, kColumnWarps = kColumnThreads / 32;

template <typename G, Rows kRows>
__global__ void __launch_bounds__(kColumnThreads) column_sums(const Params p) {
  DF_SHARED(float, part, kColumnWarps* kColumns);
  constexpr int kN = kPiece<G>;
  constexpr unsigned kLanes = kColumns / kN;
  const int count = static_cast<int>(p.num_codes), column = static_cast<int>(threadIdx.x % kLanes) * kN;
  const int at = static_cast<int>(blockIdx.x) * kColumns + column;
  const G* grad = static_cast<const G*>(p.grad);
  float sum[kN] = {};
  if (at < count)
    for (int64_t row = threadIdx.x / kLanes; row < p.num_rows; row += kColumnThreads / kLanes) {
      float v[kN];
      unpack_piece<G>(v, load_piece<kRows>(grad + row * p.grad_stride, at, count));
      DF_UNROLL
      for (int i = 0; i < kN; ++i) sum[i] += v[i];
    }
  DF_UNROLL
  for (int i = 0; i < kN; ++i) {
    sum[i] = over_lanes(sum[i], Add{}, kLanes);
    if (threadIdx.x % 32 < kLanes) part[threadIdx.x / 32 * kColumns + column + i] = sum[i];
  }
  __syncthreads();
  const int mine = static_cast<int>(blockIdx.x) * kColumns + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kColumns || mine >= count) return;
  float all = part[threadIdx.x];
  for (unsigned w = 1; w < kColumnWarps; ++w) all += part[w * kColumns + threadIdx.x];
  p.dbias[mine] += all;
}

unsigned sum_threads(int64_t rows) {
  const int64_t warps = rows ? (rows + 31) / 32 : 1;
  return 32 * warps < kSumThreads ? static_cast<unsigned>(32 * warps) : kSumThreads;
}

template <typename T, typename G>
void run(const Params& p, void* stream) {
  const RowLaunch launch(p.num_rows, p.num_codes);
  bool pieces = rows_are_pieces<T>(p.logits, p.num_codes, p.logits_stride);
  if (p.grad) pieces = pieces && rows_are_pieces<G>(p.grad, p.num_codes, p.grad_stride);
  with_rows(pieces, launch.full, [&](auto rows) {
    DF_LAUNCH((loss_and_grad<T, G, decltype(rows)::value>), launch.blocks, launch.block, 0, stream, p);
  });
  if (!p.grad || !p.dbias) return;
  with_pieces(pieces, [&](auto rows) {
    DF_LAUNCH((column_sums<G, decltype(rows)::value>), static_cast<unsigned>((p.num_codes + kColumns - 1) / kColumns),
              kColumnThreads, 0, stream, p);
  });
}

}  // namespace

void check_cuda(const CheckParams& p, void* stream) {
  const DeviceGuard guard(p.device.index);
  DF_LAUNCH(count_targets, 1, sum_threads(p.num_rows), 0, stream, p);
}

void loss_and_grad_cuda(const Params& p, void* stream) {
  if (p.num_rows == 0 || p.num_codes == 0) return;
  const DeviceGuard guard(p.device.index);
  if (p.dtype == DType::kBFloat16)
    run<bf16_t, bf16_t>(p, stream);
  else if (p.grad_dtype == DType::kFloat16)
    run<float, fp16_t>(p, stream);
  else
    run<float, float>(p, stream);
}

void mean_cuda(const MeanParams& p, void* stream) {
  const DeviceGuard guard(p.device.index);
  DF_LAUNCH(mean_of_losses, 1, sum_threads(p.num_rows), 0, stream, p);
}

}  // namespace dalle_fast::linear_cross_entropy
