// SPDX-License-Identifier: MIT
// The largest of perturbed logits, as torch.argmax takes it.
#pragma once

#include "../core/rows.cuh"

namespace dalle_fast::gumbel_softmax {
namespace {

struct Best {
  float value;
  int32_t code;  // -1: none yet
};
constexpr Best kNoBest{-INFINITY, -1};

// The larger; the first of equals; the first NaN before all, as in torch.argmax.
__device__ __forceinline__ Best better(Best a, Best b) {
  if (a.code < 0) return b;
  if (b.code < 0) return a;
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  const bool same = a_nan ? b_nan : a.value == b.value;
  if (same) return a.code < b.code ? a : b;
  return a_nan || (!b_nan && a.value > b.value) ? a : b;
}
// Before the first code, if there is one: -Inf everywhere gives it.
__device__ __forceinline__ Best before(int code, int count) { return {-INFINITY, code < count ? code : -1}; }
// The next code of a thread: they come in rising order.
__device__ __forceinline__ void take(Best& best, float value, int code) {
  const bool wins = !(value <= best.value) & (best.value == best.value);
  best.value = wins ? value : best.value;
  best.code = wins ? code : best.code;
}
__device__ __forceinline__ Best over_lanes(Best best, unsigned from = 1) {
  DF_UNROLL
  for (unsigned bits = 16; bits > 0; bits /= 2)
    if (bits >= from) {
      const float value = __shfl_xor_sync(0xffffffffu, best.value, bits);
      best = better(best, {value, __shfl_xor_sync(0xffffffffu, best.code, bits)});
    }
  return best;
}

}  // namespace
}  // namespace dalle_fast::gumbel_softmax
