// SPDX-License-Identifier: MIT
// Bound by memory: 6 bytes an element.
#include "minifloat.h"

#include "../core/minifloat_simd.h"
#include "../core/parallel.h"

namespace dalle_fast::minifloat {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int64_t kChunk = 1 << 14;

// f(first element, lanes) over the array
template <typename F>
DF_INLINE void for_each_vector(int64_t count, F&& f) {
  parallel_chunks(count, kChunk, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) f(i, kLanes);
    if (i < end) f(i, static_cast<int>(end - i));
  });
}

template <bool kSigned>
void encode_all(const Params& p) {
  for_each_vector(p.count, [&](int64_t i, int n) {
    const VecF x = n == kLanes ? loadu(p.value + i) : load_n(p.value + i, n);
    store_h(p.code + i, ::dalle_fast::DF_CPU_NAMESPACE::minifloat_encode<kSigned>(x), n);
  });
}

template <bool kSigned>
void decode_all(const Params& p) {
  for_each_vector(p.count, [&](int64_t i, int n) {
    const VecF x = ::dalle_fast::DF_CPU_NAMESPACE::minifloat_decode<kSigned>(load_h(p.code + i, n));
    n == kLanes ? storeu(p.value + i, x) : store_n(p.value + i, x, n);
  });
}

}  // namespace

void encode(const Params& p) { p.has_sign ? encode_all<true>(p) : encode_all<false>(p); }
void decode(const Params& p) { p.has_sign ? decode_all<true>(p) : decode_all<false>(p); }

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::minifloat
