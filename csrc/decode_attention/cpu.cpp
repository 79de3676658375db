// SPDX-License-Identifier: MIT
// Text as products of float32 matrices: keys are read where they lie, values too if their rows are whole vectors.
// Others, and 16-bit ones, become rows of float32 first, once a task.
#include "../core/gemm.h"
#include "samples.h"

namespace dalle_fast::decode_attention {
namespace DF_CPU_NAMESPACE {

namespace {

struct Rows {
  const float* data;
  int64_t stride, depth;
};

template <typename T>
struct Products {
  static constexpr int64_t kColumns = kLanes, kKeys = 2;

  static int64_t floats(const Text<T>& text, int64_t columns, int64_t padded) {
    return columns * padded + (in_place(text.dim) ? 0 : text.keys * padded);
  }
  static bool in_place(int64_t dim) { return std::is_same<T, float>::value && dim % kLanes == 0; }

  // [keys, padded]
  static Rows rows(const T* from, int64_t stride, const Text<T>& text, int64_t padded, float* to) {
    if constexpr (std::is_same<T, float>::value)
      if (in_place(text.dim)) return {from, stride, text.dim};
    for (int64_t k = 0; k < text.keys; ++k)
      for (int64_t d = 0; d < padded; d += kPair)
        store_pair(to + k * padded + d, d < text.dim ? load_pair(from + k * stride, d, text.dim) : Pair{});
    return {to, padded, padded};
  }

  // s[key][query]
  template <typename Fetch>
  static void scores(const Text<T>& text, float* s, int64_t columns, const float* q, int64_t padded, float* workspace,
                     Fetch&& fetch) {
    float* const qt = workspace;  // [padded, columns]
    for (int64_t d = 0; d < padded; d += kLanes)
      for (int64_t c = 0; c < columns; c += kLanes)
        transpose_block(qt + d * columns + c, columns, q + c * padded + d, padded);
    const Rows k = rows(text.k, text.k_stride, text, padded, workspace + columns * padded);
    for (int64_t first = 0; first < text.keys; first += kAhead) {
      fetch(first / kAhead);
      const int64_t n = text.keys - first < kAhead ? text.keys - first : kAhead;
      gemm<false, false>(s + first * columns, columns, k.data + first * k.stride, k.stride, qt, kLanes, columns, n,
                         columns, k.depth);
    }
  }

  static void store(float* s, int64_t columns, int64_t k, int64_t c, VecF e, VecF next) {
    storeu(s + k * columns + c, e);
    storeu(s + (k + 1) * columns + c, next);
  }

  // o[query] += the values weighted with s
  static void accumulate(const Text<T>& text, float* o, int64_t padded, const float* s, int64_t columns,
                         float* workspace) {
    const Rows v = rows(text.v, text.v_stride, text, padded, workspace + columns * padded);
    gemm<true, true>(o, padded, s, columns, v.data, kLanes, v.stride, columns, v.depth, text.keys);
  }
};

}  // namespace

void forward(const Params& p) {
  switch (p.dtype) {
    case DType::kBFloat16: return run<Products, bf16>(p);
    case DType::kFloat16: return run<Products, fp16>(p);
    default: return run<Products, float>(p);
  }
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::decode_attention
