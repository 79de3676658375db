// SPDX-License-Identifier: MIT
// bfloat16: a word is two elements, of two channels at one position or of one channel at two, and sums are float32.
#include "../core/bf16_tiles.h"
#include "kernels.h"

namespace dalle_fast::conv2d {
namespace DF_CPU_NAMESPACE {

namespace {

struct BFloat16 {
  using T = bf16;
  static constexpr int kPerWord = 2;

  DF_INLINE VecF dot(VecF sum, VecU a, VecU b) { return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
  DF_INLINE VecU join(VecF a, VecF b) {  // which are bfloat16 already
    return bit_cast<VecU>(a) >> 16 | (bit_cast<VecU>(b) & 0xffff0000u);
  }
  DF_INLINE uint32_t join(float a, float b) {
    bf16 pair[2];
    store1(pair, a);
    store1(pair + 1, b);
    return bit_cast<uint32_t>(pair);
  }
  DF_INLINE void store(bf16* to, VecF v) {
    const VecH h = round_bf16(v);
    __builtin_memcpy(to, &h, sizeof h);
  }
};

}  // namespace

void forward(const ForwardParams& p) { run_forward<BFloat16>(p); }
void backward(const BackwardParams& p) { run_backward<BFloat16>(p); }

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::conv2d
