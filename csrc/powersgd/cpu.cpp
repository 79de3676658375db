// SPDX-License-Identifier: MIT
// Tiles of numbers: decoded, added to and encoded on the way into the second-level cache, then multiplied in float32. E
// is read and written once a product, in runs long enough for the hardware to fetch ahead; a part of X serves all rows
// of a task. Each output row is summed by one task in one order.
#include "powersgd.h"

#include "../core/gemm.h"
#include "../core/minifloat_simd.h"
#include "../core/parallel.h"

namespace dalle_fast::powersgd {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int64_t kTaskRows = 128;
constexpr int64_t kLines = 64, kRun = 256;  // of a tile: kRun dense elements of each of kLines
constexpr int64_t kPitch = kRun + kLanes;   // lines of a tile begin in different sets of the first-level cache

DF_INLINE VecH encode(VecF x) { return ::dalle_fast::DF_CPU_NAMESPACE::minifloat_encode<true>(x); }
DF_INLINE VecF decode(VecH h) { return ::dalle_fast::DF_CPU_NAMESPACE::minifloat_decode<true>(h); }
DF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DF_INLINE int lanes_of(int64_t rest) { return static_cast<int>(rest < kLanes ? rest : kLanes); }
// The largest magnitude so far, as bits: those of Inf and NaN are above all others.
DF_INLINE VecI larger(VecI largest, VecF x) {
  const VecI magnitude = bit_cast<VecI>(vabs(x));
  return magnitude > largest ? magnitude : largest;
}
DF_INLINE bool is_finite(VecI largest) {
  bool finite = true;
  for (int i = 0; i < kLanes; ++i) finite = finite && largest[i] < 0x7f800000;
  return finite;
}
DF_INLINE void clear(int32_t* flag) { __atomic_store_n(flag, 0, __ATOMIC_RELAXED); }

template <typename T>
DF_INLINE VecF load(const T* p, int n) {
  return n == kLanes ? loadu(p) : load_n(p, n);
}
DF_INLINE VecF load_code(const uint16_t* p, int n) { return decode(load_h(p, n)); }

// [rows, rank] of codes or float32 -> float32 rows of `width`, filled up with zeros
DF_INLINE void decode_rows(float* to, int64_t width, const void* from, bool codes, int64_t rows, int64_t rank) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; c += kLanes) {
      const int n = lanes_of(rank - c);
      const int64_t at = i * rank + c;
      storeu(to + i * width + c, codes ? load_code(static_cast<const uint16_t*>(from) + at, n)
                                       : load(static_cast<const float*>(from) + at, n));
    }
}

template <typename T>
bool all_finite(const ProjectParams& p) {
  const int64_t outer = p.transposed ? p.depth : p.rows, inner = p.transposed ? p.rows : p.depth;
  int32_t finite = 1;
  parallel_chunks(outer, 64, [&](int64_t begin, int64_t end) {
    VecI largest = {};
    for (int64_t o = begin; o < end; ++o) {
      const T* row = static_cast<const T*>(p.grad) + o * p.grad_stride;
      for (int64_t i = 0; i < inner; i += kLanes) largest = larger(largest, load(row + i, lanes_of(inner - i)));
    }
    if (!is_finite(largest)) clear(&finite);
  });
  return finite != 0;
}

// Numbers of E, `outer` rows of `inner` dense ones from (o0, i0), after the gradient where kAdd.
template <typename T, bool kAdd>
DF_INLINE void load_tile(float* tile, const ProjectParams& p, int64_t o0, int64_t i0, int64_t outer, int64_t inner,
                         VecI& largest) {
  for (int64_t o = 0; o < outer; ++o) {
    uint16_t* code = p.error + (o0 + o) * p.error_stride + i0;
    const T* grad = kAdd ? static_cast<const T*>(p.grad) + (o0 + o) * p.grad_stride + i0 : nullptr;
    const auto one = [&](int64_t i, int n) {
      VecF e = load_code(code + i, n);
      if (kAdd) {
        e = e + load(grad + i, n) * splat(p.inverse_grad_scale);
        store_h(code + i, minifloat_round<true>(e), n);
      }
      largest = larger(largest, e);
      storeu(tile + o * kPitch + i, e);
    };
    int64_t i = 0;
    for (; i + kLanes <= inner; i += kLanes) one(i, kLanes);
    if (i < inner) one(i, static_cast<int>(inner - i));
  }
}

template <typename T, bool kAdd>
void project_rows(const ProjectParams& p, const float* factor, int64_t width, int64_t begin, int64_t end) {
  static thread_local ThreadScratch scratch;
  float* tile = scratch.floats(kLines * kPitch + kTaskRows * width);
  float* sum = tile + kLines * kPitch;
  const int64_t rows = end - begin;
  VecI largest_error = {}, largest_out = {};
  zero(sum, rows * width);
  const int64_t tile_rows = p.transposed ? kRun : kLines, tile_depth = p.transposed ? kLines : kRun;
  for (int64_t k = 0; k < p.depth; k += tile_depth)
    for (int64_t i = 0; i < rows; i += tile_rows) {
      const int64_t depth = smaller(tile_depth, p.depth - k), n = smaller(tile_rows, rows - i);
      if (p.transposed) {
        load_tile<T, kAdd>(tile, p, k, begin + i, depth, n, largest_error);
        gemm<true, true>(sum + i * width, width, tile, kPitch, factor + k * width, kLanes, width, n, width, depth);
      } else {
        load_tile<T, kAdd>(tile, p, begin + i, k, n, depth, largest_error);
        gemm<false, true>(sum + i * width, width, tile, kPitch, factor + k * width, kLanes, width, n, width, depth);
      }
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < p.rank; c += kLanes) {
      const VecH code = encode(loadu(sum + i * width + c) * splat(p.scale));
      const VecF x = decode(code);
      const int n = lanes_of(p.rank - c);
      const VecI mine = (VecI)(lane_index() < splat_i(n));
      largest_out = larger(largest_out, bit_cast<VecF>(bit_cast<VecI>(x) & mine));
      const VecF most = splat(15.984375f);
      const VecF clamped = x > most ? most : x < -most ? -most : x;
      store_h(p.out + (begin + i) * p.rank + c, encode(clamped), n);
    }
  if (!is_finite(largest_error)) clear(p.status + 1);
  if (!is_finite(largest_out)) clear(p.status + 2);
}

}  // namespace

void project(const ProjectParams& p) {
  static thread_local ThreadScratch scratch;
  const int64_t width = round_up(p.rank, kLanes);
  float* factor = scratch.floats(p.depth * width);
  parallel_chunks(p.depth, kRun, [&](int64_t begin, int64_t end) {
    const int64_t size = p.factor_is_codes ? sizeof(uint16_t) : sizeof(float);
    decode_rows(factor + begin * width, width, static_cast<const char*>(p.factor) + begin * p.rank * size,
                p.factor_is_codes, end - begin, p.rank);
  });
  const bool finite = !p.grad || (p.grad_is_bf16 ? all_finite<bf16>(p) : all_finite<float>(p));
  if (!finite) clear(p.status);
  parallel_chunks(p.rows, kTaskRows, [&](int64_t begin, int64_t end) {
    if (!p.grad || !finite)
      project_rows<float, false>(p, factor, width, begin, end);
    else if (p.grad_is_bf16)
      project_rows<bf16, true>(p, factor, width, begin, end);
    else
      project_rows<float, true>(p, factor, width, begin, end);
  });
}

void reconstruct(const ReconstructParams& p) {
  static thread_local ThreadScratch packed_scratch;
  const int64_t width = round_up(p.rank, kLanes), columns = round_up(p.columns, kLanes);
  float* packed = packed_scratch.floats(columns * width);  // right^T, vector by vector
  parallel_for(columns / kLanes, [&](int64_t i) {
    static thread_local ThreadScratch scratch;
    float* staging = scratch.floats(kLanes * width);
    const int64_t c = i * kLanes, n = smaller(kLanes, p.columns - c);
    zero(staging, kLanes * width);
    decode_rows(staging, width, p.right + c * p.rank, true, n, p.rank);
    for (int64_t r = 0; r < width; r += kLanes)
      transpose_block(packed + c * width + r * kLanes, kLanes, staging + r, width);
  });
  parallel_chunks(p.rows, kLines, [&](int64_t begin, int64_t end) {
    static thread_local ThreadScratch scratch;
    float* left = scratch.floats(kLines * width + kLines * kPitch);
    float* tile = left + kLines * width;
    const int64_t rows = end - begin;
    decode_rows(left, width, p.left + begin * p.rank, true, rows, p.rank);
    for (int64_t c0 = 0; c0 < p.columns; c0 += kRun) {
      const int64_t n = smaller(kRun, p.columns - c0);
      gemm<false, false>(tile, kPitch, left, width, packed + c0 * width, width * kLanes, kLanes, rows,
                         round_up(n, kLanes), p.rank);
      for (int64_t i = 0; i < rows; ++i) {
        const float* product = tile + i * kPitch;
        float* grad = p.grad + (begin + i) * p.grad_stride + c0;
        uint16_t* error = p.error ? p.error + (begin + i) * p.error_stride + c0 : nullptr;
        const auto one = [&](int64_t c, int lanes) {
          const VecF g = loadu(product + c), out = g * splat(p.grad_factor);
          lanes == kLanes ? storeu(grad + c, out) : store_n(grad + c, out, lanes);
          if (!error) return;
          store_h(error + c, encode(load_code(error + c, lanes) - g * splat(p.error_factor)), lanes);
        };
        int64_t c = 0;
        for (; c + kLanes <= n; c += kLanes) {
          __builtin_prefetch(grad + p.grad_stride + c, 1);  // the next row: runs are short for the hardware
          if (error) __builtin_prefetch(error + p.error_stride + c, 1);
          one(c, kLanes);
        }
        if (c < n) one(c, static_cast<int>(n - c));
      }
    }
  });
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::powersgd
