// SPDX-License-Identifier: MIT
// Text as products of bfloat16 matrices: keys are read where they lie if they fill blocks, values are paired up once a
// task. The weights are rounded to bfloat16 on their way to the values; their sum adds up unrounded ones.
#include "../core/bf16_tiles.h"
#include "samples.h"

namespace dalle_fast::decode_attention {
namespace DF_CPU_NAMESPACE {

namespace {

template <typename T>
struct Products {
  static constexpr int64_t kColumns = kBlock / 2, kKeys = kBlock;

  static int64_t floats(const Text<T>& text, int64_t columns, int64_t padded) {
    const int64_t keys = round_up(text.keys, kKeys);
    const int64_t for_scores = padded * columns + (in_place(text) ? 0 : keys * padded / 2);
    const int64_t for_values = keys / 2 * (columns + padded);
    return for_scores > for_values ? for_scores : for_values;
  }
  static bool in_place(const Text<T>& text) { return text.dim % kBlock == 0 && text.keys % (kBlock / 2) == 0; }

  // s[key][query]
  template <typename Fetch>
  static void scores(const Text<T>& text, float* s, int64_t columns, const float* q, int64_t padded, float* workspace,
                     Fetch&& fetch) {
    const bool amx = cpu_level() >= CpuLevel::kAmx;
    const TileScope tiles(amx);
    const int64_t words = padded / 2, keys = round_up(text.keys, kBlock / 2), depth = round_up(text.dim, kBlock);
    uint32_t* const q_words = reinterpret_cast<uint32_t*>(workspace);  // [columns, words]
    uint32_t* const qt = q_words + columns * words;                    // [words, columns]
    for (int64_t i = 0; i < columns * words; i += kLanes) {            // q is exact in bfloat16
      const Pair x = load_pair(q + 2 * i);
      store_words(q_words + i, bit_cast<VecU>(x.a) >> 16 | bit_cast<VecU>(x.b));
    }
    transpose_words(qt, columns, q_words, words, columns, words);
    const bf16* k = text.k;
    int64_t stride = text.k_stride;
    if (!in_place(text)) {
      bf16* const copy = reinterpret_cast<bf16*>(qt + columns * words);
      __builtin_memset(copy, 0, static_cast<std::size_t>(keys * depth) * sizeof(bf16));
      for (int64_t i = 0; i < text.keys; ++i)
        __builtin_memcpy(copy + i * depth, k + i * stride, static_cast<std::size_t>(text.dim) * sizeof(bf16));
      k = copy;
      stride = depth;
    }
    for (int64_t first = 0; first < keys; first += kAhead) {
      fetch(first / kAhead);
      const int64_t n = keys - first < kAhead ? keys - first : kAhead;
      gemm_bf16<false>(s + first * columns, columns, k + first * stride, stride, qt, columns, n, columns, depth, amx);
    }
  }

  // pairs along keys, over what has been read
  static void store(float* s, int64_t columns, int64_t k, int64_t c, VecF e, VecF next) {
    const VecU words = pair_of(round_bf16(e), round_bf16(next));
    __builtin_memcpy(s + k / 2 * columns + c, &words, sizeof words);
  }

  // o[query] += the values weighted with s
  static void accumulate(const Text<T>& text, float* o, int64_t padded, float* s, int64_t columns, float* workspace) {
    const bool amx = cpu_level() >= CpuLevel::kAmx;
    const TileScope tiles(amx);
    const int64_t keys = round_up(text.keys, kKeys), pairs = (text.keys + 1) / 2;
    uint32_t* const weights = reinterpret_cast<uint32_t*>(workspace);  // [columns, keys / 2]
    uint32_t* const v = weights + columns * keys / 2;                  // [keys / 2, padded]
    zero(s + pairs * columns, (keys / 2 - pairs) * columns);
    transpose_words(weights, keys / 2, reinterpret_cast<const uint32_t*>(s), columns, keys / 2, columns);
    for (int64_t i = 0; i < keys / 2; ++i)
      for (int64_t d = 0; d < padded; d += kPair) {  // in the order of pairs, as o
        const auto row = [&](int64_t k) {
          return k < text.keys && d < text.dim ? load_pair(text.v + k * text.v_stride, d, text.dim) : Pair{};
        };
        const Pair x = row(2 * i), y = row(2 * i + 1);
        store_words(v + i * padded + d, bit_cast<VecU>(x.a) >> 16 | bit_cast<VecU>(y.a));
        store_words(v + i * padded + d + kLanes, bit_cast<VecU>(x.b) >> 16 | bit_cast<VecU>(y.b));
      }
    gemm_bf16<true>(o, padded, reinterpret_cast<const bf16*>(weights), keys, v, padded, columns, padded, keys, amx);
  }
};

}  // namespace

void forward(const Params& p) { run<Products, bf16>(p); }

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::decode_attention
