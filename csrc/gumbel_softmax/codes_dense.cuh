// SPDX-License-Identifier: MIT
// Codes dense: a warp or a block owns a row. Its perturbed logits stay in registers up to 16384 codes; longer rows draw
// the noise again. With kKl the KL is taken of the logits before the noise is added.
#pragma once

#include "../core/gumbel.cuh"
#include "best.cuh"
#include "kl.cuh"

namespace dalle_fast::gumbel_softmax {
namespace {

// Adds the noise of codes [at, at + kPiece).
template <typename T>
__device__ __forceinline__ void perturb(float* v, const NoiseSource& noise, int at, uint32_t row) {
  DF_UNROLL
  for (int i = 0; i < kPiece<T>; i += 4) {
    const Philox4 words = noise.words(static_cast<uint32_t>(at + i) / 4, row);
    DF_UNROLL
    for (int k = 0; k < 4; ++k) v[i + k] = add_gumbel(v[i + k], words.word[k]);
  }
}

// Over the threads of a row: kl and stats.
__device__ __forceinline__ void store_kl(const Params& p, int64_t row, KlSums sums, KlSums* part) {
  sums = over_row(sums, part, kNoKl);
  if (threadIdx.x == 0) sums.store(p, row);
}

// `factor` = log2(e) / tau
template <typename T, Rows kRows, bool kKl>
__global__ void __launch_bounds__(kMaxRowThreads, kRows == Rows::kElements ? 1 : 2)
    soft_codes(const Params p, const NoiseSource noise, const float factor) {
  DF_SHARED(SoftmaxState, part, kMaxRowThreads / 32);
  DF_SHARED(KlSums, kl_part, kKl ? kMaxRowThreads / 32 : 1);
  constexpr int kN = kPiece<T>;
  const int count = static_cast<int>(p.num_codes), step = kN * blockDim.x, first = kN * threadIdx.x;
  const auto there = [&](int at) { return kRows == Rows::kFull || at < count; };
  const int64_t row = row_of_thread();
  if (row >= p.outer) return;
  const T* x = static_cast<const T*>(p.logits) + row * count;
  Piece raw[kHeld / kN];
  DF_UNROLL
  for (int j = 0, at = first; j < kHeld / kN; ++j, at += step)
    if (there(at)) raw[j] = load_piece<kRows>(x, at, count);
  float v[kHeld / kN][kN], largest = -INFINITY;
  KlSums kl = kNoKl;
  DF_UNROLL
  for (int j = 0, at = first; j < kHeld / kN; ++j, at += step) {
    if (!there(at)) break;
    unpack_codes<kRows, T>(v[j], raw[j], at, count);
    if (kKl) kl.add(v[j]);
    perturb<T>(v[j], noise, at, p.row_offset + static_cast<uint32_t>(row));
    DF_UNROLL
    for (int i = 0; i < kN; ++i) largest = fmaxf(largest, v[j][i]);
  }
  SoftmaxState mine{softmax_shift(largest * factor), 0.0f};
  DF_UNROLL
  for (int j = 0, at = first; j < kHeld / kN; ++j, at += step) {
    if (!there(at)) break;
    DF_UNROLL
    for (int i = 0; i < kN; ++i) {
      v[j][i] = fast_exp2(fmaf(v[j][i], factor, -mine.shift));
      mine.sum += v[j][i];
    }
  }
  const SoftmaxState all = over_row(mine, &part[0], kNoSoftmax);
  if (kKl) store_kl(p, row, kl, &kl_part[0]);
  const float scale = fast_exp2(mine.shift - all.shift) / all.sum;
  T* y = static_cast<T*>(p.y) + row * count;
  DF_UNROLL
  for (int j = 0, at = first; j < kHeld / kN; ++j, at += step) {
    if (!there(at)) break;
    DF_UNROLL
    for (int i = 0; i < kN; ++i) v[j][i] *= scale;
    store_piece<kRows>(y, at, count, v[j]);
  }
}

// f(code of the first element, elements) for the pieces of this thread, perturbed. Before that they go to `kl`, or
// null.
template <Rows kRows, typename T, typename F>
__device__ __forceinline__ void for_each_piece(const Params& p, const NoiseSource& noise, int64_t row, KlSums* kl,
                                               F f) {
  constexpr int kN = kPiece<T>;
  const int count = static_cast<int>(p.num_codes), step = kN * blockDim.x;
  const T* x = static_cast<const T*>(p.logits) + row * count;
  for (int at = kN * threadIdx.x; at < count; at += step) {
    float v[kN];
    unpack_codes<kRows, T>(v, load_piece<kRows>(x, at, count), at, count);
    if (kl) kl->add(v);
    perturb<T>(v, noise, at, p.row_offset + static_cast<uint32_t>(row));
    f(at, v);
  }
}

template <typename T, Rows kRows, bool kKl>
__global__ void __launch_bounds__(kMaxRowThreads, 2)
    soft_long_codes(const Params p, const NoiseSource noise, const float factor) {
  DF_SHARED(SoftmaxState, part, kMaxRowThreads / 32);
  DF_SHARED(KlSums, kl_part, kKl ? kMaxRowThreads / 32 : 1);
  const int64_t row = row_of_thread();
  SoftmaxState state = kNoSoftmax;
  KlSums kl = kNoKl;
  for_each_piece<kRows, T>(p, noise, row, kKl ? &kl : nullptr,
                           [&](int, const float (&v)[kPiece<T>]) { softmax_add<1, kPiece<T>>(&state, &v, factor); });
  state = over_row(state, &part[0], kNoSoftmax);
  if (kKl) store_kl(p, row, kl, &kl_part[0]);
  const float inverse = 1.0f / state.sum;
  T* y = static_cast<T*>(p.y) + row * p.num_codes;
  for_each_piece<kRows, T>(p, noise, row, nullptr, [&](int at, float (&v)[kPiece<T>]) {
    DF_UNROLL
    for (int i = 0; i < kPiece<T>; ++i) v[i] = fast_exp2(fmaf(v[i], factor, -state.shift)) * inverse;
    store_piece<kRows>(y, at, static_cast<int>(p.num_codes), v);
  });
}

template <typename T, Rows kRows, bool kKl>
__global__ void __launch_bounds__(kMaxRowThreads, 2) hard_codes(const Params p, const NoiseSource noise) {
  DF_SHARED(Best, part, kMaxRowThreads / 32);
  DF_SHARED(KlSums, kl_part, kKl ? kMaxRowThreads / 32 : 1);
  const int64_t row = row_of_thread();
  if (row >= p.outer) return;
  const int count = static_cast<int>(p.num_codes);
  Best best = before(kPiece<T> * threadIdx.x, count);
  KlSums kl = kNoKl;
  for_each_piece<kRows, T>(p, noise, row, kKl ? &kl : nullptr, [&](int at, const float* v) {
    DF_UNROLL
    for (int i = 0; i < kPiece<T>; ++i)
      if (kRows != Rows::kElements || at + i < count) take(best, v[i], at + i);
  });
  best = over_row(best, &part[0], kNoBest);
  if (threadIdx.x == 0) p.index[row] = best.code;
  if (kKl) store_kl(p, row, kl, &kl_part[0]);
}

// The gradient of the KL alone: dlogits = dkl q (ln q + ln V - kl)
template <typename T, Rows kRows>
__global__ void __launch_bounds__(kMaxRowThreads) kl_backward_codes(const BackwardParams p) {
  constexpr int kN = kPiece<T>;
  const int count = static_cast<int>(p.num_codes), step = kN * blockDim.x;
  const int64_t row = row_of_thread();
  if (row >= p.outer) return;
  const KlGradient kl(p, row);
  const T* logits = static_cast<const T*>(p.logits) + row * count;
  for (int at = kN * threadIdx.x; at < count; at += step) {
    float v[kN];
    unpack_piece<T>(v, load_piece<kRows>(logits, at, count));
    DF_UNROLL
    for (int i = 0; i < kN; ++i) v[i] = kl(v[i]);
    store_piece<kRows>(static_cast<T*>(p.dlogits) + row * count, at, count, v);
  }
}

// dlogits = y (dy - sum dy y) / tau, and with kKl that of the KL
template <typename T, Rows kRows, bool kKl>
__global__ void __launch_bounds__(kMaxRowThreads, 1) backward_codes(const BackwardParams p) {
  DF_SHARED(float, part, kMaxRowThreads / 32);
  constexpr int kN = kPiece<T>;
  const int count = static_cast<int>(p.num_codes), step = kN * blockDim.x, first = kN * threadIdx.x;
  const auto there = [&](int at) { return kRows == Rows::kFull || at < count; };
  const int64_t row = row_of_thread();
  if (row >= p.outer) return;
  const T* y = static_cast<const T*>(p.y) + row * count;
  const T* dy = static_cast<const T*>(p.dy) + row * count;
  const T* logits = kKl ? static_cast<const T*>(p.logits) + row * count : nullptr;
  T* out = static_cast<T*>(p.dlogits) + row * count;
  float sum = 0.0f;
  KlGradient kl;
  if constexpr (kKl) kl = KlGradient(p, row);
  const auto add = [&](const Piece& a, const Piece& b) {
    float u[kN], v[kN];
    unpack_piece<T>(u, a);
    unpack_piece<T>(v, b);
    DF_UNROLL
    for (int i = 0; i < kN; ++i) sum = fmaf(u[i], v[i], sum);
  };
  const auto write = [&](int at, const Piece& a, const Piece& b) {
    float u[kN], v[kN];
    unpack_piece<T>(u, a);
    unpack_piece<T>(v, b);
    DF_UNROLL
    for (int i = 0; i < kN; ++i) v[i] = u[i] * (v[i] - sum) * p.inverse_tau;
    if constexpr (kKl) {
      unpack_piece<T>(u, load_piece<kRows>(logits, at, count));
      DF_UNROLL
      for (int i = 0; i < kN; ++i) v[i] += kl(u[i]);
    }
    store_piece<kRows>(out, at, count, v);
  };
  Piece raw_y[kHeld / kN], raw_dy[kHeld / kN];
  DF_UNROLL
  for (int j = 0, at = first; j < kHeld / kN; ++j, at += step) {
    if (!there(at)) break;
    raw_y[j] = load_piece<kRows>(y, at, count);
    raw_dy[j] = load_piece<kRows>(dy, at, count);
  }
  DF_UNROLL
  for (int j = 0, at = first; j < kHeld / kN; ++j, at += step) {
    if (!there(at)) break;
    add(raw_y[j], raw_dy[j]);
  }
  const int rest = kRows == Rows::kFull ? count : first + kHeld / kN * step;  // does not fit: it is read again
  for (int at = rest; at < count; at += step) add(load_piece<kRows>(y, at, count), load_piece<kRows>(dy, at, count));
  sum = over_row(sum, &part[0], 0.0f);
  DF_UNROLL
  for (int j = 0, at = first; j < kHeld / kN; ++j, at += step) {
    if (!there(at)) break;
    write(at, raw_y[j], raw_dy[j]);
  }
  for (int at = rest; at < count; at += step)
    write(at, load_piece<kRows>(y, at, count), load_piece<kRows>(dy, at, count));
}

}  // namespace
}  // namespace dalle_fast::gumbel_softmax
