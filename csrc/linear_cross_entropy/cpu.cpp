// SPDX-License-Identifier: MIT
// A row is read from memory once and written once: 8192 logits fit the first-level cache, so its three passes (max;
// exp and sum; scale) cost arithmetic only. bfloat16 rows keep their exponentials in a float32 scratch row.
// Parallel over rows; the column sums for the bias over blocks of columns. Both orders are fixed.
#include "linear_cross_entropy.h"

#include "../core/parallel.h"
#include "../core/sgemm.h"
#include "../core/simd.h"

namespace dalle_fast::linear_cross_entropy {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;
constexpr int64_t kMaxBlock = 16;  // rows
constexpr int64_t kBlockCodes = 4096;

template <typename T>
DF_INLINE float row_max(const T* x, int64_t n) {
  VecF best[kUnroll];
  for (int k = 0; k < kUnroll; ++k) best[k] = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int k = 0; k < kUnroll; ++k) best[k] = vmax(loadu(x + i + k * kLanes), best[k]);
  for (; i < n; i += kLanes) {
    const VecF v = n - i >= kLanes ? loadu(x + i) : load_tail(x + i, static_cast<int>(n - i));
    best[0] = vmax(v, best[0]);
  }
  return hmax(vmax(vmax(best[0], best[1]), vmax(best[2], best[3])));
}

// Sum of exp(x - shift); the exponentials go to `out` (which may be x) when kStore.
template <bool kStore, typename T>
DF_INLINE float row_exp_sum(float* out, const T* x, int64_t n, float shift) {
  VecF sum[kUnroll] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int k = 0; k < kUnroll; ++k) {
      const VecF e = exp(loadu(x + i + k * kLanes) - splat(shift));
      if (kStore) storeu(out + i + k * kLanes, e);
      sum[k] += e;
    }
  for (; i < n; i += kLanes) {
    const int rest = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    const VecF v = rest == kLanes ? loadu(x + i) : load_tail(x + i, rest);
    const VecF e = exp(v - splat(shift));
    if (kStore) rest == kLanes ? storeu(out + i, e) : store_n(out + i, e, rest);
    sum[0] += e;
  }
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Maximum and sum of exp(x - maximum) in one pass: a block waits in registers between the two, and a block that raises
// the maximum rescales the sum.
template <typename T>
DF_INLINE void row_max_and_exp_sum(const T* x, int64_t n, float& shift, float& sum) {
  constexpr int kHeld = kLanes == 16 ? 16 : 8;
  shift = -__builtin_inff();
  VecF total = {};
  int64_t i = 0;
  for (; i + kHeld * kLanes <= n; i += kHeld * kLanes) {
    VecF v[kHeld], best = loadu(x + i);
    v[0] = best;
    for (int k = 1; k < kHeld; ++k) {
      v[k] = loadu(x + i + k * kLanes);
      best = vmax(v[k], best);
    }
    const float top = hmax(best);
    if (top > shift) {
      if (i > 0) total *= exp(splat(shift) - splat(top));
      shift = top;
    }
    for (int k = 0; k < kHeld; ++k) total += exp(v[k] - splat(shift));
  }
  sum = hsum(total);
  if (i == n) return;
  const float top = row_max(x + i, n - i), larger = top > shift ? top : shift;
  if (i > 0) sum *= exp(splat(shift) - splat(larger))[0];
  shift = larger;
  sum += row_exp_sum<false>(static_cast<float*>(nullptr), x + i, n - i, shift);
}

// out = e * factor; what would become subnormal becomes 0: such numbers slow down this product and the ones to come.
template <typename T>
DF_INLINE void row_scale(T* out, const float* e, int64_t n, float factor) {
  const VecF least = splat(1.17549435e-38f / factor);
  const auto scaled = [&](VecF x) { return select((VecI)(x < least), VecF{}, x) * splat(factor); };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) storeu(out + i, scaled(loadu(e + i)));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_n(out + i, scaled(load_n(e + i, rest)), rest);
  }
}

template <typename T>
DF_INLINE void row_zero(T* out, int64_t n) {
  __builtin_memset(out, 0, static_cast<std::size_t>(n) * sizeof(T));  // zero bits are zero in both dtypes
}

// Where the exponentials of a block's rows wait: in place for float32.
DF_INLINE float* exponentials(float* row, int64_t, int64_t) { return row; }
DF_INLINE float* exponentials(bf16*, int64_t i, int64_t n) {
  static thread_local ThreadScratch scratch;
  return scratch.floats(kMaxBlock * ((n + kLanes - 1) / kLanes * kLanes)) + i * ((n + kLanes - 1) / kLanes * kLanes);
}

// Rows [begin, end), at most kMaxBlock. Pass by pass over the block, not row by row: the reductions at the end of a
// short row then overlap with the next row's arithmetic, and one vector takes the logarithms.
template <typename T>
void block_pass(const Params& p, int64_t begin, int64_t end) {
  const int64_t n = p.num_codes;
  const int64_t rows = end - begin;
  float shift[kMaxBlock], sum[kMaxBlock];
  T* const first = static_cast<T*>(p.logits) + begin * p.logits_stride;
  for (int64_t i = 0; i < rows; ++i) {
    if (p.grad)
      shift[i] = row_max(first + i * p.logits_stride, n);
    else
      row_max_and_exp_sum(first + i * p.logits_stride, n, shift[i], sum[i]);
  }
  for (int64_t i = 0; i < rows; ++i) {
    T* x = first + i * p.logits_stride;
    const int64_t target = p.target[(begin + i) * p.target_stride];
    float& loss = p.row_loss[begin + i];
    if (target == p.ignore_index) {
      loss = 0.0f;
      sum[i] = 1.0f;
      continue;
    }
    loss = shift[i] - load1(x + target);
    if (p.grad) sum[i] = row_exp_sum<true>(exponentials(x, i, n), x, n, shift[i]);
  }
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int count = static_cast<int>(rows - i < kLanes ? rows - i : kLanes);
    float* loss = p.row_loss + begin + i;
    store_n(loss, load_n(loss, count) + log(load_n(sum + i, count)), count);  // ln 1 = 0 for what is ignored
  }
  if (!p.grad) return;
  const float scale = p.stats[0] ? static_cast<float>(p.grad_scale / static_cast<double>(p.stats[0])) : 0.0f;
  for (int64_t i = 0; i < rows; ++i) {
    T* x = first + i * p.logits_stride;
    const int64_t target = p.target[(begin + i) * p.target_stride];
    if (target == p.ignore_index) {
      row_zero(x, n);
      continue;
    }
    const float* e = exponentials(x, i, n);
    const float factor = scale / sum[i];
    const float hit = e[target] * factor - scale;  // before the row is written: in one rounding
    row_scale(x, e, n, factor);
    store1(x + target, hit);
  }
}

template <typename T>
void column_sums(const Params& p) {
  const T* grad = static_cast<const T*>(p.grad);
  parallel_chunks(p.num_codes, kStep, [&](int64_t begin, int64_t end) {
    if (end - begin == kStep) {
      VecF sum[kUnroll] = {};
      for (int64_t row = 0; row < p.num_rows; ++row)
        for (int k = 0; k < kUnroll; ++k) sum[k] += loadu(grad + row * p.logits_stride + begin + k * kLanes);
      for (int k = 0; k < kUnroll; ++k) {
        float* to = p.dbias + begin + k * kLanes;
        storeu(to, loadu(to) + sum[k]);
      }
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      float sum = 0.0f;
      for (int64_t row = 0; row < p.num_rows; ++row) sum += load1(grad + row * p.logits_stride + i);
      p.dbias[i] += sum;
    }
  });
}

// Rows of a block_pass.
DF_INLINE int64_t softmax_rows(int64_t num_codes) {
  const int64_t rows = kBlockCodes / (num_codes > 0 ? num_codes : 1);
  return rows < 1 ? 1 : rows > kMaxBlock ? kMaxBlock : rows;
}

template <typename T>
void run(const Params& p) {
  parallel_chunks(p.num_rows, softmax_rows(p.num_codes),
                  [&](int64_t begin, int64_t end) { block_pass<T>(p, begin, end); });
  if (p.grad && p.dbias) column_sums<T>(p);
}

}  // namespace

void check(const CheckParams& p) {
  int64_t count = 0;
  int64_t bad = -1;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t target = p.target[row * p.target_stride];
    if (target == p.ignore_index) continue;
    ++count;
    if (bad < 0 && (target < 0 || target >= p.num_codes)) bad = row;
  }
  p.stats[0] = count;
  p.stats[1] = bad;
}

void mean(const MeanParams& p) {
  double sum = 0.0;
  for (int64_t row = 0; row < p.num_rows; ++row) sum += static_cast<double>(p.row_loss[row]);
  *p.loss = static_cast<float>(sum / static_cast<double>(p.stats[0]));
}

// A task takes a block of rows through logits, loss and dlogits to dx while they are in the nearest caches; the sums
// over rows, dweight and dbias, are a second round over codes.
void whole(const WholeParams& p) {
  check({p.stats, p.target, p.target_stride, p.num_rows, p.num_codes, p.ignore_index, Device{}});
  if (p.stats[1] >= 0) return;
  const int64_t stride = logits_stride(p.num_codes);
  float* at = p.workspace;
  const auto take = [&at](int64_t n) {
    float* const taken = at;
    at += round_up(n, kLanes);
    return taken;
  };
  float* const row_loss = take(p.num_rows);
  const Panels head{take(p.width * round_up(p.num_codes, kLanes)), p.width, p.num_codes};
  const bool grad = p.wants_gradient();
  float* const logits = grad ? take(p.chunk_rows * stride) : nullptr;
  const Panels transposed{grad ? take(p.num_codes * round_up(p.width, kLanes)) : nullptr, p.num_codes, p.width};
  pack(head, {p.weight, 1, p.width});
  if (p.dx) pack(transposed, {p.weight, p.width, 1});
  if (p.dbias) zero(p.dbias, p.num_codes);
  if (p.dweight && p.num_rows == 0) zero(p.dweight, p.num_codes * p.width);
  for (int64_t first = 0; first < p.num_rows; first += p.chunk_rows) {
    const int64_t rows = p.num_rows - first < p.chunk_rows ? p.num_rows - first : p.chunk_rows;
    const float* const x = p.x + first * p.width;
    Params chunk{};
    chunk.row_loss = row_loss + first;
    chunk.logits = logits;
    chunk.grad = logits;
    chunk.dbias = p.dbias;
    chunk.target = p.target + first * p.target_stride;
    chunk.stats = p.stats;
    chunk.target_stride = p.target_stride;
    chunk.num_rows = rows;
    chunk.num_codes = p.num_codes;
    chunk.logits_stride = stride;
    chunk.ignore_index = p.ignore_index;
    chunk.grad_scale = p.grad_scale;
    const int64_t block = softmax_rows(p.num_codes), task = task_rows(rows, max_threads());
    parallel_for_dynamic((rows + task - 1) / task, [&](int64_t i) {
      const int64_t begin = i * task, end = begin + task < rows ? begin + task : rows;
      static thread_local ThreadScratch scratch;  // what is not kept stays in the caches
      Params part = chunk;
      float* const own = grad ? logits + begin * stride : scratch.floats(task * stride);
      part.logits = own;
      part.row_loss += begin;
      part.target += begin * part.target_stride;
      multiply(own, stride, p.bias, 0, {x + begin * p.width, p.width, 1}, head, end - begin, 0, head.count());
      for (int64_t row = 0; row < end - begin; row += block)
        block_pass<float>(part, row, row + block < end - begin ? row + block : end - begin);
      if (p.dx)
        multiply(p.dx + (first + begin) * p.width, p.width, nullptr, 0, {own, stride, 1}, transposed, end - begin, 0,
                 transposed.count());
    });
    if (p.dbias) column_sums<float>(chunk);
    if (p.dweight) {
      const Panels packed_x{at, rows, p.width};
      pack(packed_x, {x, p.width, 1});
      product(p.dweight, p.width, first ? p.dweight : nullptr, p.width, {logits, 1, stride}, packed_x, p.num_codes);
    }
  }
  mean({p.loss, row_loss, p.stats, p.num_rows, Device{}});
}

void loss_and_grad(const Params& p) {
  if (p.dtype == DType::kFloat32)
    run<float>(p);
  else
    run<bf16>(p);
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::linear_cross_entropy
