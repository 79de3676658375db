// SPDX-License-Identifier: MIT
// Two layouts. Codes dense: a vector holds neighbouring codes; kLanes generators make 4 kLanes codes. Rows dense: a
// vector holds the same code of neighbouring rows, and a generator's four words are four codes; several vectors go side
// by side. Per block of rows exponentials wait in scratch (V floats a row), so memory is read and written once; the KL
// takes its logits from the cache, where the noise has brought them. Floor of 1024 x 8192 with KL, forward and
// backward, on two cores with AVX-512: noise 5 ms, three exponentials 3 ms, six passes over memory 6 ms (in 16 bits 3
// ms).
#include "gumbel_softmax.h"

#include <cfloat>

#include "../core/parallel.h"
#include "../core/philox_simd.h"
#include "../core/simd.h"

namespace dalle_fast::gumbel_softmax {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int kBlock = kNoiseCodes;
constexpr float kLowest = -FLT_MAX;  // where maxima begin: -Inf - kLowest is -Inf, not NaN

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

// Of whole blocks.
DF_INLINE float largest_or_nan(const float* perturbed, int64_t n) {
  VecF best = splat(-__builtin_inff());
  VecI nan = {};
  for (int64_t c = 0; c < n; c += kLanes) {
    const VecF v = loadu(perturbed + c);
    best = vmax(v, best);
    nan |= v != v;
  }
  return any(nan) ? __builtin_nanf("") : hmax(best);
}

DF_INLINE int64_t padded(int64_t num_codes) { return (num_codes + kBlock - 1) / kBlock * kBlock; }

// kl and stats of `count` rows, of their largest logits and their sums of e^d and e^d d, d = logit - largest.
DF_INLINE void store_kl(const Params& p, int64_t row, VecF largest, VecF sum, VecF sum_d, int count) {
  const VecF log_sum = log(sum);
  store_n(p.kl + row, sum_d / sum - log_sum + log(splat(static_cast<float>(p.num_codes))), count);
  store_n(p.stats + row, largest, count);
  store_n(p.stats + p.outer * p.inner + row, log_sum, count);
}

// f(logits of kLanes codes) for one row with dense codes, the end filled with -Inf.
template <typename T, typename F>
DF_INLINE void for_each_vector(const T* x, int64_t num_codes, F f) {
  int64_t c = 0;
  for (; c + kLanes <= num_codes; c += kLanes) f(loadu(x + c));
  const int rest = static_cast<int>(num_codes - c);
  if (rest) f(load_tail(x + c, rest));
}

template <typename T>
void kl_of_row(const Params& p, int64_t row) {
  const T* const x = static_cast<const T*>(p.logits) + row * p.num_codes;
  VecF top = splat(kLowest), sum = {}, sum_d = {};
  for_each_vector(x, p.num_codes, [&](VecF v) { top = vmax(v, top); });
  const VecF largest = splat(hmax(top));
  for_each_vector(x, p.num_codes, [&](VecF v) {
    const VecF d = v - largest, e = exp(d);
    sum += e;
    sum_d += e * vmax(d, splat(kLeastLog));
  });
  store_kl(p, row, largest, splat(hsum(sum)), splat(hsum(sum_d)), 1);
}

template <typename T>
void soft_row(const Params& p, int64_t row) {
  static thread_local ThreadScratch scratch;
  const int64_t n = padded(p.num_codes);
  float* x = scratch.floats(n);
  perturb_row(x, static_cast<const T*>(p.logits) + row * p.num_codes, p.num_codes,
              p.row_offset + static_cast<uint32_t>(row), noise_key(p.seed, p.offset));
  const float shift = largest_or_nan(x, n);  // as torch.softmax: one NaN spoils the row
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
  if (p.kl) kl_of_row<T>(p, row);
}

// The first of the largest; the first NaN where there is one, as in torch.argmax.
DF_INLINE int64_t argmax(const float* perturbed, int64_t n) {
  const float largest = largest_or_nan(perturbed, n);
  for (int64_t c = 0; c < n; c += kLanes) {
    const VecF v = loadu(perturbed + c);
    const VecI found = largest == largest ? v == splat(largest) : v != v;
    if (!any(found)) continue;
    for (int i = 0; i < kLanes; ++i)
      if (found[i]) return c + i;
  }
  return 0;
}

template <typename T>
void hard_row(const Params& p, int64_t row) {
  static thread_local ThreadScratch scratch;
  const int64_t n = padded(p.num_codes);
  float* x = scratch.floats(n);
  perturb_row(x, static_cast<const T*>(p.logits) + row * p.num_codes, p.num_codes,
              p.row_offset + static_cast<uint32_t>(row), noise_key(p.seed, p.offset));
  p.index[row] = argmax(x, n);
  if (p.kl) kl_of_row<T>(p, row);
}

// ---- rows dense

constexpr int kGroup = 4;       // vectors of neighbouring rows: whole cache lines, and several of each page
constexpr int64_t kPiece = 32;  // codes; sums over codes are sums of their sums
constexpr int64_t kAhead = 8;   // codes prefetched: no hardware follows a stride of a page

// The rows of a task: at most kGroup vectors at inner index i0 of one outer index.
struct Rows {
  int64_t inner, num_codes, base;  // base: of code 0 and the first row
  int vecs, last;                  // the last vector has `last` rows

  Rows(int64_t inner, int64_t num_codes, int64_t o, int64_t i0) : inner(inner), num_codes(num_codes) {
    base = o * num_codes * inner + i0;
    const int64_t count = inner - i0 < kGroup * kLanes ? inner - i0 : kGroup * kLanes;
    vecs = static_cast<int>((count + kLanes - 1) / kLanes);
    last = static_cast<int>(count - (vecs - 1) * kLanes);
  }
  bool whole(int v) const { return v + 1 < vecs || last == kLanes; }
  template <typename T>
  VecF load(const T* from, int64_t c, int v) const {
    const T* at = from + c * inner + v * kLanes;
    return whole(v) ? loadu(at) : load_n(at, last);
  }
  template <typename T>
  void store(T* to, int64_t c, int v, VecF x) const {
    T* at = to + c * inner + v * kLanes;
    whole(v) ? storeu(at, x) : store_n(at, x, last);
  }
  template <typename T>
  void prefetch(const T* from, int64_t c) const {
    if (c >= num_codes) return;
    const char* at = reinterpret_cast<const char*>(from + c * inner);
    for (int64_t i = 0; i < static_cast<int64_t>(sizeof(T)) * vecs * kLanes; i += 64) __builtin_prefetch(at + i);
  }
  int64_t piece(int64_t c) const { return num_codes - c < kPiece ? num_codes - c : kPiece; }
};

// f(code, v, logits + g) for codes [first, first + count) and all rows; first is a multiple of 4.
template <typename T, typename F>
DF_INLINE void perturb_rows(const Rows& rows, const T* in, uint32_t first_row, const NoiseKey& key, int64_t first,
                            int64_t count, F f) {
  for (int64_t c = first; c < first + count; c += 4) {
    for (int64_t w = 0; w < 4; ++w) rows.prefetch(in, c + w + kAhead);
    for (int v = 0; v < rows.vecs; ++v) {
      VecF noise[4];
      gumbel_of_rows(noise, c, (VecU)lane_index() + (first_row + static_cast<uint32_t>(v * kLanes)), key);
      for (int w = 0; w < 4 && c + w < first + count; ++w) f(c + w, v, rows.load(in, c + w, v) + noise[w]);
    }
  }
}

// The KL of neighbouring rows, piece by piece.
struct KlOfRows {
  VecF largest[kGroup], sum[kGroup] = {}, sum_d[kGroup] = {};

  KlOfRows() {
    for (VecF& l : largest) l = splat(kLowest);
  }
  template <typename T>
  void add(const Rows& rows, const T* in, int64_t c) {
    const VecF least = splat(kLeastLog);
    for (int v = 0; v < rows.vecs; ++v) {
      VecF top = largest[v], piece = {}, piece_d = {};
      for (int64_t at = c; at < c + rows.piece(c); ++at) top = vmax(rows.load(in, at, v), top);
      for (int64_t at = c; at < c + rows.piece(c); ++at) {
        const VecF d = rows.load(in, at, v) - top, e = exp(d);
        piece += e;
        piece_d += e * vmax(d, least);
      }
      const VecF step = vmax(largest[v] - top, least), scale = exp(step);
      sum_d[v] = (sum_d[v] + sum[v] * step) * scale + piece_d;
      sum[v] = sum[v] * scale + piece;
      largest[v] = top;
    }
  }
  void store(const Params& p, const Rows& rows, int64_t first_row) const {
    for (int v = 0; v < rows.vecs; ++v)
      store_kl(p, first_row + v * kLanes, largest[v], sum[v], sum_d[v], rows.whole(v) ? kLanes : rows.last);
  }
};

template <typename T>
void soft_rows(const Params& p, int64_t o, int64_t i0) {
  static thread_local ThreadScratch scratch;
  const Rows rows(p.inner, p.num_codes, o, i0);
  const int64_t step = rows.vecs * kLanes, num_pieces = (p.num_codes + kPiece - 1) / kPiece;
  float* const x = scratch.floats((p.num_codes + num_pieces) * step);  // exponentials, each piece's against its shift
  float* const shift = x + p.num_codes * step;                         // the largest up to and with the piece
  const T* const in = static_cast<const T*>(p.logits) + rows.base;
  T* const y = static_cast<T*>(p.y) + rows.base;
  const NoiseKey key = noise_key(p.seed, p.offset);
  const uint32_t first_row = p.row_offset + static_cast<uint32_t>(o * p.inner + i0);
  const VecF factor = splat(p.inverse_tau);
  VecF best[kGroup], total[kGroup] = {};
  for (VecF& b : best) b = splat(kLowest);
  KlOfRows kl;
  for (int64_t c = 0; c < p.num_codes; c += kPiece) {
    VecF top[kGroup];
    for (int v = 0; v < kGroup; ++v) top[v] = best[v];
    perturb_rows(rows, in, first_row, key, c, rows.piece(c), [&](int64_t at, int v, VecF z) {
      top[v] = vmax(z, top[v]);
      storeu(x + at * step + v * kLanes, z);
    });
    for (int v = 0; v < rows.vecs; ++v) {
      VecF sum = {};
      for (int64_t at = c; at < c + rows.piece(c); ++at) {
        float* const e = x + at * step + v * kLanes;
        const VecF value = exp((loadu(e) - top[v]) * factor);
        storeu(e, value);
        sum += value;
      }
      total[v] = total[v] * exp((best[v] - top[v]) * factor) + sum;
      best[v] = top[v];
      storeu(shift + c / kPiece * step + v * kLanes, top[v]);
    }
    if (p.kl) kl.add(rows, in, c);
  }
  if (p.kl) kl.store(p, rows, o * p.inner + i0);
  for (int64_t c = 0; c < p.num_codes; c += kPiece) {
    VecF scale[kGroup];
    for (int v = 0; v < rows.vecs; ++v)
      scale[v] = exp((loadu(shift + c / kPiece * step + v * kLanes) - best[v]) * factor) / total[v];
    for (int64_t at = c; at < c + rows.piece(c); ++at)
      for (int v = 0; v < rows.vecs; ++v) rows.store(y, at, v, loadu(x + at * step + v * kLanes) * scale[v]);
  }
}

template <typename T>
void hard_rows(const Params& p, int64_t o, int64_t i0) {
  const Rows rows(p.inner, p.num_codes, o, i0);
  const T* const in = static_cast<const T*>(p.logits) + rows.base;
  const uint32_t first_row = p.row_offset + static_cast<uint32_t>(o * p.inner + i0);
  VecF best[kGroup] = {};
  VecI index[kGroup] = {};
  KlOfRows kl;
  const NoiseKey key = noise_key(p.seed, p.offset);
  for (int64_t c = 0; c < p.num_codes; c += kPiece) {
    perturb_rows(rows, in, first_row, key, c, rows.piece(c), [&](int64_t at, int v, VecF z) {
      const VecI first = splat_i(at == 0 ? -1 : 0);
      const VecI better = (first | (z > best[v]) | (z != z)) & ((best[v] == best[v]) | first);
      best[v] = better ? z : best[v];
      index[v] = better ? splat_i(static_cast<int32_t>(at)) : index[v];
    });
    if (p.kl) kl.add(rows, in, c);
  }
  if (p.kl) kl.store(p, rows, o * p.inner + i0);
  for (int64_t i = 0; i < (rows.vecs - 1) * kLanes + rows.last; ++i)
    p.index[o * p.inner + i0 + i] = index[i / kLanes][i % kLanes];
}

template <typename T>
void run(const Params& p, bool hard) {
  const bool threads = p.outer * p.inner * p.num_codes >= kSerialBelow / 8;  // some 100 instructions an element
  if (p.num_codes == 0) return;
  if (p.inner == 1) {
    parallel_for(p.outer, [&](int64_t row) { hard ? hard_row<T>(p, row) : soft_row<T>(p, row); }, threads);
    return;
  }
  const int64_t blocks = (p.inner + kGroup * kLanes - 1) / (kGroup * kLanes);
  parallel_for(
      p.outer * blocks,
      [&](int64_t i) {
        const int64_t o = i / blocks, i0 = i % blocks * kGroup * kLanes;
        hard ? hard_rows<T>(p, o, i0) : soft_rows<T>(p, o, i0);
      },
      threads);
}

// dlogits = y (dy - sum dy y) / tau + dkl q (ln q + ln V - kl); either term may be missing

// The second term.
struct KlGradient {
  VecF largest, log_sum, dkl, entropy;

  KlGradient() = default;
  KlGradient(VecF largest, VecF log_sum, VecF dkl, VecF kl, int64_t num_codes)
      : largest(largest), log_sum(log_sum), dkl(dkl), entropy(log(splat(static_cast<float>(num_codes))) - kl) {}
  VecF operator()(VecF logits) const {
    const VecF log_q = vmax(logits - largest - log_sum, splat(kLeastLog));
    return dkl * exp(log_q) * (log_q + entropy);
  }
};

template <typename T, bool kRelaxed, bool kKl>
void backward_row(const BackwardParams& p, int64_t row) {
  const int64_t n = p.num_codes, num_rows = p.outer;
  const T* const y = kRelaxed ? static_cast<const T*>(p.y) + row * n : nullptr;
  const T* const dy = kRelaxed ? static_cast<const T*>(p.dy) + row * n : nullptr;
  const T* const logits = kKl ? static_cast<const T*>(p.logits) + row * n : nullptr;
  T* const out = static_cast<T*>(p.dlogits) + row * n;
  int64_t c = 0;
  const int rest = static_cast<int>(n % kLanes);
  VecF mean = {};
  if (kRelaxed) {
    VecF sum = {};
    for (; c + kLanes <= n; c += kLanes) sum += loadu(y + c) * loadu(dy + c);
    if (rest) sum += load_n(y + c, rest) * load_n(dy + c, rest);
    mean = splat(hsum(sum));
  }
  KlGradient kl;
  if (kKl) kl = KlGradient(splat(p.stats[row]), splat(p.stats[num_rows + row]), splat(p.dkl[row]), splat(p.kl[row]), n);
  const auto gradient = [&](auto load) {
    VecF g = {};
    if (kRelaxed) g = load(y) * (load(dy) - mean) * splat(p.inverse_tau);
    return kKl ? g + kl(load(logits)) : g;
  };
  for (c = 0; c + kLanes <= n; c += kLanes) storeu(out + c, gradient([&](const T* from) { return loadu(from + c); }));
  if (rest) store_n(out + c, gradient([&](const T* from) { return load_n(from + c, rest); }), rest);
}

template <typename T, bool kRelaxed, bool kKl>
void backward_rows(const BackwardParams& p, int64_t o, int64_t i0) {
  const Rows rows(p.inner, p.num_codes, o, i0);
  const T* const y = kRelaxed ? static_cast<const T*>(p.y) + rows.base : nullptr;
  const T* const dy = kRelaxed ? static_cast<const T*>(p.dy) + rows.base : nullptr;
  const T* const logits = kKl ? static_cast<const T*>(p.logits) + rows.base : nullptr;
  T* const out = static_cast<T*>(p.dlogits) + rows.base;
  VecF mean[kGroup] = {};
  if (kRelaxed)
    for (int64_t c = 0; c < p.num_codes; c += kPiece) {
      VecF sum[kGroup] = {};
      for (int64_t at = c; at < c + rows.piece(c); ++at) {
        rows.prefetch(y, at + kAhead);
        rows.prefetch(dy, at + kAhead);
        for (int v = 0; v < rows.vecs; ++v) sum[v] += rows.load(y, at, v) * rows.load(dy, at, v);
      }
      for (int v = 0; v < kGroup; ++v) mean[v] += sum[v];
    }
  KlGradient kl[kGroup];
  if (kKl)
    for (int v = 0; v < rows.vecs; ++v) {
      const int64_t row = o * p.inner + i0 + v * kLanes, num_rows = p.outer * p.inner;
      const auto load = [&](const float* from) { return load_n(from + row, rows.whole(v) ? kLanes : rows.last); };
      kl[v] = KlGradient(load(p.stats), load(p.stats + num_rows), load(p.dkl), load(p.kl), p.num_codes);
    }
  for (int64_t c = 0; c < p.num_codes; ++c) {
    if (kRelaxed) {
      rows.prefetch(y, c + kAhead);
      rows.prefetch(dy, c + kAhead);
    }
    if (kKl) rows.prefetch(logits, c + kAhead);
    for (int v = 0; v < rows.vecs; ++v) {
      VecF g = {};
      if (kRelaxed) g = rows.load(y, c, v) * (rows.load(dy, c, v) - mean[v]) * splat(p.inverse_tau);
      if (kKl) g += kl[v](rows.load(logits, c, v));
      rows.store(out, c, v, g);
    }
  }
}

template <typename T, bool kRelaxed, bool kKl>
void run_backward(const BackwardParams& p) {
  const bool threads = p.outer * p.inner * p.num_codes >= kSerialBelow;
  if (p.inner == 1) {
    parallel_for(p.outer, [&](int64_t row) { backward_row<T, kRelaxed, kKl>(p, row); }, threads);
    return;
  }
  const int64_t step = kGroup * kLanes, blocks = (p.inner + step - 1) / step;
  parallel_for(
      p.outer * blocks, [&](int64_t i) { backward_rows<T, kRelaxed, kKl>(p, i / blocks, i % blocks * step); }, threads);
}

template <typename T>
void run_backward(const BackwardParams& p) {
  if (!p.dkl) return run_backward<T, true, false>(p);
  p.dy ? run_backward<T, true, true>(p) : run_backward<T, false, true>(p);
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
