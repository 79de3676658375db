// SPDX-License-Identifier: MIT
// A thread and trip: 16 bytes of a row, one call of Philox for each four columns. Floor: one read and one write of the
// tensor; on sm_90 that leaves time for some 270 instructions a piece; it has 80 in float32, 150 in 16 bits.
#include "../core/gumbel.cuh"
#include "../core/rows.cuh"
#include "dropout.h"

namespace dalle_fast::dropout {
namespace {

constexpr int kThreads = 256;
template <Rows kRows>
constexpr int kBlocks = kRows == Rows::kElements ? 6 : 8;  // of a multiprocessor, at once

// `pieces` of a row, `total` of all rows
template <typename T, Rows kRows>
__global__ void __launch_bounds__(kThreads, kBlocks<kRows>)
    drop_pieces(const Params p, const NoiseSource noise, const uint64_t pieces, const uint64_t total) {
  constexpr int kN = kPiece<T>;
  const bool small = total <= UINT32_MAX;  // a division of 64 bits takes 100 instructions
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * kThreads;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const uint64_t row = small ? static_cast<uint32_t>(i) / static_cast<uint32_t>(pieces) : i / pieces;
    const int64_t at = static_cast<int64_t>(i - row * pieces) * kN;
    const int count = static_cast<int>(p.row_len - at < kN ? p.row_len - at : kN);
    float v[kN];
    unpack_piece<T>(v, load_piece<kRows>(static_cast<const T*>(p.x) + row * p.row_stride + at, 0, count));
    DF_UNROLL
    for (int g = 0; g < kN; g += 4) {
      const auto group = static_cast<uint32_t>(static_cast<uint64_t>(at + g) / 4);
      const Philox4 words = noise.words(group, p.row_offset + static_cast<uint32_t>(row));
      DF_UNROLL
      for (int k = 0; k < 4; ++k) v[g + k] = words.word[k] > p.last_dropped ? v[g + k] * p.scale : 0.0f;
    }
    store_piece<kRows>(static_cast<T*>(p.out) + row * p.row_len + at, 0, count, v);
  }
}

template <typename T, Rows kRows>
void launch(const Params& p, void* stream) {
  const uint64_t pieces = static_cast<uint64_t>((p.row_len + kPiece<T> - 1) / kPiece<T>), total = p.num_rows * pieces;
  const uint64_t blocks = (total + kThreads - 1) / kThreads;
  const uint64_t at_once = static_cast<uint64_t>(multiprocessors(p.device.index)) * kBlocks<kRows>;
  const unsigned grid = static_cast<unsigned>(blocks < at_once ? blocks : at_once);
  const NoiseSource noise(p.seed, p.offset);
  DF_LAUNCH((drop_pieces<T, kRows>), grid, kThreads, 0, stream, p, noise, pieces, total);
}

}  // namespace

void drop_cuda(const Params& p, void* stream) {
  if (p.num_rows == 0 || p.row_len == 0) return;  // an empty grid is a launch error
  const DeviceGuard guard(p.device.index);
  with_element_type(p.dtype, [&](auto x) {
    using T = decltype(x);
    const bool whole = rows_are_pieces<T>(p.x, p.row_len, p.row_stride) && rows_are_pieces<T>(p.out, p.row_len, 0);
    whole ? launch<T, Rows::kPieces>(p, stream) : launch<T, Rows::kElements>(p, stream);
  });
}

}  // namespace dalle_fast::dropout
