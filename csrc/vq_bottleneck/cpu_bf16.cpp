// SPDX-License-Identifier: MIT
// The bfloat16 twin of cpu.cpp for processors that multiply bfloat16: logits and dy are float32 sums of products of
// bfloat16; y and dlogits are rounded to it, as operands of the products that follow. A tile's rows become pairs, the
// right-hand factors of the sums over rows, in the pass that completes dlogits; y and dlogits as left-hand factors lie
// in the memory of their float32 rows.
//
// Sums over rows are products with transposed x and dout on the left, so that of the head's weight comes out
// transposed.
#include "../core/bf16_tiles.h"
#include "rows.h"

namespace dalle_fast::vq_bottleneck {
namespace DF_CPU_NAMESPACE {

namespace {

static_assert(kTileRows == kBlock && kTaskCodes % kBlock == 0, "tiles of rows and tasks are whole blocks");

constexpr int64_t kDepth = 256;  // rows of B between two visits of C: they stay in the first-level cache

// A matrix [depth, columns] as pairs, kBlock columns after the other. Both sizes are multiples of kBlock.
struct Packed {
  uint32_t* data;
  int64_t depth, columns;
  int64_t panel;  // words from kBlock columns to the next

  uint32_t* at(int64_t k, int64_t n) const { return data + n / kBlock * panel + k / 2 * kBlock + n % kBlock; }
};

struct Workspace {
  float* next;

  float* floats(int64_t count) {
    next += count;
    return next - count;
  }
  bf16* halves(int64_t count) { return reinterpret_cast<bf16*>(floats(count / 2)); }
  Packed take(int64_t depth, int64_t columns, int64_t spare = 0) {
    const Packed packed{nullptr, padded(depth), padded(columns), padded(depth) / 2 * kBlock + spare};
    return {reinterpret_cast<uint32_t*>(floats(packed.columns / kBlock * packed.panel)), packed.depth, packed.columns,
            packed.panel};
  }
};

// [rows, columns] at `from` -> [kBlock, padded columns], filled with zeros
DF_INLINE void stage(bf16* to, int64_t ldt, const bf16* from, int64_t ldf, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < kBlock; ++r) {
    const int64_t n = r < rows ? columns : 0;
    __builtin_memcpy(to + r * ldt, from + (n ? r * ldf : 0), static_cast<std::size_t>(n) * sizeof(bf16));
    __builtin_memset(to + r * ldt + n, 0, static_cast<std::size_t>(padded(columns) - n) * sizeof(bf16));
  }
}

// f(block of `from`, k, n) for all blocks of B; `transposed`: `from` is [columns, depth], else [depth, columns].
template <typename F>
void for_each_packed(const Packed& to, const bf16* from, int64_t rows, int64_t columns, bool transposed, F&& f) {
  const int64_t deep = to.depth / kBlock;
  parallel_for(to.columns / kBlock * deep, [&](int64_t i) {
    bf16 block[kBlock * kBlock];
    const int64_t k = i % deep * kBlock, n = i / deep * kBlock, row = transposed ? n : k, column = transposed ? k : n;
    const int64_t rest = columns - column;
    stage(block, kBlock, from + row * columns + column, columns, rows - row, rest < kBlock ? rest : kBlock);
    f(block, to.at(k, n));
  });
}

// of `from` [columns, depth], transposed
void pack_transposed(const Packed& to, const void* from, int64_t columns, int64_t depth) {
  for_each_packed(to, static_cast<const bf16*>(from), columns, depth, true, [](const bf16* block, uint32_t* words) {
    transpose_words(words, kBlock, reinterpret_cast<const uint32_t*>(block), kBlock / 2, kBlock, kBlock / 2);
  });
}

// of `from` [depth, columns]
void pack(const Packed& to, const void* from, int64_t depth, int64_t columns) {
  for_each_packed(to, static_cast<const bf16*>(from), depth, columns, false,
                  [](const bf16* block, uint32_t* words) { pair_rows(words, kBlock, block, kBlock, kBlock, kBlock); });
}

// bf16 [kBlock, columns] -> kBlock columns of [columns, ldt]
void transpose_tile(bf16* to, int64_t ldt, const bf16* from, int64_t columns) {
  uint32_t pairs[kBlock / 2 * kBlock];
  for (int64_t c = 0; c < columns; c += kBlock) {
    pair_rows(pairs, kBlock, from + c, columns, kBlock, kBlock);
    transpose_words(reinterpret_cast<uint32_t*>(to + c * ldt), ldt / 2, pairs, kBlock, kBlock / 2, kBlock);
  }
}

// columns [begin, end) of c[rows, columns of b] (+)= a[rows, depth] b
template <bool kAdd>
void multiply(float* c, int64_t ldc, const bf16* a, int64_t lda, const Packed& b, int64_t begin, int64_t end,
              int64_t rows, int64_t depth, bool amx) {
  for (int64_t k = 0; k < depth || k == 0; k += kDepth) {
    const int64_t part = depth - k < kDepth ? depth - k : kDepth;
    const auto product = kAdd || k ? gemm_bf16<true> : gemm_bf16<false>;
    for (int64_t n = begin; n < end; n += kBlock)
      product(c + n, ldc, a + k, lda, b.at(k, n), kBlock, rows, kBlock, part, amx);
  }
}

DF_INLINE void store_rounded(bf16* to, VecF x) {
  const VecH h = round_bf16(x);
  __builtin_memcpy(to, &h, sizeof h);
}

// to[c] = from[c] + bias[c]
DF_INLINE void store_row(bf16* to, const float* from, const float* bias, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) {
    const int count = static_cast<int>(n - c < kLanes ? n - c : kLanes);
    store_n(to + c, loadu(from + c) + (bias ? load_n(bias + c, count) : VecF{}), count);
  }
}

// A thread's part of a tile.
struct Tile {
  bf16 *x, *dout;          // [kTileRows, padded C], [kTileRows, padded D]
  float *logits, *dy;      // [kTileRows, stride]
  float *product, *shift;  // [kTileRows, padded C or D]
  int64_t stride;
};

Tile tile_of(int64_t num_channels, int64_t num_codes, int64_t width) {
  static thread_local ThreadScratch scratch;
  const int64_t channels = padded(num_channels), outputs = padded(width), stride = row_stride(num_codes);
  const int64_t widest = channels > outputs ? channels : outputs;
  Workspace rest{
      scratch.floats(num_shifts(num_codes) + kTileRows * (2 * stride + channels / 2 + outputs / 2 + widest))};
  Tile tile{};
  tile.stride = stride;
  tile.x = rest.halves(kTileRows * channels);
  tile.dout = rest.halves(kTileRows * outputs);
  tile.logits = rest.floats(kTileRows * stride);
  tile.dy = rest.floats(kTileRows * stride);
  tile.product = rest.floats(kTileRows * widest);
  tile.shift = rest.next;
  return tile;
}

// Two rows of dlogits + mean * y and of y, as gradient_row leaves them: dlogits to the front of its own rows, and both
// to their pairs.
DF_INLINE void finish_rows(const Packed& dlogits, const Packed& y, const Tile& tile, int64_t i, int64_t row,
                           const VecF (&mean)[2]) {
  float* const dl = tile.logits + i * tile.stride;
  const float* const from = tile.dy + i * tile.stride;
  for (int64_t c = 0; c < y.columns; c += kLanes) {
    const VecF y0 = loadu(from + c), y1 = loadu(from + tile.stride + c);
    const VecH d0 = round_bf16(loadu(dl + c) - mean[0] * y0),
               d1 = round_bf16(loadu(dl + tile.stride + c) - mean[1] * y1);
    __builtin_memcpy(reinterpret_cast<bf16*>(dl) + c, &d0, sizeof d0);
    __builtin_memcpy(reinterpret_cast<bf16*>(dl + tile.stride) + c, &d1, sizeof d1);
    store_words(dlogits.at(row, c), pair_of(d0, d1));
    store_words(y.at(row, c), pair_of(round_bf16(y0), round_bf16(y1)));
  }
}

}  // namespace

void forward(const ForwardParams& p) {
  const bool amx = cpu_level() >= CpuLevel::kAmx;
  Workspace workspace{p.workspace};
  const Packed head = workspace.take(p.num_channels, p.num_codes);
  const Packed codebook = workspace.take(p.num_codes, p.width);
  pack_transposed(head, p.head_weight, p.num_codes, p.num_channels);
  pack_transposed(codebook, p.codebook, p.width, p.num_codes);
  const NoiseKey key = noise_key(p.noise.seed, p.noise.offset);
  const float log_codes = std::log(static_cast<float>(p.num_codes));
  parallel_chunks(p.num_rows, kTileRows, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    const TileScope tiles(amx);
    const Tile tile = tile_of(p.num_channels, p.num_codes, p.width);
    const int64_t count = end - begin, rows = round_up(count, kBlock / 2);
    stage(tile.x, head.depth, static_cast<const bf16*>(p.x) + begin * p.x_stride, p.x_stride, count, p.num_channels);
    multiply<false>(tile.logits, tile.stride, tile.x, head.depth, head, 0, head.columns, rows, head.depth, amx);
    for (int64_t i = 0; i < count; ++i) {
      float* const logits = tile.logits + i * tile.stride;
      relax_row(p, key, log_codes, logits, tile.shift, begin + i, head.columns,
                [&](int64_t c, VecF y) { store_rounded(reinterpret_cast<bf16*>(logits) + c, y); });
    }
    multiply<false>(tile.product, codebook.columns, reinterpret_cast<const bf16*>(tile.logits), 2 * tile.stride,
                    codebook, 0, codebook.columns, rows, codebook.depth, amx);
    for (int64_t i = 0; i < count; ++i)
      store_row(static_cast<bf16*>(p.out) + (begin + i) * p.out_stride, tile.product + i * codebook.columns,
                p.codebook_bias, p.width);
  });
}

void backward(const BackwardParams& p) {
  const bool amx = cpu_level() >= CpuLevel::kAmx;
  Workspace workspace{p.workspace};
  const Packed head = workspace.take(p.num_channels, p.num_codes);
  const Packed codebook = workspace.take(p.width, p.num_codes);
  const Packed transposed = workspace.take(p.num_codes, p.num_channels);
  pack_transposed(head, p.head_weight, p.num_codes, p.num_channels);
  pack(codebook, p.codebook, p.width, p.num_codes);
  if (p.dx) pack(transposed, p.head_weight, p.num_codes, p.num_channels);
  const int64_t channels = head.depth, outputs = codebook.depth, codes = head.columns, chunk = padded(p.chunk_rows);
  const Packed dlogits = workspace.take(chunk, codes, kBlock / 2);  // not all panels in the same sets of a cache
  const Packed y = workspace.take(chunk, codes, kBlock / 2);
  bf16* const xt = workspace.halves(channels * chunk);                 // [C, chunk]
  bf16* const doutt = workspace.halves(outputs * chunk);               // [D, chunk]
  float* const dhead_transposed = workspace.floats(channels * codes);  // [C, V]
  const NoiseKey key = noise_key(p.noise.seed, p.noise.offset);
  const float log_codes = std::log(static_cast<float>(p.num_codes));
  for (int64_t first = 0; first < p.num_rows; first += chunk) {
    const int64_t num_rows = p.num_rows - first < chunk ? p.num_rows - first : chunk;
    parallel_chunks(num_rows, kTileRows, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      const TileScope tiles(amx);
      const Tile tile = tile_of(p.num_channels, p.num_codes, p.width);
      const int64_t count = end - begin, row = first + begin;
      stage(tile.x, channels, static_cast<const bf16*>(p.x) + row * p.x_stride, p.x_stride, count, p.num_channels);
      stage(tile.dout, outputs, static_cast<const bf16*>(p.dout) + row * p.width, p.width, count, p.width);
      transpose_tile(xt + begin, chunk, tile.x, channels);
      transpose_tile(doutt + begin, chunk, tile.dout, outputs);
      multiply<false>(tile.logits, tile.stride, tile.x, channels, head, 0, codes, kTileRows, channels, amx);
      multiply<false>(tile.dy, tile.stride, tile.dout, outputs, codebook, 0, codes, kTileRows, outputs, amx);
      for (int64_t i = 0; i < kTileRows; i += 2) {  // rows that do not exist are zero
        VecF mean[2] = {};
        for (int64_t k = 0; k < 2 && i + k < count; ++k)
          mean[k] = gradient_row(p, key, log_codes, tile.logits + (i + k) * tile.stride,
                                 tile.dy + (i + k) * tile.stride, row + i + k, codes);
        finish_rows(dlogits, y, tile, i, begin + i, mean);
      }
      if (!p.dx) return;
      multiply<false>(tile.product, channels, reinterpret_cast<const bf16*>(tile.logits), 2 * tile.stride, transposed,
                      0, channels, round_up(count, kBlock / 2), codes, amx);
      for (int64_t i = 0; i < count; ++i)
        store_row(static_cast<bf16*>(p.dx) + (row + i) * p.dx_stride, tile.product + i * channels, nullptr,
                  p.num_channels);
    });
    const bool add = first > 0, last = first + chunk >= p.num_rows;
    const int64_t depth = padded(num_rows);
    parallel_chunks(codes, kTaskCodes, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      const TileScope tiles(amx);
      const auto product = add ? multiply<true> : multiply<false>;
      if (p.dhead_weight) product(dhead_transposed, codes, xt, chunk, dlogits, begin, end, channels, depth, amx);
      if (p.dhead_weight && last)
        transpose_words(reinterpret_cast<uint32_t*>(p.dhead_weight + begin * p.dhead_stride), p.dhead_stride,
                        reinterpret_cast<const uint32_t*>(dhead_transposed + begin), codes, channels, end - begin);
      if (p.dcodebook) product(p.dcodebook, p.dcodebook_stride, doutt, chunk, y, begin, end, outputs, depth, amx);
      if (!p.dhead_bias) return;
      for (int64_t c = begin; c < end && c < p.num_codes; c += kLanes) {
        const int n = static_cast<int>(p.num_codes - c < kLanes ? p.num_codes - c : kLanes);
        VecF sum[2] = {add ? load_n(p.dhead_bias + c, n) : VecF{}, VecF{}};
        for (int64_t k = 0; k < depth; k += 2) {
          VecU pair;
          __builtin_memcpy(&pair, dlogits.at(k, c), sizeof pair);
          sum[0] += bit_cast<VecF>(pair << 16);
          sum[1] += bit_cast<VecF>(pair & 0xffff0000u);
        }
        store_n(p.dhead_bias + c, sum[0] + sum[1], n);
      }
    });
  }
}

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast::vq_bottleneck
