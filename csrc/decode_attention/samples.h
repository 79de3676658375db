// SPDX-License-Identifier: MIT
// What the CPU kernels share. A task is one key-value head of a few samples that share their text. Text is a product of
// matrices if the task has queries enough: scores transposed, [keys, queries], so that the softmax runs across lanes
// and neither keys nor values have to be rearranged. A sample's own image keys come by rows, between the two products:
// keys and values of one sample while those of the next are on their way. Which ring slots the token sees is worked out
// once.
#pragma once

#include <type_traits>

#include "../core/parallel.h"
#include "../core/simd.h"
#include "decode_attention.h"

namespace dalle_fast::decode_attention {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

const float kMinusInf = -__builtin_inff();
constexpr int64_t kQueries = 32;      // of a task, about
constexpr int64_t kFew = kLanes / 2;  // queries that are no matrix yet
constexpr int64_t kKeys = 64;         // read for few queries while they are in the first-level cache
constexpr int64_t kAhead = 32;
constexpr int kTogether = kLanes >= 8 ? kLanes / 4 : 1;  // of few queries in registers
constexpr int64_t kPair = 2 * kLanes;

template <typename T>
DF_INLINE T* row3(const Tensor3& t, int64_t b, int64_t h) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h;
}
template <typename T>
DF_INLINE T* row4(const Tensor4& t, int64_t b, int64_t h, int64_t l) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h + l * t.stride_l;
}

// ---- kPair elements of a row as two vectors: of bfloat16 the even and the odd ones, which costs no more than a shift
// and a mask. Products over the head dimension do not care, and what is stored goes back into its order.

struct Pair {
  VecF a, b;
};

template <typename T>
DF_INLINE Pair load_pair(const T* p) {
  return {loadu(p), loadu(p + kLanes)};
}
DF_INLINE Pair load_pair(const bf16* p) {
  VecU words;
  __builtin_memcpy(&words, p, sizeof words);
  return {bit_cast<VecF>(words << 16), bit_cast<VecF>(words & 0xffff0000u)};
}
template <typename T>
DF_INLINE void store_pair(T* p, const Pair& x) {
  storeu(p, x.a);
  storeu(p + kLanes, x.b);
}
DF_INLINE void store_pair(bf16* p, const Pair& x) {
  const VecU words = __builtin_convertvector(to_bf16(x.a), VecU) | __builtin_convertvector(to_bf16(x.b), VecU) << 16;
  __builtin_memcpy(p, &words, sizeof words);
}

// elements [d, dim) of a row at most; zeros behind them
template <typename T>
DF_INLINE Pair load_pair(const T* row, int64_t d, int64_t dim) {
  if (dim - d >= kPair) return load_pair(row + d);
  T part[kPair] = {};
  __builtin_memcpy(part, row + d, static_cast<std::size_t>(dim - d) * sizeof(T));
  return load_pair(part);
}
template <typename T>
DF_INLINE void store_pair(T* row, int64_t d, int64_t dim, const Pair& x) {
  if (dim - d >= kPair) return store_pair(row + d, x);
  T part[kPair];
  store_pair(part, x);
  __builtin_memcpy(row + d, part, static_cast<std::size_t>(dim - d) * sizeof(T));
}

// Asks for a row that will be read soon, into the second-level cache.
template <typename T>
DF_INLINE void prefetch_row(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// ---- products

// s[q][k] = query q . row[k] for Q queries and N <= kLanes / Q keys. Rows of q and of s are dim_padded and s_stride
// apart. One query takes two pairs of a key at a time: its own stay in registers, and keys come in the order of memory.
template <int Q, int N, typename T>
DF_INLINE void dots_of(float* s, int64_t s_stride, const float* q, int64_t dim_padded, const T* const* row,
                       int64_t dim) {
  constexpr int K = kLanes / Q, P = Q == 1 ? 2 : 1;
  VecF acc[kLanes] = {};
  const auto add = [&](int64_t d, auto pairs) {
    constexpr int M = decltype(pairs)::value;
    Pair x[Q][M];
    for (int j = 0; j < Q; ++j)
      for (int m = 0; m < M; ++m) x[j][m] = load_pair(q + j * dim_padded + d + m * kPair);
    for (int k = 0; k < N; ++k)
      for (int m = 0; m < M; ++m) {
        const Pair y = load_pair(row[k], d + m * kPair, dim);
        for (int j = 0; j < Q; ++j) acc[j * K + k] += x[j][m].a * y.a;
        for (int j = 0; j < Q; ++j) acc[j * K + k] += x[j][m].b * y.b;
      }
  };
  int64_t d = 0;
  for (; d + (P - 1) * kPair < dim; d += P * kPair) add(d, std::integral_constant<int, P>());
  if (d < dim) add(d, std::integral_constant<int, 1>());
  float sums[kLanes];
  storeu(sums, sums_of(acc));
  for (int j = 0; j < Q; ++j) __builtin_memcpy(s + j * s_stride, sums + j * K, K * sizeof(float));
}

// s[q][i] = query q . key(i) for i in [0, n), written up to the next multiple of kLanes / Q
template <int Q, typename T, typename Key>
DF_INLINE void dots(float* s, int64_t s_stride, const float* q, int64_t dim_padded, Key&& key, int64_t n, int64_t dim) {
  constexpr int K = kLanes / Q, kTail = K > 4 ? 4 : K;  // a window is often a few keys more than whole groups
  for (int64_t i = 0; i < n; i += K) {
    const T* row[K];
    for (int k = 0; k < K; ++k) row[k] = key(i + k < n ? i + k : n - 1);
    if (n - i > kTail)
      dots_of<Q, K, T>(s + i, s_stride, q, dim_padded, row, dim);
    else
      dots_of<Q, kTail, T>(s + i, s_stride, q, dim_padded, row, dim);
  }
}

// o[q][d ... d + P kPair) += sum_i s[q][i] value(i)[d ...]
template <int Q, int P, typename T, typename Value>
DF_INLINE void accumulate_part(float* o, int64_t dim_padded, const float* s, int64_t s_stride, Value&& value, int64_t n,
                               int64_t d, int64_t dim) {
  Pair acc[Q][P];
  for (int j = 0; j < Q; ++j)
    for (int k = 0; k < P; ++k) acc[j][k] = load_pair(o + j * dim_padded + d + k * kPair);
  for (int64_t i = 0; i < n; ++i) {
    const T* const row = value(i);
    Pair x[P];
    for (int k = 0; k < P; ++k) x[k] = load_pair(row, d + k * kPair, dim);
    for (int j = 0; j < Q; ++j) {
      const VecF weight = splat(s[j * s_stride + i]);
      for (int k = 0; k < P; ++k) {
        acc[j][k].a += weight * x[k].a;
        acc[j][k].b += weight * x[k].b;
      }
    }
  }
  for (int j = 0; j < Q; ++j)
    for (int k = 0; k < P; ++k) store_pair(o + j * dim_padded + d + k * kPair, acc[j][k]);
}

template <int Q, typename T, typename Value>
DF_INLINE void accumulate(float* o, int64_t dim_padded, const float* s, int64_t s_stride, Value&& value, int64_t n,
                          int64_t dim) {
  int64_t d = 0;
  for (; d + kPair < dim; d += 2 * kPair) accumulate_part<Q, 2, T>(o, dim_padded, s, s_stride, value, n, d, dim);
  if (d < dim) accumulate_part<Q, 1, T>(o, dim_padded, s, s_stride, value, n, d, dim);
}

// f(number of queries, first of them), kTogether at a time, then one by one
template <typename F>
DF_INLINE void for_each_query(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kTogether <= count; i += kTogether) f(std::integral_constant<int, kTogether>(), i);
  for (; i < count; ++i) f(std::integral_constant<int, 1>(), i);
}

// ---- softmax, in base 2

// 2^(s - largest) in place of s[0, n), up to the next multiple of kLanes; returns their sum. `largest` is raised to the
// largest of them first.
DF_INLINE float exponentials(float* s, int64_t n, float* largest) {
  for (int64_t i = n; i % kLanes; ++i) s[i] = kMinusInf;
  VecF best = splat(*largest);
  for (int64_t i = 0; i < n; i += kLanes) best = vmax(loadu(s + i), best);
  *largest = hmax(best);
  VecF sum = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF e = exp2_fast(loadu(s + i) - splat(*largest));
    storeu(s + i, e);
    sum += e;
  }
  return hsum(sum);
}

// ---- text as a product of matrices; cpu.cpp and cpu_bf16.cpp have their own Products

template <typename T>
struct Text {
  const T *k, *v;
  int64_t k_stride, v_stride, keys, dim;
};

// s[key][query]: the largest of each column
DF_INLINE void largest_of_columns(float* largest, const float* s, int64_t columns, int64_t keys, float factor) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    VecF best = splat(kMinusInf);
    for (int64_t k = 0; k < keys; ++k) best = vmax(loadu(s + k * columns + c) * splat(factor), best);
    storeu(largest + c, best);
  }
}

// 2^(factor s - largest), two keys at a time, to where the product with values wants them; adds their sums up
template <typename Products>
DF_INLINE void exponentials_of_columns(float* sums, float* s, const float* largest, int64_t columns, int64_t keys,
                                       float factor) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const VecF shift = loadu(largest + c);
    VecF sum = loadu(sums + c);
    for (int64_t k = 0; k < keys; k += 2) {
      const float* const at = s + k * columns + c;
      const VecF e = exp2_fast(loadu(at) * splat(factor) - shift);
      const VecF next = k + 1 < keys ? exp2_fast(loadu(at + columns) * splat(factor) - shift) : VecF{};
      Products::store(s, columns, k, c, e, next);
      sum += e;
      sum += next;
    }
    storeu(sums + c, sum);
  }
}

// ---- a task

// Samples [begin, end), which share the text of one.
template <typename Products, typename T>
void task(const Params& p, int64_t begin, int64_t end, int64_t kv, const float* slots, int64_t num_image) {
  static thread_local ThreadScratch scratch;
  const bool is_text = p.position < p.pattern.text_len;
  const int64_t text_b = begin / (p.batch / p.text_batch), dim = p.head_dim;
  const int64_t num_text = is_text ? p.position + 1 : p.pattern.text_len;
  const int64_t group = p.num_heads / p.num_kv_heads, count = (end - begin) * group;  // queries
  const bool few = count <= kFew || num_text == 0;
  const auto slot = [&](int64_t i) { return static_cast<int64_t>(bit_cast<int32_t>(slots[i])); };
  const Text<T> text{row4<T>(p.text_k, text_b, kv, 0),
                     row4<T>(p.text_v, text_b, kv, 0),
                     p.text_k.stride_l,
                     p.text_v.stride_l,
                     num_text,
                     dim};
  const int64_t padded = round_up(dim, 2 * kPair), columns = few ? count : round_up(count, Products::kColumns);
  const int64_t stride = round_up((few ? num_text : 0) + num_image, kLanes) + kLanes;
  const int64_t sheet = columns * padded, keys = round_up(num_text, Products::kKeys);
  float* const q = scratch.floats(2 * sheet + (few ? count * stride : stride) + 2 * round_up(columns, kLanes) +
                                  (few ? 0 : keys * columns + Products::floats(text, columns, padded)));
  float* const o = q + sheet;
  float* const largest = o + sheet;
  float* const sums = largest + round_up(columns, kLanes);
  float* const s = sums + round_up(columns, kLanes);  // [keys, columns]
  float* const own = s + (few ? 0 : keys * columns);  // [count, stride], or one row of it
  float* const workspace = own + stride;              // where there are not few

  // What a task reads is rarely in a cache, and is asked for while the first product runs: its step of kAhead text keys
  // brings the keys of the step after next, its own values, and a share of the samples' image rows.
  const auto fetch = [&](int64_t step) {
    const int64_t steps = (num_text + kAhead - 1) / kAhead, n = end - begin;
    for (int64_t k = step * kAhead; k < num_text && k < (step + 1) * kAhead; ++k) {
      if (k + 2 * kAhead < num_text) prefetch_row(text.k + (k + 2 * kAhead) * text.k_stride, dim);
      prefetch_row(text.v + k * text.v_stride, dim);
    }
    for (int64_t b = begin + n * step / steps; b < begin + n * (step + 1) / steps; ++b) {
      for (int64_t i = 0; i < num_image; ++i) prefetch_row(row4<T>(p.image_k, b, kv, slot(i)), dim);
      for (int64_t i = 0; i < num_image; ++i) prefetch_row(row4<T>(p.image_v, b, kv, slot(i)), dim);
    }
  };
  const auto for_each_sample = [&](auto f) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t h = 0; h < group; ++h) f(b, kv * group + h, (b - begin) * group + h);
  };
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = is_text ? p.position : (p.position - p.pattern.text_len) % p.ring_len;
    __builtin_memmove(row4<T>(is_text ? p.text_k : p.image_k, b, kv, at), row3<T>(p.k, b, kv),
                      static_cast<std::size_t>(dim) * sizeof(T));
    __builtin_memmove(row4<T>(is_text ? p.text_v : p.image_v, b, kv, at), row3<T>(p.v, b, kv),
                      static_cast<std::size_t>(dim) * sizeof(T));
  }
  for_each_sample([&](int64_t b, int64_t h, int64_t i) {
    for (int64_t d = 0; d < padded; d += kPair)
      store_pair(q + i * padded + d, d < dim ? load_pair(row3<T>(p.q, b, h), d, dim) : Pair{});
  });
  zero(q + count * padded, sheet - count * padded);
  zero(o, sheet);

  // scores with text; from here on q has the factor of all scores
  const float factor = p.scale * kLog2e;
  if (!few) {
    Products::scores(text, s, columns, q, padded, workspace, fetch);
    largest_of_columns(largest, s, columns, num_text, factor);
  }
  for (int64_t i = 0; i < count * padded; i += kLanes) storeu(q + i, loadu(q + i) * splat(factor));
  for (int64_t first = 0; few && first < num_text; first += kKeys) {
    const int64_t n = num_text - first < kKeys ? num_text - first : kKeys;
    for_each_query(count, [&](auto queries, int64_t i) {
      dots<queries, T>(
          own + i * stride + first, stride, q + i * padded, padded,
          [&](int64_t k) { return text.k + (first + k) * text.k_stride; }, n, dim);
    });
  }

  const int64_t num_before = few ? num_text : 0;
  for_each_sample([&](int64_t b, int64_t, int64_t i) {
    const T* const k = row4<T>(p.image_k, b, kv, 0);
    const T* const v = row4<T>(p.image_v, b, kv, 0);
    float* const row = own + (few ? i * stride : 0);
    const auto image = [&](const T* first, const Tensor4& t, int64_t at) {
      const T* const found = first + slot(at) * t.stride_l;
      if (few) prefetch_row(found + t.stride_b, dim);
      return found;
    };
    dots<1, T>(
        row + num_before, stride, q + i * padded, padded, [&](int64_t at) { return image(k, p.image_k, at); },
        num_image, dim);
    if (few) largest[i] = kMinusInf;
    sums[i] = exponentials(row, num_before + num_image, largest + i);
    accumulate<1, T>(
        o + i * padded, padded, row + num_before, stride, [&](int64_t at) { return image(v, p.image_v, at); },
        num_image, dim);
  });

  if (!few) {
    zero(sums + count, columns - count);
    exponentials_of_columns<Products>(sums, s, largest, columns, num_text, factor);
    Products::accumulate(text, o, padded, s, columns, workspace);
  }
  for (int64_t first = 0; few && first < num_text; first += kKeys) {
    const int64_t n = num_text - first < kKeys ? num_text - first : kKeys;
    for_each_query(count, [&](auto queries, int64_t i) {
      accumulate<queries, T>(
          o + i * padded, padded, own + i * stride + first, stride,
          [&](int64_t k) { return text.v + (first + k) * text.v_stride; }, n, dim);
    });
  }
  for_each_sample([&](int64_t b, int64_t h, int64_t i) {
    const VecF inverse = splat(1.0f / sums[i]);
    for (int64_t d = 0; d < dim; d += kPair) {
      const Pair x = load_pair(o + i * padded + d);
      store_pair(row3<T>(p.out, b, h), d, dim, {x.a * inverse, x.b * inverse});
    }
  });
}

template <template <typename> class Products, typename T>
void run(Params p) {
  if (p.position_at) p.position = *p.position_at;
  if (!is_possible(p, p.position)) {
    for (int64_t i = 0; i < p.batch * p.num_heads; ++i)
      for (int64_t d = 0; d < p.head_dim; ++d)
        store_n(row3<T>(p.out, i / p.num_heads, i % p.num_heads) + d, splat(__builtin_nanf("")), 1);
    return;
  }
  // slots as the bits of floats: the scratch is one of floats
  static thread_local ThreadScratch scratch;
  int64_t count = 0;
  float* slots = nullptr;
  if (p.position >= p.pattern.text_len) {
    const int64_t q = p.position - p.pattern.text_len;
    slots = scratch.floats(q + 1);
    for (int64_t k = first_image_key(p.pattern, q); k <= q; ++k)
      if (image_may_attend(p.pattern, q, k)) slots[count++] = bit_cast<float>(static_cast<int32_t>(k % p.ring_len));
  }
  const int64_t keys = (p.position < p.pattern.text_len ? p.position + 1 : p.pattern.text_len) + count;
  const bool threads = p.batch * p.num_heads * keys * p.head_dim >= 4 * kSerialBelow;
  const int64_t group = p.num_heads / p.num_kv_heads, share = p.batch / p.text_batch;
  const int64_t samples = group < kQueries ? kQueries / group : 1, blocks = (share + samples - 1) / samples;
  parallel_for(
      p.num_kv_heads * p.text_batch * blocks,
      [&](int64_t i) {
        const int64_t block = i % blocks * samples, first = i / blocks % p.text_batch * share;
        const int64_t end = block + samples < share ? block + samples : share;
        task<Products<T>, T>(p, first + block, first + end, i / blocks / p.text_batch, slots, count);
      },
      threads);
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::decode_attention
