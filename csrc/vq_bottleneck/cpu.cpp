// SPDX-License-Identifier: MIT
// A row at a time, in blocks of 4 kLanes codes: one call of kLanes Philox generators. relax computes everything in one
// pass (each block's exponentials against the largest value so far) and rescales block by block in a second; gradient
// leaves y and dl without its mean in a first pass and completes dl in a second. Rows stay in the first two caches
// meanwhile. Parallel over rows.
#include "vq_bottleneck.h"

#include <cmath>
#include <type_traits>

#include "../core/parallel.h"
#include "../core/philox_simd.h"
#include "../core/simd.h"

namespace dalle_fast::vq_bottleneck {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int64_t kBlock = kNoiseCodes;
constexpr float kLowest = -3.4028235e38f;  // where maxima begin: -Inf - kLowest is -Inf, not NaN

constexpr float kLeastLog = -88.0f;      // of a probability: exp gives 0, and 0 * kLeastLog is 0

typedef VecF Codes[4];

// logits + bias of codes [c, c + kBlock); codes that do not exist get -Inf, and so no weight.
template <bool kFull>
DF_INLINE void load_logits(Codes& l, const float* logits, const float* bias, int64_t c, int64_t num_codes) {
  for (int k = 0; k < 4; ++k) {
    const int64_t at = c + k * kLanes, rest = num_codes - at;
    if (kFull || rest >= kLanes) {
      l[k] = bias ? loadu(logits + at) + loadu(bias + at) : loadu(logits + at);
    } else {
      const int n = rest > 0 ? static_cast<int>(rest) : 0;
      const VecF sum = load_n(logits + at, n) + (bias ? load_n(bias + at, n) : VecF{});
      l[k] = lane_index() < splat_i(n) ? sum : splat(-__builtin_inff());
    }
  }
}

// f(vector of the block) for those that begin inside the row; padding belongs to the row.
template <bool kFull, typename F>
DF_INLINE void for_each_vector(int64_t c, int64_t num_codes, F f) {
  for (int k = 0; k < 4; ++k)
    if (kFull || c + k * kLanes < num_codes) f(k, c + k * kLanes);
}

template <typename F>
DF_INLINE void for_each_block(int64_t num_codes, F f) {
  int64_t c = 0;
  for (; c + kBlock <= num_codes; c += kBlock) f(c, std::true_type());
  if (c < num_codes) f(c, std::false_type());
}

DF_INLINE VecF largest_of(const Codes& v) { return vmax(vmax(v[0], v[1]), vmax(v[2], v[3])); }

template <typename T>
void relax_row(const Params& p, int64_t row) {
  static thread_local ThreadScratch scratch;
  const FlushSubnormals flush;
  const int64_t num_blocks = round_up(p.num_codes, kBlock) / kBlock;
  float* const shift = scratch.floats(round_up(num_blocks, kLanes) + p.stride);  // of each block's exponentials
  T* const y = static_cast<T*>(p.y) + row * p.stride;
  float* e = shift + round_up(num_blocks, kLanes);
  if constexpr (std::is_same_v<T, float>) e = y;
  const float* const logits = p.logits + row * p.stride;
  const NoiseKey key = noise_key(p.seed, p.offset);
  const uint32_t number = p.first_row + static_cast<uint32_t>(row);
  const VecF factor = splat(p.inverse_tau), least = splat(kLeastLog);

  float largest = kLowest, largest_logit = kLowest;
  VecF sum[2] = {}, sum_q[2] = {}, sum_qx[2] = {};  // of y; of q, and of q * (logit - largest_logit)
  for_each_block(p.num_codes, [&](int64_t c, auto full) {
    Codes x, z;
    load_logits<full>(x, logits, p.bias, c, p.num_codes);
    gumbel_of_codes(z, c, number, key);
    for (int k = 0; k < 4; ++k) z[k] += x[k];

    const VecF top_x = largest_of(x), top_z = largest_of(z);
    if (any_greater(top_x, splat(largest_logit))) {
      const float top = hmax(top_x);
      const VecF step = splat(largest_logit - top > kLeastLog ? largest_logit - top : kLeastLog);
      const VecF scale = exp(step);
      for (int k = 0; k < 2; ++k) {
        sum_qx[k] = (sum_qx[k] + sum_q[k] * step) * scale;
        sum_q[k] *= scale;
      }
      largest_logit = top;
    }
    if (any_greater(top_z, splat(largest))) {
      const float top = hmax(top_z);
      const VecF scale = exp(splat((largest - top) * p.inverse_tau));
      for (int k = 0; k < 2; ++k) sum[k] *= scale;
      largest = top;
    }
    shift[c / kBlock] = largest;
    for (int k = 0; k < 4; ++k) {
      const VecF d = x[k] - splat(largest_logit);
      const VecF q = exp(d);
      sum_q[k % 2] += q;
      sum_qx[k % 2] += q * vmax(d, least);  // 0 * -Inf would not be 0
      z[k] = exp((z[k] - splat(largest)) * factor);
      sum[k % 2] += z[k];
    }
    for_each_vector<full>(c, p.num_codes, [&](int k, int64_t at) { storeu(e + at, z[k]); });
  });

  const float total_q = hsum(sum_q[0] + sum_q[1]), log_sum = log(splat(total_q))[0];
  const float inverse_sum = 1.0f / hsum(sum[0] + sum[1]);
  p.stats[row] = {largest, inverse_sum, largest_logit, log_sum};
  p.kl[row] = hsum(sum_qx[0] + sum_qx[1]) / total_q - log_sum + std::log(static_cast<float>(p.num_codes));

  for (int64_t i = 0; i < num_blocks; i += kLanes)
    storeu(shift + i, exp((loadu(shift + i) - splat(largest)) * factor) * splat(inverse_sum));
  for_each_block(p.num_codes, [&](int64_t c, auto full) {
    const VecF scale = splat(shift[c / kBlock]);
    for_each_vector<full>(c, p.num_codes, [&](int, int64_t at) { storeu(y + at, loadu(e + at) * scale); });
  });
}

template <typename T>
void gradient_row(const GradientParams& p, int64_t row) {
  static thread_local ThreadScratch scratch;
  const FlushSubnormals flush;
  T* const y = static_cast<T*>(p.y) + row * p.stride;
  T* const dlogits = static_cast<T*>(p.dlogits) + row * p.stride;
  float *held_y, *held_dl;
  if constexpr (std::is_same_v<T, float>) {
    held_y = y;
    held_dl = dlogits;
  } else {
    held_y = scratch.floats(2 * p.stride);
    held_dl = held_y + p.stride;
  }
  const float* const logits = p.logits + row * p.stride;
  const float* const dy = p.dy + row * p.stride;
  const NoiseKey key = noise_key(p.seed, p.offset);
  const uint32_t number = p.first_row + static_cast<uint32_t>(row);
  const RowStats stats = p.stats[row];
  const VecF factor = splat(p.inverse_tau), least = splat(kLeastLog), dkl = splat(p.dkl[row]);
  const VecF entropy = splat(std::log(static_cast<float>(p.num_codes)) - p.kl[row]);

  VecF sum[2] = {};  // of y * dy
  for_each_block(p.num_codes, [&](int64_t c, auto full) {
    Codes x, z;
    load_logits<full>(x, logits, p.bias, c, p.num_codes);
    gumbel_of_codes(z, c, number, key);
    for_each_vector<full>(c, p.num_codes, [&](int k, int64_t at) {
      const VecF relaxed = exp((x[k] + z[k] - splat(stats.largest)) * factor) * splat(stats.inverse_sum);
      const VecF log_q = vmax(x[k] - splat(stats.largest_logit) - splat(stats.log_sum), least);
      const int64_t rest = p.num_codes - at;
      const VecF upstream = full || rest >= kLanes ? loadu(dy + at) : load_n(dy + at, static_cast<int>(rest));
      const VecF product = relaxed * upstream;
      sum[k % 2] += product;
      storeu(held_y + at, relaxed);
      storeu(held_dl + at, product * factor + dkl * exp(log_q) * (log_q + entropy));
    });
  });

  const VecF mean = splat(hsum(sum[0] + sum[1]) * p.inverse_tau);
  for_each_block(p.num_codes, [&](int64_t c, auto full) {
    for_each_vector<full>(c, p.num_codes, [&](int, int64_t at) {
      const VecF relaxed = loadu(held_y + at);
      storeu(dlogits + at, loadu(held_dl + at) - mean * relaxed);
      if constexpr (!std::is_same_v<T, float>) storeu(y + at, relaxed);
    });
  });
}

template <typename P, typename F>
void for_each_row(const P& p, F f) {
  if (p.num_codes == 0) return;
  const bool threads = p.num_rows * p.num_codes >= kSerialBelow / 8;  // some 100 instructions an element
  parallel_for(p.num_rows, f, threads);
}

}  // namespace

void relax(const Params& p) {
  if (p.dtype == DType::kFloat32)
    for_each_row(p, [&](int64_t row) { relax_row<float>(p, row); });
  else
    for_each_row(p, [&](int64_t row) { relax_row<bf16>(p, row); });
}

void gradient(const GradientParams& p) {
  if (p.dtype == DType::kFloat32)
    for_each_row(p, [&](int64_t row) { gradient_row<float>(p, row); });
  else
    for_each_row(p, [&](int64_t row) { gradient_row<bf16>(p, row); });
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::vq_bottleneck
