// SPDX-License-Identifier: MIT
// Products of 1-6-9 codes on tensor cores: a code is exactly a tf32 number, so products are exact and sums float32. A
// float32 factor X comes as two tf32 parts.
//
// project, three launches: `prepare` looks for what is not finite in grad (nothing may be added before all of it is
// known, so grad is read twice, the second time from the second-level cache where it fits) and lays X out as
// fragments. `multiply` gives a block 128 rows and a share of the depth; tiles of E, grad and X come through two stages
// of asynchronous copies (one where shared memory is short), codes go back from registers, and no pass over E is
// repeated up to a rank of 128. `finish` sums the shares in order. Floor: E 2 bytes an element read, with a gradient 4
// more (2 from bfloat16) and 2 written.
#include "../core/mma.cuh"
#include "powersgd.h"

namespace dalle_fast::powersgd {
namespace {

constexpr int kThreads = 256;
constexpr float kBeyond = 16.0f;  // the first power of two that is no 1-6-9 number

__device__ __forceinline__ bool is_finite(float x) { return x - x == 0.0f; }

unsigned blocks_for(int64_t items, int64_t a_block) { return static_cast<unsigned>((items + a_block - 1) / a_block); }

// ---- project: the finite check and the layout of X

struct NoGrad {};

// Four pieces a lane, a warp.
template <typename G>
inline constexpr int64_t kCheckUnit = 32 * 4 * PieceOf<G>::kCount;

template <typename G>
__device__ __forceinline__ bool all_finite(const ProjectParams& p, int64_t unit, bool pieces) {
  const int64_t length = p.transposed ? p.rows : p.depth, units = (length + kCheckUnit<G> - 1) / kCheckUnit<G>;
  const int64_t line = unit / units, begin = unit % units * kCheckUnit<G>;
  const G* from = static_cast<const G*>(p.grad) + line * p.grad_stride;
  constexpr int kCount = PieceOf<G>::kCount;
  bool finite = true;
  if (pieces) {
    PieceOf<G> x[4] = {};
    DF_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int64_t i = begin + (k * 32 + threadIdx.x % 32) * kCount;
      if (i < length) x[k] = vector_at<const PieceOf<G>>(from, i);
    }
    DF_UNROLL
    for (int k = 0; k < 4 * kCount; ++k) finite = finite && is_finite(to_float(x[k / kCount].at[k % kCount]));
  } else {
    const int64_t end = begin + kCheckUnit<G> < length ? begin + kCheckUnit<G> : length;
    for (int64_t i = begin + threadIdx.x % 32; i < end; i += 32) finite = finite && is_finite(to_float(from[i]));
  }
  return finite;
}

// Where the depth index of slot t of an instruction's eight lies among 32 (`upper`: slot t + 4): the lanes of a row
// take eight neighbours each where depth is dense.
template <bool kTransposed>
__device__ __forceinline__ int depth_of_slot(int step, int t, int upper) {
  return kTransposed ? step * 8 + t + 4 * upper : t * 8 + step * 2 + upper;
}

// X as fragments [pass, depth / 32, step of 4, pair of tiles, lane, 4]: for each lane slots t and t + 4 of two tiles.
template <bool kTransposed>
__device__ __forceinline__ void lay_out_factor(const ProjectParams& p, const ProjectPlan& plan, int64_t i) {
  const int64_t pairs = plan.tiles / 2, parts = plan.depth_tiles * 2 * 4;
  if (i >= plan.passes * parts * pairs * 32) return;
  const int lane = static_cast<int>(i % 32), t = lane % 4, g = lane / 4;
  const int64_t pair = i / 32 % pairs, part = i / 32 / pairs % parts, pass = i / 32 / pairs / parts;
  Four<float> to;
  for (int j = 0; j < 4; ++j) {
    const int64_t k = part / 4 * 32 + depth_of_slot<kTransposed>(static_cast<int>(part % 4), t, j % 2);
    const int64_t c = pass * plan.width + pair * 16 + j / 2 * 8 + g;
    to.at[j] = 0.0f;
    if (k >= p.depth || c >= p.rank) continue;
    to.at[j] = p.factor_is_codes ? minifloat_decode<true>(static_cast<const uint16_t*>(p.factor)[k * p.rank + c])
                                 : static_cast<const float*>(p.factor)[k * p.rank + c];
  }
  reinterpret_cast<Four<float>*>(p.workspace)[i] = to;
}

template <typename G, bool kTransposed>
__global__ void __launch_bounds__(kThreads)
    prepare(const ProjectParams p, const ProjectPlan plan, int64_t units, unsigned check_blocks, bool pieces) {
  if (blockIdx.x >= check_blocks)
    return lay_out_factor<kTransposed>(
        p, plan, static_cast<int64_t>(blockIdx.x - check_blocks) * kThreads + static_cast<int64_t>(threadIdx.x));
  if constexpr (!std::is_same_v<G, NoGrad>) {
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (unit < units && !all_finite<G>(p, unit, pieces)) p.status[0] = 0;
  }
}

// ---- project: the product

constexpr int kRows = ProjectPlan::kRows, kDepth = ProjectPlan::kDepth;
constexpr int kRowWarps = kRows / 32;  // a warp has 32 rows and 32 of the depth of each tile

// Lines of a tile follow each other; pieces are permuted within one so that what a warp reads at once lies in
// different banks. The permutation is the same four lines on.
template <typename T, bool kTransposed>
__device__ __forceinline__ int place_in_tile(int line, int piece) {
  constexpr int kLength = kTransposed ? kRows : kDepth, kCount = PieceOf<T>::kCount;
  const int change = kTransposed ? line % 4 * 2 : line % 2 * (kCount == 8 ? 4 : 1);
  return line * kLength + (piece ^ change) * kCount;
}

// E or grad: rows [row0, row0 + 128), depth [k0, k0 + 64); zeros outside.
template <typename T, bool kTransposed>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t stride, const ProjectParams& p, int64_t row0,
                                          int64_t k0, bool pieces) {
  constexpr int kLines = kTransposed ? kDepth : kRows, kLength = kTransposed ? kRows : kDepth;
  constexpr int kCount = PieceOf<T>::kCount, kPieces = kLength / kCount, kRound = kThreads / kPieces;
  const int mine = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
  const int64_t line = (kTransposed ? k0 : row0) + mine, begin = (kTransposed ? row0 : k0) + piece * kCount;
  const int64_t lines = (kTransposed ? p.depth : p.rows) - line, length = (kTransposed ? p.rows : p.depth) - begin;
  const T* source = from + line * stride + begin;
  T* to = tile + place_in_tile<T, kTransposed>(mine, piece);
  if (pieces) {
    DF_UNROLL
    for (int i = 0; i < kLines; i += kRound, source += kRound * stride, to += kRound * kLength) {
      const bool there = i < lines && length > 0;
      DF_COPY_ASYNC_16(to, there ? source : from, there);
    }
  } else {
    DF_NO_UNROLL
    for (int i = 0; i < kLines; i += kRound, source += kRound * stride, to += kRound * kLength) DF_NO_UNROLL
    for (int j = 0; j < kCount; ++j) to[j] = i < lines && j < length ? source[j] : T{};
  }
}

template <int kCount_>
struct alignas(kCount_ * 4) Words {
  static constexpr int kCount = kCount_;
  uint32_t word[kCount];
};

// A thread's 32 of the 32 x 32 of its warp.
//   plain       rows g + 8 j, depth 8 t + e       at [j][e]
//   transposed  depth t + 4 q, rows 4 g + e       at [q][e]
template <typename T, bool kTransposed>
struct Share {
  static constexpr int kLines = kTransposed ? 8 : 4, kRun = 32 / kLines;
  static constexpr int kNext = kTransposed ? 4 : 8;  // from line to line
  uint32_t word[32 * sizeof(T) / 4];

  __device__ __forceinline__ T get(int i) const {
    T x;
    if constexpr (sizeof(T) == 4) {
      memcpy(&x, &word[i], 4);
    } else {
      const auto half = static_cast<uint16_t>(word[i / 2] >> i % 2 * 16);
      memcpy(&x, &half, 2);
    }
    return x;
  }

  static __device__ __forceinline__ int line() {  // the first, in the tile
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    return kTransposed ? warp / kRowWarps * 32 + lane % 4 : warp % kRowWarps * 32 + lane / 4;
  }
  static __device__ __forceinline__ int begin() {  // in the lines
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    return kTransposed ? warp % kRowWarps * 32 + lane / 4 * 4 : warp / kRowWarps * 32 + lane % 4 * 8;
  }
  static __device__ __forceinline__ int address(int i) {  // in the tile
    constexpr int kLength = kTransposed ? kRows : kDepth, kCount = PieceOf<T>::kCount;
    const int place = begin() + i % kRun;
    return place_in_tile<T, kTransposed>(line(), place / kCount) + place % kCount + i / kRun * kNext * kLength;
  }
  // What steps 2 half and 2 half + 1 need and the half before did not bring.
  __device__ __forceinline__ void load(const T* tile, int half) {
    constexpr int kCount = PieceOf<T>::kCount < kRun ? PieceOf<T>::kCount : kRun;  // at once
    using Run = Words<kCount * sizeof(T) / 4>;
    DF_UNROLL
    for (int i = 0; i < 32; i += kCount) {
      if ((kTransposed ? i / 4 : i % 8) / 4 != half) continue;
      const Run run = *reinterpret_cast<const Run*>(tile + address(i));
      DF_UNROLL
      for (int j = 0; j < run.kCount; ++j) word[i * sizeof(T) / 4 + j] = run.word[j];
    }
  }
  // Back to where it came from; `tile` is the place for a detour where pieces are not aligned.
  __device__ __forceinline__ void store(T* to, int64_t stride, int64_t line0, int64_t begin0, int64_t lines,
                                        int64_t length, T* tile, bool pieces) const {
    using Run = Words<kRun * sizeof(T) / 4>;
    line0 += line();
    begin0 += begin();
    const int64_t first = line0 * stride + begin0;
    DF_UNROLL
    for (int i = 0; i < kLines; ++i) {
      Run run;
      DF_UNROLL
      for (int j = 0; j < run.kCount; ++j) run.word[j] = word[i * run.kCount + j];
      if (!pieces)
        *reinterpret_cast<Run*>(tile + address(i * kRun)) = run;
      else if (line0 + i * kNext < lines && begin0 < length)
        vector_at<Run>(to, first + i * kNext * stride) = run;
    }
    if (pieces) return;
    DF_NO_UNROLL
    for (int i = 0; i < 32; ++i)
      if (line0 + i / kRun * kNext < lines && begin0 + i % kRun < length)
        to[first + i / kRun * kNext * stride + i % kRun] = tile[address(i)];
  }
  // Where element `i` of a step's A fragments lies: four of 16 rows, four of the others.
  static __device__ __forceinline__ constexpr int place(int step, int i) {
    return kTransposed ? (step * 2 + i / 2 % 2) * 4 + i / 4 * 2 + i % 2
                       : (i / 4 * 2 + i % 2) * 8 + step * 2 + i / 2 % 2;
  }
};

// A thread's eight numbers of E for one step, after the gradient where `add`. Numbers of the format take a short way;
// an Inf, NaN or overflow sends all the long one, from their codes in `tile`. Returns whether that was so.
template <bool kTransposed, typename G>
__device__ __forceinline__ bool take_numbers(float (&value)[8], Share<uint16_t, kTransposed>& code,
                                             const Share<G, kTransposed>& grad, const uint16_t* tile, int step,
                                             float factor, bool add) {
  constexpr bool kAdd = !std::is_same_v<G, NoGrad>;
  // two codes make a word: neighbours in depth, or in rows
  const auto for_each = [&](auto f) {
    DF_UNROLL
    for (int j = 0; j < 8; ++j) {
      const int i = kTransposed ? j : j / 4 * 4 + j % 4 / 2 + j % 2 * 2;
      f(i, code.place(step, i));
    }
  };
  const auto set = [&](int at, uint32_t bits) {
    uint32_t& word = code.word[at / 2];
    word = at % 2 ? (word & 0xffffu) | bits << 16 : (word & 0xffff0000u) | bits;
  };
  bool rare = false;
  for_each([&](int i, int at) {
    value[i] = minifloat_unpack<true>(code.get(at));
    rare = rare || !(fabsf(value[i]) < kBeyond);
  });
  if constexpr (kAdd) {
    if (add) {
      for_each([&](int i, int at) {
        const float sum = value[i] + to_float(grad.get(at)) * factor;
        const float rounded = minifloat_round<true>(sum);
        const uint32_t sign = float_bits(sum) & 0x80000000u;
        set(at, sign >> 16 | minifloat_pack<true>(rounded));
        value[i] = bits_float(sign | float_bits(rounded));
        rare = rare || !(rounded < kBeyond);
      });
    }
  }
  if (!rare) return false;
  for_each([&](int i, int at) {
    value[i] = minifloat_decode<true>(tile[code.address(at)]);
    if constexpr (kAdd) {
      if (add) {
        const uint16_t sum = minifloat_encode<true>(value[i] + to_float(grad.get(at)) * factor);
        set(at, sum);
        value[i] = minifloat_decode<true>(sum);
      }
    }
  });
  return true;
}

// sum[m] += A[m] B for one step; kLow: by the lower part of B.
template <int kTiles, bool kLow>
__device__ __forceinline__ void multiply_step(float (*sum)[kTiles][4], const float* a, const float* fragments) {
  uint32_t left[8];
  DF_UNROLL
  for (int i = 0; i < 8; ++i) left[i] = float_bits(a[i]);
  DF_UNROLL
  for (int n = 0; n < kTiles; n += 2) {
    const Four<float> x = reinterpret_cast<const Four<float>*>(fragments)[n / 2 * 32 + threadIdx.x % 32];
    uint32_t right[4];
    DF_UNROLL
    for (int j = 0; j < 4; ++j) {  // cut off, not rounded: the upper part is the word as it is, and saves a register
      const uint32_t word = float_bits(x.at[j]);
      right[j] = kLow ? float_bits(x.at[j] - bits_float(word & 0xffffe000u)) : word;
    }
    DF_UNROLL
    for (int i = 0; i < 4; ++i) mma_16x8x8_tf32(sum[i % 2][n + i / 2], left + i % 2 * 4, right + i / 2 * 2);
  }
}

// Shared memory of `multiply`: stages of a tile of E, of the gradient and of X, and at the end half of the sums. One
// stage where two do not fit: copies and products then take turns in a block.
template <typename G, int kTiles>
struct MultiplyShared {
  static constexpr bool kAdd = !std::is_same_v<G, NoGrad>;
  static constexpr int kTile = kRows * kDepth, kFactor = kDepth * kTiles * 8;                          // elements
  static constexpr int kStage = kTile * (2 + (kAdd ? static_cast<int>(sizeof(G)) : 0)) + kFactor * 4;  // bytes
  static constexpr int kSums = kRowWarps * 32 * 8 * kTiles * 4;

  static constexpr std::size_t bytes(int stages) { return stages * kStage > kSums ? stages * kStage : kSums; }
  static constexpr int stages(std::size_t limit) { return bytes(2) <= limit ? 2 : 1; }
};

template <typename G, bool kTransposed, int kTiles>
__global__ void __launch_bounds__(kThreads) multiply(const ProjectParams p, const ProjectPlan plan, int64_t pass,
                                                     bool error_pieces, bool grad_pieces, bool one_stage) {
  using Shared = MultiplyShared<G, kTiles>;
  constexpr bool kAdd = Shared::kAdd;
  constexpr int kTile = Shared::kTile, kFactor = Shared::kFactor, kStage = Shared::kStage;
  DF_DYNAMIC_SHARED(unsigned char, shared);
  const int row_blocks = static_cast<int>(plan.row_blocks), per_split = static_cast<int>(plan.per_split);
  const int row_block = static_cast<int>(blockIdx.x) % row_blocks, split = static_cast<int>(blockIdx.x) / row_blocks;
  const int64_t row0 = static_cast<int64_t>(row_block) * kRows;
  const int first = split * per_split, rest = static_cast<int>(plan.depth_tiles) - first;
  const int tiles = rest < per_split ? rest : per_split;
  const bool add = kAdd && p.status[0] != 0;
  const auto load = [&](int i) {
    unsigned char* stage = shared + (one_stage ? 0 : i % 2 * kStage);
    const int64_t k0 = static_cast<int64_t>(first + i) * kDepth;
    load_tile<uint16_t, kTransposed>(reinterpret_cast<uint16_t*>(stage), p.error, p.error_stride, p, row0, k0,
                                     error_pieces);
    if constexpr (kAdd)
      load_tile<G, kTransposed>(reinterpret_cast<G*>(stage + kTile * 2), static_cast<const G*>(p.grad), p.grad_stride,
                                p, row0, k0, grad_pieces);
    float* factor = reinterpret_cast<float*>(stage + kStage) - kFactor;
    const float* from = p.workspace + (pass * plan.depth_tiles + first + i) * kFactor;
    for (int j = static_cast<int>(threadIdx.x) * 4; j < kFactor; j += kThreads * 4)
      DF_COPY_ASYNC_16(factor + j, from + j, true);
    copy_async_commit();
  };
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float sum[2][kTiles][4] = {};
  bool finite = true;
  if (!one_stage) load(0);
  for (int i = 0; i < tiles; ++i) {
    copy_async_wait<0>();
    __syncthreads();  // tile i is here, unless it has to share a stage, and nobody reads tile i - 1 any more
    if (one_stage || i + 1 < tiles) load(one_stage ? i : i + 1);
    if (one_stage) {
      copy_async_wait<0>();
      __syncthreads();
    }
    unsigned char* stage = shared + (one_stage ? 0 : i % 2 * kStage);
    const float* fragments = reinterpret_cast<const float*>(stage + kStage) - kFactor + warp / kRowWarps * kFactor / 2;
    Share<uint16_t, kTransposed> code;
    Share<G, kTransposed> grad;
    DF_UNROLL
    for (int step = 0; step < 4; ++step) {
      if (step % 2 == 0) {
        code.load(reinterpret_cast<const uint16_t*>(stage), step / 2);
        if constexpr (kAdd) grad.load(reinterpret_cast<const G*>(stage + kTile * 2), step / 2);
      }
      float value[8];
      const bool rare = take_numbers<kTransposed, G>(value, code, grad, reinterpret_cast<const uint16_t*>(stage), step,
                                                     p.inverse_grad_scale, add);
      const float* right = fragments + step * kFactor / 8;
      multiply_step<kTiles, false>(sum, value, right);
      if (rare) {
        DF_UNROLL
        for (int j = 0; j < 8; ++j) {  // Inf times the lower part may be NaN
          finite = finite && is_finite(value[j]);
          value[j] = is_finite(value[j]) ? value[j] : 0.0f;
        }
      }
      if (!p.factor_is_codes) multiply_step<kTiles, true>(sum, value, right);
    }
    const int64_t k0 = static_cast<int64_t>(first + i) * kDepth;
    if (kAdd && add)
      code.store(p.error, p.error_stride, kTransposed ? k0 : row0, kTransposed ? row0 : k0,
                 kTransposed ? p.depth : p.rows, kTransposed ? p.rows : p.depth, reinterpret_cast<uint16_t*>(stage),
                 error_pieces);
  }
  if (!finite) p.status[1] = 0;
  // the two halves of the depth meet
  float* const half = reinterpret_cast<float*>(shared) + warp % kRowWarps * kTiles * 8 * 32 + lane;
  __syncthreads();
  if (warp >= kRowWarps) {
    DF_UNROLL
    for (int j = 0; j < 8 * kTiles; ++j) half[j * 32] = sum[j / 4 / kTiles][j / 4 % kTiles][j % 4];
  }
  __syncthreads();
  if (warp >= kRowWarps) return;
  struct alignas(8) Pair {
    float at[2];
  };
  float* const out = p.workspace + plan.factor_floats + (pass * plan.splits + split) * p.rows * kTiles * 8;
  DF_UNROLL
  for (int i = 0; i < 4; ++i) {  // 16 rows i / 2, the upper eight where i is odd
    const int64_t row = row0 + warp * 32 + (kTransposed ? lane / 4 * 4 + i : lane / 4 + i * 8);
    if (row >= p.rows) continue;
    DF_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const float* mine = sum[i / 2][n] + i % 2 * 2;
      const float* other = half + ((i / 2 * kTiles + n) * 4 + i % 2 * 2) * 32;
      const Pair pair{{mine[0] + other[0], mine[1] + other[32]}};
      *reinterpret_cast<Pair*>(out + row * kTiles * 8 + n * 8 + lane % 4 * 2) = pair;
    }
  }
}

__global__ void __launch_bounds__(kThreads) finish(const ProjectParams p, const ProjectPlan plan) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.rows * p.rank) return;
  const int64_t row = i / p.rank, c = i % p.rank, width = plan.width, one = p.rows * width;
  const float* from = p.workspace + plan.factor_floats + c / width * plan.splits * one + row * width + c % width;
  float sum = 0.0f;
  for (int64_t split = 0; split < plan.splits; ++split) sum += from[split * one];
  uint16_t code = minifloat_encode<true>(sum * p.scale);
  if ((code & 0x7fffu) >= Minifloat<true>::kInf) p.status[2] = 0;
  if ((code & 0x7fffu) == Minifloat<true>::kInf) code = static_cast<uint16_t>(code - 1);
  p.out[i] = code;
}

template <typename G, bool kTransposed>
void prepare_with(const ProjectParams& p, const ProjectPlan& plan, void* stream) {
  int64_t units = 0;
  bool pieces = false;
  if constexpr (!std::is_same_v<G, NoGrad>) {
    const int64_t lines = p.transposed ? p.depth : p.rows, length = p.transposed ? p.rows : p.depth;
    units = lines * ((length + kCheckUnit<G> - 1) / kCheckUnit<G>);
    pieces = has_pieces<G>(p.grad, p.grad_stride, length);
  }
  const unsigned check = blocks_for(units, kThreads / 32), all = check + blocks_for(plan.factor_floats / 4, kThreads);
  DF_LAUNCH((prepare<G, kTransposed>), all, kThreads, 0, stream, p, plan, units, check, pieces);
}

template <typename G, bool kTransposed, int kTiles>
void multiply_with(const ProjectParams& p, const ProjectPlan& plan, int64_t pass, void* stream) {
  using Shared = MultiplyShared<G, kTiles>;
  static_assert(fits_every_device([](std::size_t limit) constexpr { return Shared::bytes(Shared::stages(limit)); }),
                "shared memory of a device");
  const int64_t length = p.transposed ? p.rows : p.depth;
  const bool error_pieces = has_pieces<uint16_t>(p.error, p.error_stride, length);
  bool grad_pieces = false;
  if constexpr (Shared::kAdd) grad_pieces = has_pieces<G>(p.grad, p.grad_stride, length);
  const int stages = Shared::stages(shared_limit(p.device.index));
  const std::size_t bytes = Shared::bytes(stages);
  allow_dynamic_shared(multiply<G, kTransposed, kTiles>, bytes);
  DF_LAUNCH((multiply<G, kTransposed, kTiles>), static_cast<unsigned>(plan.row_blocks * plan.splits), kThreads, bytes,
            stream, p, plan, pass, error_pieces, grad_pieces, stages == 1);
}

template <bool kTransposed>
void project_with(const ProjectParams& p, void* stream) {
  const ProjectPlan plan(p.rows, p.depth, p.rank);
  const auto pass = [&](auto grad, int64_t number) {
    using G = decltype(grad);
    if (number == 0) prepare_with<G, kTransposed>(p, plan, stream);
    if (plan.tiles == 4) return multiply_with<G, kTransposed, 4>(p, plan, number, stream);
    if (plan.tiles == 14) return multiply_with<G, kTransposed, 14>(p, plan, number, stream);
    multiply_with<G, kTransposed, 16>(p, plan, number, stream);
  };
  for (int64_t number = 0; number < plan.passes; ++number) {
    if (number > 0 || !p.grad)
      pass(NoGrad{}, number);
    else
      p.grad_is_bf16 ? pass(bf16_t{}, number) : pass(float{}, number);
  }
  DF_LAUNCH(finish, blocks_for(p.rows * p.rank, kThreads), kThreads, 0, stream, p, plan);
}

}  // namespace

void project_cuda(const ProjectParams& p, void* stream) {
  if (p.rows == 0 || p.rank == 0) return;
  const DeviceGuard guard(p.device.index);
  p.transposed ? project_with<true>(p, stream) : project_with<false>(p, stream);
}

}  // namespace dalle_fast::powersgd
