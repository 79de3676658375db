// SPDX-License-Identifier: MIT
// CPU twin of the template room. Compiled once per CPU level (see core/dispatch.h): everything but the launcher is
// in an anonymous namespace, and nothing here includes torch, Python or CUDA. One task per row.
#include "null.h"

#include "../core/parallel.h"
#include "../core/simd.h"

namespace dalle_fast::null {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;  // the vectors and threads of this CPU level

namespace {

template <typename T>
void copy_rows(const Params& p) {
  T* out = static_cast<T*>(p.out);
  const T* input = static_cast<const T*>(p.input);
  const auto copy_row = [&](int64_t i) {
    const T* from = input + i * p.row_stride;
    T* to = out + i * p.row_len;
    int64_t j = 0;
    for (; j + kLanes <= p.row_len; j += kLanes) storeu(to + j, loadu(from + j));
    const int rest = static_cast<int>(p.row_len - j);
    if (rest > 0) store_n(to + j, load_n(from + j, rest), rest);
  };
  parallel_for(p.num_rows, copy_row, p.num_rows * p.row_len >= kSerialBelow);
}

}  // namespace

void copy(const Params& p) {
  switch (p.dtype) {
    case DType::kFloat32: return copy_rows<float>(p);
    case DType::kBFloat16: return copy_rows<bf16>(p);
    case DType::kFloat16: return copy_rows<fp16>(p);
    default: return;  // the binding has refused every other dtype
  }
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::null
