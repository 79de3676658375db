// SPDX-License-Identifier: MIT
// Tiles of kTileRows rows, parallel: logits by a product into scratch, relax or gradient row by row while the tile is
// in the cache, then the products that need it. The gradients of the weights are sums over rows: a chunk's dlogits and
// y wait for a second round, parallel over codes. All orders of summation are fixed, whatever the number of threads.
// The right-hand factors of products are packed once a call, a vector of columns after the other.
//
// A row goes in blocks of 4 kLanes codes, one call of kLanes Philox generators. relax computes everything in one pass
// (each block's exponentials against the largest value so far) and rescales block by block in a second; gradient leaves
// y and dl without its mean in a first pass and completes dl in a second.
#include "vq_bottleneck.h"

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "../core/gemm.h"
#include "../core/parallel.h"
#include "../core/philox_simd.h"
#include "../core/simd.h"

namespace dalle_fast::vq_bottleneck {
namespace DF_CPU_NAMESPACE {

using namespace ::dalle_fast::DF_CPU_NAMESPACE;

namespace {

constexpr int64_t kBlock = kNoiseCodes;
constexpr int64_t kTileRows = 32;
constexpr int64_t kTaskCodes = 64;   // of a task that sums over rows
constexpr float kLowest = -FLT_MAX;  // where maxima begin: -Inf - kLowest is -Inf, not NaN

typedef VecF Codes[4];

// logits + bias of codes [c, c + kBlock); codes that do not exist get -Inf, and so no weight.
template <bool kFull>
DF_INLINE void load_logits(Codes& l, const float* logits, const float* bias, int64_t c, int64_t num_codes) {
  for (int k = 0; k < 4; ++k) {
    const int64_t at = c + k * kLanes, rest = num_codes - at;
    if (kFull || rest >= kLanes) {
      l[k] = bias ? loadu(logits + at) + loadu(bias + at) : loadu(logits + at);
    } else {
      const int n = rest > 0 ? static_cast<int>(rest) : 0;
      const VecF sum = load_n(logits + at, n) + (bias ? load_n(bias + at, n) : VecF{});
      l[k] = lane_index() < splat_i(n) ? sum : splat(-__builtin_inff());
    }
  }
}

// f(vector of the block) for those that begin inside the row; padding belongs to the row.
template <bool kFull, typename F>
DF_INLINE void for_each_vector(int64_t c, int64_t num_codes, F f) {
  for (int k = 0; k < 4; ++k)
    if (kFull || c + k * kLanes < num_codes) f(k, c + k * kLanes);
}

template <typename F>
DF_INLINE void for_each_block(int64_t num_codes, F f) {
  int64_t c = 0;
  for (; c + kBlock <= num_codes; c += kBlock) f(c, std::true_type());
  if (c < num_codes) f(c, std::false_type());
}

DF_INLINE VecF largest_of(const Codes& v) { return vmax(vmax(v[0], v[1]), vmax(v[2], v[3])); }

// logits become y
void relax_row(const ForwardParams& p, const NoiseKey& key, float log_codes, float* logits, float* shift, int64_t row) {
  const int64_t num_blocks = round_up(p.num_codes, kBlock) / kBlock;
  const uint32_t number = p.noise.first_row + static_cast<uint32_t>(row);
  const VecF factor = splat(p.noise.inverse_tau), least = splat(kLeastLog);

  float largest = kLowest, largest_logit = kLowest;
  VecF sum[2] = {}, sum_q[2] = {}, sum_qx[2] = {};  // of y; of q, and of q * (logit - largest_logit)
  for_each_block(p.num_codes, [&](int64_t c, auto full) {
    Codes x, z;
    load_logits<full>(x, logits, p.head_bias, c, p.num_codes);
    gumbel_of_codes(z, c, number, key);
    for (int k = 0; k < 4; ++k) z[k] += x[k];

    const VecF top_x = largest_of(x), top_z = largest_of(z);
    if (any_greater(top_x, splat(largest_logit))) {
      const float top = hmax(top_x);
      const VecF step = splat(largest_logit - top > kLeastLog ? largest_logit - top : kLeastLog);
      const VecF scale = exp(step);
      for (int k = 0; k < 2; ++k) {
        sum_qx[k] = (sum_qx[k] + sum_q[k] * step) * scale;
        sum_q[k] *= scale;
      }
      largest_logit = top;
    }
    if (any_greater(top_z, splat(largest))) {
      const float top = hmax(top_z);
      const VecF scale = exp(splat((largest - top) * p.noise.inverse_tau));
      for (int k = 0; k < 2; ++k) sum[k] *= scale;
      largest = top;
    }
    shift[c / kBlock] = largest;  // of the block's exponentials
    for (int k = 0; k < 4; ++k) {
      const VecF d = x[k] - splat(largest_logit);
      const VecF q = exp(d);
      sum_q[k % 2] += q;
      sum_qx[k % 2] += q * vmax(d, least);
      z[k] = exp((z[k] - splat(largest)) * factor);
      sum[k % 2] += z[k];
    }
    for_each_vector<full>(c, p.num_codes, [&](int k, int64_t at) { storeu(logits + at, z[k]); });
  });

  const float total_q = hsum(sum_q[0] + sum_q[1]), log_sum = log(splat(total_q))[0];
  const float inverse_sum = 1.0f / hsum(sum[0] + sum[1]);
  p.stats[row] = {largest, inverse_sum, largest_logit, log_sum};
  p.kl[row] = hsum(sum_qx[0] + sum_qx[1]) / total_q - log_sum + log_codes;

  for (int64_t i = 0; i < num_blocks; i += kLanes)
    storeu(shift + i, exp((loadu(shift + i) - splat(largest)) * factor) * splat(inverse_sum));
  for_each_block(p.num_codes, [&](int64_t c, auto full) {
    const VecF scale = splat(shift[c / kBlock]);
    for_each_vector<full>(c, p.num_codes, [&](int, int64_t at) { storeu(logits + at, loadu(logits + at) * scale); });
  });
}

// logits become dlogits, dy becomes y
void gradient_row(const BackwardParams& p, const NoiseKey& key, float log_codes, float* logits, float* dy,
                  int64_t row) {
  const uint32_t number = p.noise.first_row + static_cast<uint32_t>(row);
  const RowStats stats = p.stats[row];
  const VecF factor = splat(p.noise.inverse_tau), least = splat(kLeastLog), dkl = splat(p.dkl[row]);
  const VecF entropy = splat(log_codes - p.kl[row]);

  VecF sum[2] = {};  // of y * dy
  for_each_block(p.num_codes, [&](int64_t c, auto full) {
    Codes x, z;
    load_logits<full>(x, logits, p.head_bias, c, p.num_codes);
    gumbel_of_codes(z, c, number, key);
    for_each_vector<full>(c, p.num_codes, [&](int k, int64_t at) {
      const VecF y = exp((x[k] + z[k] - splat(stats.largest)) * factor) * splat(stats.inverse_sum);
      const VecF log_q = vmax(x[k] - splat(stats.largest_logit) - splat(stats.log_sum), least);
      const int64_t rest = p.num_codes - at;
      const VecF product = y * (full || rest >= kLanes ? loadu(dy + at) : load_n(dy + at, static_cast<int>(rest)));
      sum[k % 2] += product;
      storeu(dy + at, y);
      storeu(logits + at, product * factor + dkl * exp(log_q) * (log_q + entropy));
    });
  });

  const VecF mean = splat(hsum(sum[0] + sum[1]) * p.noise.inverse_tau);
  for_each_block(p.num_codes, [&](int64_t c, auto full) {
    for_each_vector<full>(c, p.num_codes,
                          [&](int, int64_t at) { storeu(logits + at, loadu(logits + at) - mean * loadu(dy + at)); });
  });
}

// ---- products

// A matrix [depth, columns] in vectors of columns: vector v of row k at data + (v * depth + k) * kLanes.
struct Packed {
  float* data;
  int64_t depth, columns;  // columns are padded with zeros

  int64_t padded() const { return round_up(columns, kLanes); }
};

// of `from` [columns, depth], transposed
void pack_transposed(const Packed& to, const float* from) {
  parallel_for(to.padded() / kLanes, [&](int64_t v) {
    float* const panel = to.data + v * to.depth * kLanes;
    const int64_t first = v * kLanes, n = to.columns - first < kLanes ? to.columns - first : kLanes;
    int64_t k = 0;
    if (n == kLanes)
      for (; k + kLanes <= to.depth; k += kLanes)
        transpose_block(panel + k * kLanes, kLanes, from + first * to.depth + k, to.depth);
    for (; k < to.depth; ++k)
      for (int64_t i = 0; i < kLanes; ++i) panel[k * kLanes + i] = i < n ? from[(first + i) * to.depth + k] : 0.0f;
  });
}

// of `from` [depth, columns], rows `stride` apart
void pack(const Packed& to, const float* from, int64_t stride) {
  parallel_for(to.padded() / kLanes, [&](int64_t v) {
    float* const panel = to.data + v * to.depth * kLanes;
    const int64_t first = v * kLanes, n = to.columns - first < kLanes ? to.columns - first : kLanes;
    for (int64_t k = 0; k < to.depth; ++k) {
      const float* row = from + k * stride + first;
      storeu(panel + k * kLanes, n == kLanes ? loadu(row) : load_n(row, static_cast<int>(n)));
    }
  });
}

// c[rows, columns of b] (+)= a[rows, depth of b] b; rows of c hold whole vectors
template <bool kAdd>
DF_INLINE void multiply(float* c, int64_t ldc, const float* a, int64_t lda, const Packed& b, int64_t rows) {
  gemm<false, kAdd>(c, ldc, a, lda, b.data, b.depth * kLanes, kLanes, rows, b.padded(), b.depth);
}

// Cuts packed matrices from the workspace.
struct Workspace {
  float* next;
  Packed take(int64_t depth, int64_t columns) {
    const Packed packed{next, depth, columns};
    next += depth * packed.padded();
    return packed;
  }
};

// Sums over the rows of a chunk for codes [begin, end): of the gradients of both weights and of the bias.
void sum_rows(const BackwardParams& p, const Packed& x, int64_t first_row, int64_t num_rows, int64_t begin,
              int64_t end) {
  const bool add = first_row > 0;
  const int64_t codes = end - begin;
  const float* const dlogits = p.dlogits + begin;
  if (p.dhead_weight) {
    float* const to = p.dhead_weight + begin * p.dhead_stride;
    const auto product = add ? gemm<true, true> : gemm<true, false>;
    product(to, p.dhead_stride, dlogits, p.stride, x.data, x.depth * kLanes, kLanes, codes, x.padded(), num_rows);
  }
  if (p.dcodebook) {
    const auto product = add ? gemm<true, true> : gemm<true, false>;
    product(p.dcodebook + begin, p.dcodebook_stride, p.dout + first_row * p.width, p.width, p.y + begin, kLanes,
            p.stride, p.width, round_up(codes, kLanes), num_rows);
  }
  if (p.dhead_bias)
    for (int64_t c = 0; c < codes; c += kLanes) {
      const int n = static_cast<int>(codes - c < kLanes ? codes - c : kLanes);
      VecF sum = add ? load_n(p.dhead_bias + begin + c, n) : VecF{};
      for (int64_t row = 0; row < num_rows; ++row) sum += loadu(dlogits + row * p.stride + c);
      store_n(p.dhead_bias + begin + c, sum, n);
    }
}

}  // namespace

void forward(const ForwardParams& p) {
  Workspace workspace{p.workspace};
  const Packed head = workspace.take(p.num_channels, p.num_codes);
  const Packed codebook = workspace.take(p.num_codes, p.width);
  pack_transposed(head, p.head_weight);
  pack_transposed(codebook, p.codebook);
  // an odd number of vectors apart: rows at one column would fall into the same sets of a cache
  const int64_t stride = padded(p.num_codes) + 16;
  const NoiseKey key = noise_key(p.noise.seed, p.noise.offset);
  const float log_codes = std::log(static_cast<float>(p.num_codes));
  const int64_t shifts = round_up(round_up(p.num_codes, kBlock) / kBlock, kLanes);
  parallel_chunks(p.num_rows, kTileRows, [&](int64_t begin, int64_t end) {
    static thread_local ThreadScratch scratch;
    const FlushSubnormals flush;
    float* const shift = scratch.floats(shifts + kTileRows * stride);
    float* const tile = shift + shifts;
    multiply<false>(tile, stride, p.x + begin * p.x_stride, p.x_stride, head, end - begin);
    for (int64_t row = begin; row < end; ++row) relax_row(p, key, log_codes, tile + (row - begin) * stride, shift, row);
    float* const out = p.out + begin * p.out_stride;
    if (!p.codebook_bias) return multiply<false>(out, p.out_stride, tile, stride, codebook, end - begin);
    for (int64_t row = 0; row < end - begin; ++row)
      __builtin_memcpy(out + row * p.out_stride, p.codebook_bias, static_cast<std::size_t>(p.width) * sizeof(float));
    multiply<true>(out, p.out_stride, tile, stride, codebook, end - begin);
  });
}

void backward(const BackwardParams& p) {
  Workspace workspace{p.workspace};
  const Packed head = workspace.take(p.num_channels, p.num_codes);
  const Packed codebook = workspace.take(p.width, p.num_codes);
  const Packed transposed = p.dx ? workspace.take(p.num_codes, p.num_channels) : Packed{};
  pack_transposed(head, p.head_weight);
  pack(codebook, p.codebook, p.num_codes);
  if (p.dx) pack(transposed, p.head_weight, p.num_channels);
  const NoiseKey key = noise_key(p.noise.seed, p.noise.offset);
  const float log_codes = std::log(static_cast<float>(p.num_codes));
  for (int64_t first = 0; first < p.num_rows; first += p.chunk_rows) {
    const int64_t rows = p.num_rows - first < p.chunk_rows ? p.num_rows - first : p.chunk_rows;
    Workspace rest = workspace;
    const Packed x = rest.take(rows, p.num_channels);
    if (p.dhead_weight) pack(x, p.x + first * p.x_stride, p.x_stride);
    parallel_chunks(rows, kTileRows, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      const int64_t count = end - begin, row = first + begin;
      float* const logits = p.dlogits + begin * p.stride;
      float* const dy = p.y + begin * p.stride;
      multiply<false>(logits, p.stride, p.x + row * p.x_stride, p.x_stride, head, count);
      multiply<false>(dy, p.stride, p.dout + row * p.width, p.width, codebook, count);
      for (int64_t i = 0; i < count; ++i)
        gradient_row(p, key, log_codes, logits + i * p.stride, dy + i * p.stride, row + i);
      if (p.dx) multiply<false>(p.dx + row * p.dx_stride, p.dx_stride, logits, p.stride, transposed, count);
    });
    parallel_chunks(p.num_codes, kTaskCodes, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      sum_rows(p, x, first, rows, begin, end);
    });
  }
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::vq_bottleneck
