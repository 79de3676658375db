// SPDX-License-Identifier: MIT
// kLanes generators make the words of 4 kLanes neighbouring columns; a task is a part of a row. Floor: one read and one
// write of the tensor; Philox is about 2 vector instructions an element at AVX-512.
#include "dropout.h"

#include "../core/parallel.h"
#include "../core/philox_simd.h"
#include "../core/simd.h"

namespace dalle_fast::dropout {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int kBlock = kNoiseCodes;
constexpr int64_t kTask = 4096;  // columns, whole blocks

template <typename T>
void drop_rows(const Params& p) {
  const NoiseKey key = noise_key(p.seed, p.offset);
  const VecU last_dropped = splat_u(p.last_dropped);
  const VecF scale = splat(p.scale);
  const auto drop = [&](VecF x, VecU word) { return word > last_dropped ? x * scale : VecF{}; };
  const int64_t tasks = (p.row_len + kTask - 1) / kTask;  // of a row
  const auto run = [&](int64_t i) {
    const int64_t row = i / tasks, begin = i % tasks * kTask;
    const int64_t end = begin + kTask < p.row_len ? begin + kTask : p.row_len;
    const T* from = static_cast<const T*>(p.x) + row * p.row_stride;
    T* to = static_cast<T*>(p.out) + row * p.row_len;
    for (int64_t c = begin; c < end; c += kBlock) {
      VecU word[4];
      words_of_codes(word, c, p.row_offset + static_cast<uint32_t>(row), key);
      for (int k = 0; k < 4; ++k) {
        const int64_t at = c + k * kLanes;
        if (at + kLanes <= end)
          storeu(to + at, drop(loadu(from + at), word[k]));
        else if (const int rest = static_cast<int>(end - at); rest > 0)
          store_n(to + at, drop(load_n(from + at, rest), word[k]), rest);
      }
    }
  };
  parallel_for(p.num_rows * tasks, run, p.num_rows * p.row_len >= kSerialBelow);
}

}  // namespace

void drop(const Params& p) {
  switch (p.dtype) {
    case DType::kFloat32: return drop_rows<float>(p);
    case DType::kBFloat16: return drop_rows<bf16>(p);
    case DType::kFloat16: return drop_rows<fp16>(p);
    default: return;  // the binding has refused every other dtype
  }
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::dropout
