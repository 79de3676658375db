// SPDX-License-Identifier: MIT
// float32: a word is an element.
#include "kernels.h"

namespace dalle_fast::conv2d {
namespace DF_CPU_NAMESPACE {

namespace {

struct Float32 {
  using T = float;
  static constexpr int kPerWord = 1;

  DF_INLINE VecF dot(VecF sum, VecU a, VecU b) { return sum + bit_cast<VecF>(a) * bit_cast<VecF>(b); }
  DF_INLINE VecU join(VecF a, VecF) { return bit_cast<VecU>(a); }
  DF_INLINE uint32_t join(float a, float) { return bit_cast<uint32_t>(a); }
  DF_INLINE void store(float* to, VecF v) { storeu(to, v); }
};

}  // namespace

void forward(const ForwardParams& p) { run_forward<Float32>(p); }
void backward(const BackwardParams& p) { run_backward<Float32>(p); }

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::conv2d
