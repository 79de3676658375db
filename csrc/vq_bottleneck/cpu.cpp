// SPDX-License-Identifier: MIT
// Tiles of kTileRows rows, parallel: logits by a product into scratch, relax or gradient row by row while the tile is
// in the cache, then the products that need it. The gradients of the weights are sums over rows: a chunk's dlogits and
// y wait for a second round, parallel over codes. All orders of summation are fixed, whatever the number of threads.
// The right-hand factors of products are packed once a call, a vector of columns after the other.
#include "../core/gemm.h"
#include "rows.h"

namespace dalle_fast::vq_bottleneck {
namespace DF_CPU_NAMESPACE {

namespace {

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
  float* floats(int64_t count) {
    next += count;
    return next - count;
  }
};

// Sums over the rows of a chunk for codes [begin, end): of the gradients of both weights and of the bias.
void sum_rows(const BackwardParams& p, const float* dlogits, const float* y, const Packed& x, int64_t first_row,
              int64_t num_rows, int64_t begin, int64_t end) {
  const bool add = first_row > 0;
  const int64_t codes = end - begin, stride = row_stride(p.num_codes);
  const auto product = add ? gemm<true, true> : gemm<true, false>;
  if (p.dhead_weight)
    product(p.dhead_weight + begin * p.dhead_stride, p.dhead_stride, dlogits + begin, stride, x.data, x.depth * kLanes,
            kLanes, codes, x.padded(), num_rows);
  if (p.dcodebook)
    product(p.dcodebook + begin, p.dcodebook_stride, static_cast<const float*>(p.dout) + first_row * p.width, p.width,
            y + begin, kLanes, stride, p.width, round_up(codes, kLanes), num_rows);
  if (p.dhead_bias)
    for (int64_t c = begin; c < end; c += kLanes) {
      const int n = static_cast<int>(end - c < kLanes ? end - c : kLanes);
      VecF sum = add ? load_n(p.dhead_bias + c, n) : VecF{};
      for (int64_t row = 0; row < num_rows; ++row) sum += loadu(dlogits + row * stride + c);
      store_n(p.dhead_bias + c, sum, n);
    }
}

}  // namespace

void forward(const ForwardParams& p) {
  Workspace workspace{p.workspace};
  const Packed head = workspace.take(p.num_channels, p.num_codes);
  const Packed codebook = workspace.take(p.num_codes, p.width);
  pack_transposed(head, static_cast<const float*>(p.head_weight));
  pack_transposed(codebook, static_cast<const float*>(p.codebook));
  const int64_t stride = row_stride(p.num_codes), shifts = num_shifts(p.num_codes);
  const NoiseKey key = noise_key(p.noise.seed, p.noise.offset);
  const float log_codes = std::log(static_cast<float>(p.num_codes));
  parallel_chunks(p.num_rows, kTileRows, [&](int64_t begin, int64_t end) {
    static thread_local ThreadScratch scratch;
    const FlushSubnormals flush;
    float* const shift = scratch.floats(shifts + kTileRows * stride);
    float* const tile = shift + shifts;
    const float* const x = static_cast<const float*>(p.x) + begin * p.x_stride;
    multiply<false>(tile, stride, x, p.x_stride, head, end - begin);
    for (int64_t row = begin; row < end; ++row) {
      float* const logits = tile + (row - begin) * stride;
      relax_row(p, key, log_codes, logits, shift, row, p.num_codes,
                [&](int64_t at, VecF y) { storeu(logits + at, y); });
    }
    float* const out = static_cast<float*>(p.out) + begin * p.out_stride;
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
  const auto* const head_weight = static_cast<const float*>(p.head_weight);
  pack_transposed(head, head_weight);
  pack(codebook, static_cast<const float*>(p.codebook), p.num_codes);
  if (p.dx) pack(transposed, head_weight, p.num_channels);
  const int64_t stride = row_stride(p.num_codes);
  float* const chunk_dlogits = workspace.floats(p.chunk_rows * stride);
  float* const chunk_y = workspace.floats(p.chunk_rows * stride);
  const NoiseKey key = noise_key(p.noise.seed, p.noise.offset);
  const float log_codes = std::log(static_cast<float>(p.num_codes));
  for (int64_t first = 0; first < p.num_rows; first += p.chunk_rows) {
    const int64_t rows = p.num_rows - first < p.chunk_rows ? p.num_rows - first : p.chunk_rows;
    Workspace rest = workspace;
    const Packed packed_x = rest.take(rows, p.num_channels);
    const float* const x = static_cast<const float*>(p.x) + first * p.x_stride;
    if (p.dhead_weight) pack(packed_x, x, p.x_stride);
    parallel_chunks(rows, kTileRows, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      const int64_t count = end - begin, row = first + begin;
      float* const logits = chunk_dlogits + begin * stride;
      float* const dy = chunk_y + begin * stride;
      multiply<false>(logits, stride, x + begin * p.x_stride, p.x_stride, head, count);
      multiply<false>(dy, stride, static_cast<const float*>(p.dout) + row * p.width, p.width, codebook, count);
      for (int64_t i = 0; i < count; ++i) {
        float *const dl = logits + i * stride, *const y = dy + i * stride;
        const VecF mean = gradient_row(p, key, log_codes, dl, y, row + i, p.num_codes);
        for (int64_t c = 0; c < p.num_codes; c += kLanes) storeu(dl + c, loadu(dl + c) - mean * loadu(y + c));
      }
      float* const dx = static_cast<float*>(p.dx) + row * p.dx_stride;
      if (p.dx) multiply<false>(dx, p.dx_stride, logits, stride, transposed, count);
    });
    parallel_chunks(p.num_codes, kTaskCodes, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      sum_rows(p, chunk_dlogits, chunk_y, packed_x, first, rows, begin, end);
    });
  }
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::vq_bottleneck
