// SPDX-License-Identifier: MIT
// A task is a (sample, key-value head). Which ring slots the token sees is worked out once for all tasks. Four keys are
// scored at a time, so that their dot products overlap.
#include "decode_attention.h"

#include "../core/parallel.h"
#include "../core/simd.h"

namespace dalle_fast::decode_attention {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

const float kMinusInf = -__builtin_inff();

template <typename T>
DF_INLINE T* row3(const Tensor3& t, int64_t b, int64_t h) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h;
}
template <typename T>
DF_INLINE T* row4(const Tensor4& t, int64_t b, int64_t h, int64_t l) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h + l * t.stride_l;
}

template <typename T>
DF_INLINE VecF load_part(const T* p, int64_t d, int64_t n) {
  return n - d >= kLanes ? loadu(p + d) : load_n(p + d, static_cast<int>(n - d));
}

// s[i] = q . key(i) for i in [0, n)
template <typename T, typename Key>
DF_INLINE void dots(float* s, const float* q, Key&& key, int64_t n, int64_t dim) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const T* row[4] = {key(i), key(i + 1), key(i + 2), key(i + 3)};
    VecF acc[4] = {};
    for (int64_t d = 0; d < dim; d += kLanes) {
      const VecF x = loadu(q + d);
      for (int k = 0; k < 4; ++k) acc[k] += x * load_part(row[k], d, dim);
    }
    for (int k = 0; k < 4; ++k) s[i + k] = hsum(acc[k]);
  }
  for (; i < n; ++i) {
    const T* row = key(i);
    VecF acc = {};
    for (int64_t d = 0; d < dim; d += kLanes) acc += loadu(q + d) * load_part(row, d, dim);
    s[i] = hsum(acc);
  }
}

// out[d] += sum_i p[i] value(i)[d]
template <typename T, typename Value>
DF_INLINE void accumulate(float* out, const float* p, Value&& value, int64_t n, int64_t dim) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    VecF acc[2] = {loadu(out + d), VecF{}};
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
      acc[0] += splat(p[i]) * load_part(value(i), d, dim);
      acc[1] += splat(p[i + 1]) * load_part(value(i + 1), d, dim);
    }
    if (i < n) acc[0] += splat(p[i]) * load_part(value(i), d, dim);
    storeu(out + d, acc[0] + acc[1]);
  }
}

template <typename T>
void task(const Params& p, int64_t b, int64_t kv, const float* slots, int64_t num_image) {
  static thread_local ThreadScratch scratch;
  const bool text = p.position < p.pattern.text_len;
  const int64_t text_b = b / (p.batch / p.text_batch);
  const int64_t num_text = text ? p.position + 1 : p.pattern.text_len;
  const int64_t padded = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  const int64_t total = num_text + num_image;
  float* q = scratch.floats(2 * padded + (total + kLanes) / kLanes * kLanes);
  float* o = q + padded;
  float* s = o + padded;

  T* new_k = text ? row4<T>(p.text_k, b, kv, p.position)
                  : row4<T>(p.image_k, b, kv, (p.position - p.pattern.text_len) % p.ring_len);
  T* new_v = text ? row4<T>(p.text_v, b, kv, p.position)
                  : row4<T>(p.image_v, b, kv, (p.position - p.pattern.text_len) % p.ring_len);
  __builtin_memmove(new_k, row3<T>(p.k, b, kv), static_cast<std::size_t>(p.head_dim) * sizeof(T));
  __builtin_memmove(new_v, row3<T>(p.v, b, kv), static_cast<std::size_t>(p.head_dim) * sizeof(T));

  const auto slot = [&](int64_t i) { return static_cast<int64_t>(bit_cast<int32_t>(slots[i])); };
  const int64_t group = p.num_heads / p.num_kv_heads;
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    const T* from = row3<T>(p.q, b, h);
    for (int64_t d = 0; d < padded; d += kLanes) {
      storeu(q + d, load_part(from, d, p.head_dim) * splat(p.scale));
      storeu(o + d, VecF{});
    }
    dots<T>(s, q, [&](int64_t i) { return row4<T>(p.text_k, text_b, kv, i); }, num_text, p.head_dim);
    dots<T>(s + num_text, q, [&](int64_t i) { return row4<T>(p.image_k, b, kv, slot(i)); }, num_image, p.head_dim);
    for (int64_t i = total; i % kLanes; ++i) s[i] = kMinusInf;
    VecF best = splat(kMinusInf);
    for (int64_t i = 0; i < total; i += kLanes) best = vmax(loadu(s + i), best);
    const float shift = hmax(best);
    VecF sum = {};
    for (int64_t i = 0; i < total; i += kLanes) {
      const VecF e = exp(loadu(s + i) - splat(shift));
      storeu(s + i, e);
      sum += e;
    }
    accumulate<T>(o, s, [&](int64_t i) { return row4<T>(p.text_v, text_b, kv, i); }, num_text, p.head_dim);
    accumulate<T>(
        o, s + num_text, [&](int64_t i) { return row4<T>(p.image_v, b, kv, slot(i)); }, num_image, p.head_dim);
    const VecF factor = splat(1.0f / hsum(sum));
    T* out = row3<T>(p.out, b, h);
    int64_t d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes) storeu(out + d, loadu(o + d) * factor);
    if (d < p.head_dim) store_n(out + d, loadu(o + d) * factor, static_cast<int>(p.head_dim - d));
  }
}

template <typename T>
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
  parallel_for(
      p.batch * p.num_kv_heads, [&](int64_t i) { task<T>(p, i / p.num_kv_heads, i % p.num_kv_heads, slots, count); },
      threads);
}

}  // namespace

void forward(const Params& p) {
  switch (p.dtype) {
    case DType::kBFloat16: return run<bf16>(p);
    case DType::kFloat16: return run<fp16>(p);
    default: return run<float>(p);
  }
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::decode_attention
