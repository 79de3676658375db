// SPDX-License-Identifier: MIT
// Two layouts. Codes dense: a vector holds neighbouring codes; kLanes generators make 4 kLanes codes. Rows dense: a
// vector holds the same code of neighbouring rows, and a generator's four words are four codes. Per block of rows the
// perturbed logits wait in scratch (V floats a row), so memory is read and written once.
#include "gumbel_softmax.h"

#include "../core/parallel.h"
#include "../core/philox_simd.h"
#include "../core/simd.h"

namespace dalle_fast::gumbel_softmax {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int kBlock = kNoiseCodes;

// perturbed[c] = logits[c] + g for one row with dense codes; whole blocks, the end filled with -Inf.
template <typename T>
DF_INLINE void perturb_row(float* perturbed, const T* x, int64_t num_codes, uint32_t row, const NoiseKey& key) {
  for (int64_t c = 0; c < num_codes; c += kBlock) {
    VecF noise[4];
    gumbel_of_codes(noise, c, row, key);
    for (int k = 0; k < 4; ++k) {
      const int64_t at = c + k * kLanes;
      const int64_t rest = num_codes - at;
      if (rest >= kLanes) {
        storeu(perturbed + at, noise[k] + loadu(x + at));
      } else {
        const int n = rest > 0 ? static_cast<int>(rest) : 0;
        const VecF sum = noise[k] + load_n(x + at, n);
        storeu(perturbed + at, lane_index() < splat_i(n) ? sum : splat(-__builtin_inff()));
      }
    }
  }
}

DF_INLINE int64_t padded(int64_t num_codes) { return (num_codes + kBlock - 1) / kBlock * kBlock; }

template <typename T>
void soft_row(const Params& p, int64_t row) {
  static thread_local ThreadScratch scratch;
  const int64_t n = padded(p.num_codes);
  float* x = scratch.floats(n);
  perturb_row(x, static_cast<const T*>(p.logits) + row * p.num_codes, p.num_codes,
              p.row_offset + static_cast<uint32_t>(row), noise_key(p.seed, p.offset));
  VecF best = splat(-__builtin_inff());
  VecI nan = {};
  for (int64_t c = 0; c < n; c += kLanes) {
    const VecF v = loadu(x + c);
    best = vmax(v, best);
    nan |= v != v;
  }
  float shift = hmax(best);
  for (int i = 0; i < kLanes; ++i)
    if (nan[i]) shift = __builtin_nanf("");  // as torch.softmax: one NaN spoils the row
  VecF sum[2] = {};
  for (int64_t c = 0; c < n; c += 2 * kLanes)
    for (int k = 0; k < 2; ++k) {
      const VecF e = exp((loadu(x + c + k * kLanes) - splat(shift)) * splat(p.inverse_tau));
      storeu(x + c + k * kLanes, e);
      sum[k] += e;
    }
  const VecF factor = splat(1.0f / hsum(sum[0] + sum[1]));
  T* y = static_cast<T*>(p.y) + row * p.num_codes;
  int64_t c = 0;
  for (; c + kLanes <= p.num_codes; c += kLanes) storeu(y + c, loadu(x + c) * factor);
  if (c < p.num_codes) store_n(y + c, loadu(x + c) * factor, static_cast<int>(p.num_codes - c));
}

template <typename T>
void hard_row(const Params& p, int64_t row) {
  static thread_local ThreadScratch scratch;
  const int64_t n = padded(p.num_codes);
  float* x = scratch.floats(n);
  perturb_row(x, static_cast<const T*>(p.logits) + row * p.num_codes, p.num_codes,
              p.row_offset + static_cast<uint32_t>(row), noise_key(p.seed, p.offset));
  float best = x[0];
  int64_t at = 0;
  for (int64_t c = 1; c < p.num_codes && best == best; ++c)  // the first NaN wins, as in torch.argmax
    if (x[c] > best || x[c] != x[c]) {
      best = x[c];
      at = c;
    }
  p.index[row] = at;
}

// Rows dense: kLanes rows at inner index i0 of one outer index; n of them exist.
template <typename T>
DF_INLINE VecF load_rows(const T* x, int n) {
  return n == kLanes ? loadu(x) : load_n(x, n);
}

template <typename T>
void soft_rows(const Params& p, int64_t o, int64_t i0) {
  static thread_local ThreadScratch scratch;
  const int n = static_cast<int>(p.inner - i0 < kLanes ? p.inner - i0 : kLanes);
  float* x = scratch.floats(p.num_codes * kLanes);
  const T* in = static_cast<const T*>(p.logits) + o * p.num_codes * p.inner + i0;
  T* y = static_cast<T*>(p.y) + o * p.num_codes * p.inner + i0;
  const NoiseKey key = noise_key(p.seed, p.offset);
  const VecU row = (VecU)lane_index() + (p.row_offset + static_cast<uint32_t>(o * p.inner + i0));
  VecF best = splat(-__builtin_inff());
  VecI nan = {};
  for (int64_t c = 0; c < p.num_codes; c += 4) {
    VecF noise[4];
    gumbel_of_rows(noise, c, row, key);
    for (int w = 0; w < 4 && c + w < p.num_codes; ++w) {
      const VecF v = load_rows(in + (c + w) * p.inner, n) + noise[w];
      best = vmax(v, best);
      nan |= v != v;
      storeu(x + (c + w) * kLanes, v);
    }
  }
  best = nan ? splat(__builtin_nanf("")) : best;
  VecF sum = {};
  for (int64_t c = 0; c < p.num_codes; ++c) {
    const VecF e = exp((loadu(x + c * kLanes) - best) * splat(p.inverse_tau));
    storeu(x + c * kLanes, e);
    sum += e;
  }
  const VecF factor = splat(1.0f) / sum;
  for (int64_t c = 0; c < p.num_codes; ++c) {
    const VecF v = loadu(x + c * kLanes) * factor;
    n == kLanes ? storeu(y + c * p.inner, v) : store_n(y + c * p.inner, v, n);
  }
}

template <typename T>
void hard_rows(const Params& p, int64_t o, int64_t i0) {
  const int n = static_cast<int>(p.inner - i0 < kLanes ? p.inner - i0 : kLanes);
  const T* in = static_cast<const T*>(p.logits) + o * p.num_codes * p.inner + i0;
  const NoiseKey key = noise_key(p.seed, p.offset);
  const VecU row = (VecU)lane_index() + (p.row_offset + static_cast<uint32_t>(o * p.inner + i0));
  VecF best = {};
  VecI at = {};
  for (int64_t c = 0; c < p.num_codes; c += 4) {
    VecF noise[4];
    gumbel_of_rows(noise, c, row, key);
    for (int w = 0; w < 4 && c + w < p.num_codes; ++w) {
      const VecF v = load_rows(in + (c + w) * p.inner, n) + noise[w];
      const VecI first = splat_i(c + w == 0 ? -1 : 0);
      const VecI better = (first | (v > best) | (v != v)) & ((best == best) | first);
      best = better ? v : best;
      at = better ? splat_i(static_cast<int32_t>(c + w)) : at;
    }
  }
  for (int i = 0; i < n; ++i) p.index[o * p.inner + i0 + i] = at[i];
}

template <typename T>
void run(const Params& p, bool hard) {
  const bool threads = p.outer * p.inner * p.num_codes >= kSerialBelow / 8;  // some 100 instructions an element
  if (p.num_codes == 0) return;
  if (p.inner == 1) {
    parallel_for(p.outer, [&](int64_t row) { hard ? hard_row<T>(p, row) : soft_row<T>(p, row); }, threads);
    return;
  }
  const int64_t blocks = (p.inner + kLanes - 1) / kLanes;
  parallel_for(
      p.outer * blocks,
      [&](int64_t i) {
        const int64_t o = i / blocks, i0 = i % blocks * kLanes;
        hard ? hard_rows<T>(p, o, i0) : soft_rows<T>(p, o, i0);
      },
      threads);
}

// dlogits = y * (dy - sum(dy * y)) / tau

template <typename T>
void backward_row(const BackwardParams& p, int64_t row) {
  const int64_t n = p.num_codes;
  const T* y = static_cast<const T*>(p.y) + row * n;
  const T* dy = static_cast<const T*>(p.dy) + row * n;
  T* out = static_cast<T*>(p.dlogits) + row * n;
  VecF sum = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) sum += loadu(y + c) * loadu(dy + c);
  const int rest = static_cast<int>(n - c);
  if (rest) sum += load_n(y + c, rest) * load_n(dy + c, rest);
  const VecF mean = splat(hsum(sum));
  for (c = 0; c + kLanes <= n; c += kLanes)
    storeu(out + c, loadu(y + c) * (loadu(dy + c) - mean) * splat(p.inverse_tau));
  if (rest) store_n(out + c, load_n(y + c, rest) * (load_n(dy + c, rest) - mean) * splat(p.inverse_tau), rest);
}

template <typename T>
void backward_rows(const BackwardParams& p, int64_t o, int64_t i0) {
  const int n = static_cast<int>(p.inner - i0 < kLanes ? p.inner - i0 : kLanes);
  const int64_t base = o * p.num_codes * p.inner + i0;
  const T* y = static_cast<const T*>(p.y) + base;
  const T* dy = static_cast<const T*>(p.dy) + base;
  T* out = static_cast<T*>(p.dlogits) + base;
  VecF sum = {};
  for (int64_t c = 0; c < p.num_codes; ++c) sum += load_rows(y + c * p.inner, n) * load_rows(dy + c * p.inner, n);
  for (int64_t c = 0; c < p.num_codes; ++c) {
    const VecF v = load_rows(y + c * p.inner, n) * (load_rows(dy + c * p.inner, n) - sum) * splat(p.inverse_tau);
    n == kLanes ? storeu(out + c * p.inner, v) : store_n(out + c * p.inner, v, n);
  }
}

template <typename T>
void run_backward(const BackwardParams& p) {
  const bool threads = p.outer * p.inner * p.num_codes >= kSerialBelow;
  if (p.inner == 1) {
    parallel_for(p.outer, [&](int64_t row) { backward_row<T>(p, row); }, threads);
    return;
  }
  const int64_t blocks = (p.inner + kLanes - 1) / kLanes;
  parallel_for(p.outer * blocks, [&](int64_t i) { backward_rows<T>(p, i / blocks, i % blocks * kLanes); }, threads);
}

}  // namespace

void forward(const Params& p) {
  switch (p.dtype) {
    case DType::kBFloat16: return run<bf16>(p, false);
    case DType::kFloat16: return run<fp16>(p, false);
    default: return run<float>(p, false);
  }
}

void argmax(const Params& p) {
  switch (p.dtype) {
    case DType::kBFloat16: return run<bf16>(p, true);
    case DType::kFloat16: return run<fp16>(p, true);
    default: return run<float>(p, true);
  }
}

void backward(const BackwardParams& p) {
  switch (p.dtype) {
    case DType::kBFloat16: return run_backward<bf16>(p);
    case DType::kFloat16: return run_backward<fp16>(p);
    default: return run_backward<float>(p);
  }
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::gumbel_softmax
