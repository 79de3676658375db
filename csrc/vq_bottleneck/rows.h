// SPDX-License-Identifier: MIT
// What happens to a row of logits between the products, for cpu.cpp and cpu_bf16.cpp.
//
// A row goes in blocks of 4 kLanes codes, one call of kLanes Philox generators. relax computes everything in one pass
// (each block's exponentials against the largest value so far) and rescales block by block in a second; gradient leaves
// y and dl without its mean, which a second pass of the caller completes.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "../core/parallel.h"
#include "../core/philox_simd.h"
#include "../core/simd.h"
#include "vq_bottleneck.h"

namespace dalle_fast::vq_bottleneck {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kTaskCodes = 64;   // of a task that sums over rows
constexpr float kLowest = -FLT_MAX;  // where maxima begin: -Inf - kLowest is -Inf, not NaN

typedef VecF Codes[4];

// logits + bias of codes [c, c + kNoiseCodes); codes that do not exist get -Inf, and so no weight.
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

// f(vector of the block) for those of `columns`, the codes and the padding that belongs to the row.
template <bool kFull, typename F>
DF_INLINE void for_each_vector(int64_t c, int64_t columns, F f) {
  for (int k = 0; k < 4; ++k)
    if (kFull || c + k * kLanes < columns) f(k, c + k * kLanes);
}

template <typename F>
DF_INLINE void for_each_block(int64_t num_codes, F f) {
  int64_t c = 0;
  for (; c + kNoiseCodes <= num_codes; c += kNoiseCodes) f(c, std::true_type());
  if (c < num_codes) f(c, std::false_type());
}

DF_INLINE VecF largest_of(const Codes& v) { return vmax(vmax(v[0], v[1]), vmax(v[2], v[3])); }

// store(column, vector of y) over `columns`; logits are lost, and may be where y is stored.
template <typename Store>
DF_INLINE void relax_row(const ForwardParams& p, const NoiseKey& key, float log_codes, float* logits, float* shift,
                         int64_t row, int64_t columns, Store store) {
  const int64_t num_blocks = round_up(p.num_codes, kNoiseCodes) / kNoiseCodes;
  const uint32_t number = p.noise.first_row + static_cast<uint32_t>(row);
  const VecF factor = splat(p.noise.inverse_tau), least = splat(kLeastLog);

  float largest = kLowest, largest_logit = kLowest;
  VecF sum[2] = {}, sum_q[2] = {}, sum_qx[2] = {};  // of y; of q, and of q * (logit - largest_logit)
  for_each_block(p.num_codes, [&](int64_t c, auto full) {
    Codes x, z;
    load_logits<full>(x, logits, p.head_bias, c, p.num_codes);
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
      const VecF scale = exp(splat((largest - top) * p.noise.inverse_tau));
      for (int k = 0; k < 2; ++k) sum[k] *= scale;
      largest = top;
    }
    shift[c / kNoiseCodes] = largest;  // of the block's exponentials
    for (int k = 0; k < 4; ++k) {
      const VecF d = x[k] - splat(largest_logit);
      const VecF q = exp(d);
      sum_q[k % 2] += q;
      sum_qx[k % 2] += q * vmax(d, least);
      z[k] = exp((z[k] - splat(largest)) * factor);
      sum[k % 2] += z[k];
    }
    for_each_vector<full>(c, columns, [&](int k, int64_t at) { storeu(logits + at, z[k]); });
  });

  const float total_q = hsum(sum_q[0] + sum_q[1]), log_sum = log(splat(total_q))[0];
  const float inverse_sum = 1.0f / hsum(sum[0] + sum[1]);
  p.stats[row] = {largest, inverse_sum, largest_logit, log_sum};
  p.kl[row] = hsum(sum_qx[0] + sum_qx[1]) / total_q - log_sum + log_codes;

  for (int64_t i = 0; i < num_blocks; i += kLanes)
    storeu(shift + i, exp((loadu(shift + i) - splat(largest)) * factor) * splat(inverse_sum));
  for_each_block(p.num_codes, [&](int64_t c, auto full) {
    const VecF scale = splat(shift[c / kNoiseCodes]);
    for_each_vector<full>(c, columns, [&](int, int64_t at) { store(at, loadu(logits + at) * scale); });
  });
}

// logits become dlogits + mean * y and dy, whose padding is finite, becomes y; returns the mean.
DF_INLINE VecF gradient_row(const BackwardParams& p, const NoiseKey& key, float log_codes, float* logits, float* dy,
                            int64_t row, int64_t columns) {
  const uint32_t number = p.noise.first_row + static_cast<uint32_t>(row);
  const RowStats stats = p.stats[row];
  const VecF factor = splat(p.noise.inverse_tau), least = splat(kLeastLog), dkl = splat(p.dkl[row]);
  const VecF entropy = splat(log_codes - p.kl[row]);

  VecF sum[2] = {};  // of y * dy
  for_each_block(p.num_codes, [&](int64_t c, auto full) {
    Codes x, z;
    load_logits<full>(x, logits, p.head_bias, c, p.num_codes);
    gumbel_of_codes(z, c, number, key);
    for_each_vector<full>(c, columns, [&](int k, int64_t at) {
      const VecF y = exp((x[k] + z[k] - splat(stats.largest)) * factor) * splat(stats.inverse_sum);
      const VecF log_q = vmax(x[k] - splat(stats.largest_logit) - splat(stats.log_sum), least);
      const VecF product = y * loadu(dy + at);
      sum[k % 2] += product;
      storeu(dy + at, y);
      storeu(logits + at, product * factor + dkl * exp(log_q) * (log_q + entropy));
    });
  });
  return splat(hsum(sum[0] + sum[1]) * p.noise.inverse_tau);
}

// Floats of the `shift` of a row.
DF_INLINE int64_t num_shifts(int64_t num_codes) {
  return round_up(round_up(num_codes, kNoiseCodes) / kNoiseCodes, kLanes);
}

}  // namespace
}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::vq_bottleneck
