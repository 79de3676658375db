// SPDX-License-Identifier: MIT
// float32: a word is an element.
#include "kernels.h"

namespace dalle_fast::conv2d {
namespace DF_CPU_NAMESPACE {

void forward(const ForwardParams& p) { run_forward<Float32>(p); }
void backward(const BackwardParams& p) { run_backward<Float32>(p); }

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::conv2d
