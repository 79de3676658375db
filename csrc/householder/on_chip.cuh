// SPDX-License-Identifier: MIT
// Blocked Householder QR of a matrix in the shared memory of a block, or of a cluster whose blocks share its rows.
//
// Panels of 16 columns. A thread has one row of the panel in registers; a column costs one reduction over the rows
// and two barriers. The panel's reflections are then applied to the columns behind it at once, A -= V W' with
// W = V^T [V A] and W' from W by substitution (the triangle of V^T V with 1 / tau on the diagonal is the inverse of the
// T of LAPACK's I - V T V^T, and tau = 2 / v^T v), so that these are read twice a panel and not twice a column. V stays
// where the panel was; going back through the panels turns it into Q. R is dropped. Products are tensor-core products
// of float32 split in two tf32 parts, summed outside the tensor cores, which would truncate. Blocks of a cluster put
// their sums into each other's memory (columns of a panel) or read them there (W), and add them in the order of ranks.
//
// Memory: [rows + 16, columns] floats (an odd number of 16 columns), the last 16 rows for W, and 3 KiB: 496 x 112 a
// block fill an H100's 227 KiB to the last byte. Columns are swizzled so that fragments, rows and columns are all read
// without bank conflicts. A warp owns 32 rows wherever it can, so that most barriers are a panel's.
//
// Cycles for 496 x 112 a block, estimated from the instructions (4 a cycle): 112 columns of about 1000 (720 of issue in
// 16 warps, half of them shuffles and the reflection's divisions, and two barriers' latency); V^T [V A] 42 k, A - V W'
// 32 k, substitution 8 k; loading, scaling and storing 30 k: 225 k. In a cluster of 4, 500 more a column for its
// barrier and the remote stores and 2 k more a panel, twice, for reading W: 310 k. At 1.75 GHz 0.13 and 0.18 ms, so
// that 256 matrices of 496 x 112 and 128 of 1984 x 112 take two and four waves on 132 multiprocessors, about 1 ms.
// Floors of the former: 36 k by the tensor cores' full rate (three tf32 products), 24 k by memory (444 kB at a
// multiprocessor's share of 4.3 TB/s).
#pragma once

#include <utility>

#include "../core/mma.cuh"
#include "householder.h"

namespace dalle_fast::householder {
namespace {

constexpr int kTable = 32;  // batches of a launch: the argument stays below 4 KiB
using Table = LaunchTable<Batch, kTable>;
static_assert(sizeof(Table) <= 4000, "kernel arguments");

constexpr int kPanel = 16;
constexpr int kMaxWarps = 16, kMaxThreads = 32 * kMaxWarps;
constexpr int kMaxCluster = 8;
constexpr int kTotals = 2 * kPanel;  // inner products of a column with its panel, and the pivot row

// What a block of a cluster holds: multiples of 16, zeros where the matrix has nothing.
struct Share {
  int rows, columns, stride;

  __host__ __device__ Share(const Batch& b, unsigned cluster)
      : rows(round_up((b.rows + cluster - 1) / cluster, kPanel)),
        columns(round_up(b.columns, kPanel)),
        stride(columns | kPanel) {}
  std::size_t floats() const {
    return static_cast<std::size_t>(rows + kPanel) * stride + kMaxWarps * kPanel + 2 * kMaxCluster * kTotals;
  }
  int threads() const { return round_up(rows > columns ? rows : columns, 32); }

 private:
  static __host__ __device__ int round_up(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }
};

template <bool kCluster, typename T>
__device__ __forceinline__ T* in_block(T* mine, unsigned rank) {
  return kCluster ? remote_shared(mine, rank) : mine;
}

struct alignas(8) Two {
  float at[2];
};

// The larger magnitude; NaN stays.
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

__device__ __forceinline__ float finite_scale(float largest) {
  return largest < INFINITY ? column_scale(largest) : NAN;
}

template <bool kCluster>
struct Matrix {
  float* a;       // [rows + kPanel, stride], swizzled; the last rows are W
  float* part;    // [kMaxWarps, kPanel]: inner products of warps; V^T V with tau on its diagonal
  float* totals;  // [2, kMaxCluster, kTotals] by parity of the column and rank of the block
  int rows, columns, stride, warps;
  int first_row;  // in the whole matrix
  unsigned rank, ranks;
  int warp, lane;

  __device__ Matrix(float* memory, const Batch& b) {
    rank = kCluster ? cluster_rank() : 0;
    ranks = kCluster ? cluster_size() : 1;
    const Share share(b, ranks);
    rows = share.rows;
    columns = share.columns;
    warps = (rows + 31) / 32;
    first_row = static_cast<int>(rank) * rows;
    stride = share.stride;
    a = memory;
    part = a + (rows + kPanel) * stride;
    totals = part + kMaxWarps * kPanel;
    warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
  }

  // With an odd number of 16 columns a row, eight rows at four columns each, and four rows at eight, lie in different
  // banks. Groups of four columns stay whole, groups of sixteen stay where they are.
  __device__ __forceinline__ int at(int row, int column) const {
    return row * stride + (column ^ ((row & 2) << 2 | (row & 4)));
  }
  // The rows of this warp: nobody else writes them.
  __device__ __forceinline__ int begin() const { return 32 * warp; }
  __device__ __forceinline__ int end() const { return 32 * warp + 32 < rows ? 32 * warp + 32 : rows; }
  // the first row of this block that is not above `row` of the whole matrix
  __device__ __forceinline__ int from(int row) const {
    const int own = row - first_row;
    return own < 0 ? 0 : own < rows ? own : rows;
  }

  // P + eps I; lanes along the dimension that is closer together
  template <bool kCodes>
  __device__ void load(const Batch& b, int64_t index, float eps) const {
    const auto eight = [&](int row, int column, int down, int right) {
      float x[8];
      DF_UNROLL
      for (int k = 0; k < 8; ++k) {
        const int64_t i = first_row + row + k * down, c = column + k * right;
        const int64_t from = index * b.stride + i * b.row_stride + c * b.column_stride;
        x[k] = 0.0f;
        if (i < b.rows && c < b.columns)
          x[k] = (kCodes ? minifloat_decode<true>(static_cast<const uint16_t*>(b.p)[from])
                         : static_cast<const float*>(b.p)[from]) +
                 (i == c ? eps : 0.0f);
      }
      DF_UNROLL
      for (int k = 0; k < 8; ++k) a[at(row + k * down, column + k * right)] = x[k];
    };
    if (b.row_stride < b.column_stride) {
      if (begin() + lane < end())
        for (int c = 0; c < columns; c += 8) eight(begin() + lane, c, 0, 1);
    } else {
      for (int c = lane; c < columns; c += 32)
        for (int row = begin(); row < end(); row += 8) eight(row, c, 1, 0);
    }
    __syncwarp();
  }

  // Columns times powers of two; all NaN if anything is not finite.
  __device__ void scale_columns() const {
    for (int c = lane; c < columns && warp < warps; c += 32) {
      float largest = 0.0f;
      for (int row = begin(); row < end(); ++row) largest = larger(largest, fabsf(a[at(row, c)]));
      a[at(rows + warp, c)] = largest;
    }
    __syncthreads();
    const int mine = static_cast<int>(threadIdx.x);  // column
    if (mine < columns) {
      float largest = 0.0f;
      for (int w = 0; w < warps; ++w) largest = larger(largest, a[at(rows + w, mine)]);
      a[at(rows, mine)] = largest;
    }
    if (kCluster) sync_cluster();
    if (mine < columns) {
      float largest = 0.0f;
      DF_NO_UNROLL
      for (unsigned r = 0; r < ranks; ++r) largest = larger(largest, *in_block<kCluster>(a + at(rows, mine), r));
      a[at(rows + 1, mine)] = finite_scale(largest);
    }
    __syncthreads();
    bool bad = false;
    for (int c = lane; c < columns; c += 32) bad = bad || a[at(rows + 1, c)] != a[at(rows + 1, c)];
    bad = __any_sync(0xffffffffu, bad);
    for (int c = lane; c < columns; c += 32) {
      const float factor = bad ? NAN : a[at(rows + 1, c)];
      for (int row = begin(); row < end(); ++row) a[at(row, c)] *= factor;
    }
    __syncwarp();
  }

  // Sums over the lanes of kCount values each; the k-th lands in the lanes from k * 32 / kCount.
  template <int kCount, int kBit = 16>
  __device__ __forceinline__ float sum_of_lanes(const float* values) const {
    if constexpr (kCount == 1) {
      float sum = values[0];
      DF_UNROLL
      for (int bit = kBit; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
      return sum;
    } else {
      constexpr int kHalf = kCount / 2;
      const bool upper = lane & kBit;
      float half[kHalf];
      DF_UNROLL
      for (int k = 0; k < kHalf; ++k) {
        const float sent = upper ? values[k] : values[k + kHalf];
        half[k] = (upper ? values[k + kHalf] : values[k]) + __shfl_xor_sync(0xffffffffu, sent, kBit);
      }
      return sum_of_lanes<kHalf, kBit / 2>(half);
    }
  }

  // Column kColumn of the panel from j0: its reflection, applied to the columns of the panel behind it. x is this
  // thread's row of the panel, the i-th of the whole matrix, and becomes a row of V.
  template <int kColumn>
  __device__ __forceinline__ void reflect_panel(float* x, int i, int j0) const {
    constexpr int kLeft = kPanel - kColumn, kPower = kLeft > 8 ? 16 : kLeft > 4 ? 8 : kLeft > 2 ? 4 : kLeft;
    const bool below = i > j0 + kColumn, here = i == j0 + kColumn;
    const unsigned owner = static_cast<unsigned>(j0 / rows);  // of the pivot row
    float* const sums = totals + kColumn % 2 * kMaxCluster * kTotals;

    float dot[kPower];
    DF_UNROLL
    for (int k = 0; k < kPower; ++k) dot[k] = below && k < kLeft ? x[kColumn] * x[kColumn + k] : 0.0f;
    const float of_warp = sum_of_lanes<kPower>(dot);
    constexpr int kLanes = 32 / kPower;
    if (lane % kLanes == 0 && lane / kLanes < kLeft && warp < warps)
      part[warp * kPanel + kColumn + lane / kLanes] = of_warp;
    if (here) {
      DF_UNROLL
      for (int c = kColumn; c < kPanel; ++c) sums[owner * kTotals + kPanel + c] = x[c];
    }
    __syncthreads();
    DF_NO_UNROLL
    for (unsigned to = warp; to < ranks; to += blockDim.x / 32) {  // this block's sums to each block
      float value = 0.0f;
      DF_UNROLL
      for (int k = 0; k < kMaxWarps; k += 2) {
        const int w = k + lane / kPanel;
        if (w < warps) value += part[w * kPanel + lane % kPanel];
      }
      value += __shfl_xor_sync(0xffffffffu, value, 16);
      if (lane >= kPanel) value = sums[owner * kTotals + lane];
      if (lane < kPanel || (kCluster && rank == owner)) in_block<kCluster>(sums, to)[rank * kTotals + lane] = value;
    }
    kCluster ? sync_cluster() : __syncthreads();
    float value = sums[(lane < kPanel ? 0 : owner) * kTotals + lane];  // pivot row in the upper lanes
    DF_UNROLL
    for (unsigned r = 1; r < (kCluster ? kMaxCluster : 1); ++r)
      if (r < ranks && lane < kPanel) value += sums[r * kTotals + lane];
    const Reflection h =
        reflection_of(__shfl_sync(0xffffffffu, value, kPanel + kColumn), __shfl_sync(0xffffffffu, value, kColumn));
    const float weight = h.tau * (__shfl_xor_sync(0xffffffffu, value, kPanel) + value * h.inverse);
    const float v = below ? x[kColumn] * h.inverse : here && h.tau != 0.0f ? 1.0f : 0.0f;
    x[kColumn] = v;
    DF_UNROLL
    for (int c = kColumn + 1; c < kPanel; ++c) x[c] -= v * __shfl_sync(0xffffffffu, weight, c);
  }

  template <int... kColumns>
  __device__ __forceinline__ void reflect_panel(float* x, int i, int j0,
                                                std::integer_sequence<int, kColumns...>) const {
    (reflect_panel<kColumns>(x, i, j0), ...);
  }

  __device__ void factor_panel(int j0) const {
    const int row = static_cast<int>(threadIdx.x);
    float x[kPanel] = {};
    if (row < rows) {
      DF_UNROLL
      for (int k = 0; k < kPanel; k += 4) {
        const Vector16 four = *reinterpret_cast<const Vector16*>(a + at(row, j0 + k));
        for (int c = 0; c < 4; ++c) x[k + c] = bits_float(four.word[c]);
      }
    }
    reflect_panel(x, row < rows ? first_row + row : -1, j0, std::make_integer_sequence<int, kPanel>());
    if (row < rows) {
      DF_UNROLL
      for (int k = 0; k < kPanel; k += 4) {
        Vector16 four;
        for (int c = 0; c < 4; ++c) four.word[c] = float_bits(x[k + c]);
        *reinterpret_cast<Vector16*>(a + at(row, j0 + k)) = four;
      }
    }
  }

  // sum[n] = V^T A over rows [begin, end), a multiple of 16, for the eight columns from column + 8 n
  __device__ __forceinline__ void inner_products(float (*sum)[4], int j0, int column, int begin, int end) const {
    const int g = lane / 4, t = lane % 4;
    const float *v[2][2], *x[2][2];  // of rows t and t + 4, columns g and g + 8
    DF_UNROLL
    for (int i = 0; i < 4; ++i) {
      v[i / 2][i % 2] = a + at(begin + t + i / 2 * 4, j0 + g + i % 2 * 8);
      x[i / 2][i % 2] = a + at(begin + t + i / 2 * 4, column + g + i % 2 * 8);
    }
    DF_NO_UNROLL
    for (int row = begin; row < end; row += 16) {
      float c[2][4] = {};
      DF_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t left[2][4];
        DF_UNROLL
        for (int i = 0; i < 4; ++i) split_tf32(left[0][i], left[1][i], *v[i / 2][i % 2]);
        DF_UNROLL
        for (int n = 0; n < 2; ++n) {
          uint32_t right[2][2];
          DF_UNROLL
          for (int i = 0; i < 2; ++i) split_tf32(right[0][i], right[1][i], *x[i][n]);
          multiply_split(c[n], left, right);
        }
        DF_UNROLL
        for (int i = 0; i < 4; ++i) {
          v[i / 2][i % 2] += 8 * stride;
          x[i / 2][i % 2] += 8 * stride;
        }
      }
      DF_UNROLL
      for (int i = 0; i < 8; ++i) sum[i / 4][i % 4] += c[i / 4][i % 4];
    }
  }

  // W = V^T [V A] of this block, for the columns from j0. A task is sixteen columns and a part of the rows.
  __device__ void gather(int j0) const {
    const int pairs = (columns - j0) / kPanel, from_row = from(j0), steps = (rows - from_row) / 16;
    int parts = 1 + columns / kPanel / pairs;  // all but the first wait in W's memory
    if (parts * pairs > warps) parts = warps / pairs > 1 ? warps / pairs : 1;
    const int g = lane / 4, t = lane % 4;
    for (int task = warp;; task += static_cast<int>(blockDim.x) / 32) {
      const int pair = task % pairs, p = task / pairs, column = j0 + pair * kPanel;
      float sum[2][4] = {};
      if (p < parts)
        inner_products(sum, j0, column, from_row + steps * p / parts * 16, from_row + steps * (p + 1) / parts * 16);
      if (parts > 1) {
        float* const slot = a + rows * stride + pair * kPanel * kPanel + lane;
        if (p > 0 && p < parts)
          for (int i = 0; i < 8; ++i) slot[(p - 1) * pairs * kPanel * kPanel + 32 * i] = sum[i / 4][i % 4];
        __syncthreads();
        if (p == 0)
          for (int k = 0; k + 1 < parts; ++k)
            for (int i = 0; i < 8; ++i) sum[i / 4][i % 4] += slot[k * pairs * kPanel * kPanel + 32 * i];
        __syncthreads();
      }
      if (p == 0)
        for (int n = 0; n < 2; ++n)
          for (int i = 0; i < 4; ++i) a[at(rows + g + i / 2 * 8, column + 8 * n + 2 * t + i % 2)] = sum[n][i];
      if (parts > 1 || task + static_cast<int>(blockDim.x) / 32 >= pairs) break;
    }
  }

  // W' of one column from W, with `part`: w[c] = tau_c (w[c] - the sum of (V^T V)[c][k] w[k]) over the k before c, or
  // behind it
  template <bool kForm>
  __device__ __forceinline__ void substitute(float* w) const {
    DF_UNROLL
    for (int step = 0; step < kPanel; ++step) {
      const int c = kForm ? kPanel - 1 - step : step;
      float gram[kPanel];
      DF_UNROLL
      for (int k = 0; k < kPanel; k += 4) {
        const Vector16 four = *reinterpret_cast<const Vector16*>(part + c * kPanel + k);
        DF_UNROLL
        for (int i = 0; i < 4; ++i) gram[k + i] = bits_float(four.word[i]);
      }
      w[c] *= gram[c];
      DF_UNROLL
      for (int k = 0; k < kPanel; ++k)
        if (kForm ? k < c : k > c) w[k] -= gram[k] * w[c];
    }
  }

  // A -= V W' in this warp's rows. The panel's own rows are R and are dropped; when Q is formed the panel becomes its
  // columns of Q.
  template <bool kForm>
  __device__ void update(int j0) const {
    const int g = lane / 4, t = lane % 4, first = from(j0);
    const bool owner = first + first_row == j0 && first < rows;
    if (begin() >= rows || end() <= first) return;
    uint32_t left[2][2][2][4];  // [tile of 16 rows][half of the panel][high, low]
    DF_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      const int row = begin() + 16 * tile < rows ? begin() + 16 * tile : begin();
      DF_UNROLL
      for (int k = 0; k < 2; ++k)
        for (int i = 0; i < 4; ++i)
          split_tf32(left[tile][k][0][i], left[tile][k][1][i], a[at(row + g + i % 2 * 8, j0 + 8 * k + t + i / 2 * 4)]);
    }
    __syncwarp();
    for (int column = kForm ? j0 : j0 + kPanel; column < columns; column += 8) {
      uint32_t right[2][2][2];
      DF_UNROLL
      for (int k = 0; k < 2; ++k)
        for (int i = 0; i < 2; ++i)
          split_tf32(right[k][0][i], right[k][1][i], a[at(rows + 8 * k + t + 4 * i, column + g)]);
      DF_UNROLL
      for (int tile = 0; tile < 2; ++tile) {
        const int row = begin() + 16 * tile;
        if (row < first || row >= rows) continue;
        float c[4] = {};
        DF_UNROLL
        for (int k = 0; k < 2; ++k) multiply_split(c, left[tile][k], right[k]);
        Two* const to = reinterpret_cast<Two*>(a + at(row + g, column + 2 * t));
        const auto write = [&](auto before) {
          DF_UNROLL
          for (int i = 0; i < 2; ++i) {  // rows g and g + 8
            const Two x = before(i);
            to[i * 4 * stride] = {x.at[0] - c[2 * i], x.at[1] - c[2 * i + 1]};
          }
        };
        const bool pivots = owner && row == first;
        if (kForm ? column >= j0 + kPanel : !pivots)
          write([&](int i) { return to[i * 4 * stride]; });
        else if (kForm && pivots)
          write([&](int i) {
            const int ahead = g + 8 * i - (column - j0 + 2 * t);
            return Two{ahead == 0 ? 1.0f : 0.0f, ahead == 1 ? 1.0f : 0.0f};
          });
        else if (kForm)
          write([](int) { return Two{}; });
        else
          to[0] = to[4 * stride] = {};
      }
    }
    __syncwarp();
  }

  // Applies the reflections of a panel to the columns behind it; kForm: in reverse, and to the columns of I in its
  // place.
  template <bool kForm>
  __device__ void reflect(int j0) const {
    __syncthreads();
    gather(j0);
    kCluster ? sync_cluster() : __syncthreads();
    DF_NO_UNROLL
    for (int i = static_cast<int>(threadIdx.x); i < kPanel * kPanel; i += static_cast<int>(blockDim.x)) {
      float sum = 0.0f;
      DF_UNROLL
      for (unsigned r = 0; r < (kCluster ? kMaxCluster : 1); ++r)
        if (r < ranks) sum += *in_block<kCluster>(a + at(rows + i / kPanel, j0 + i % kPanel), r);
      part[i] = i / kPanel != i % kPanel ? sum : sum == 0.0f ? 0.0f : 2.0f / sum;
    }
    const int column = (kForm ? j0 : j0 + kPanel) + static_cast<int>(threadIdx.x);
    float w[kPanel] = {};
    if (kForm && column < j0 + kPanel) {  // V^T I
      const unsigned owner = static_cast<unsigned>(j0 / rows);
      const float* const there = in_block<kCluster>(a, owner);
      DF_UNROLL
      for (int k = 0; k < kPanel; ++k) w[k] = there[at(column - static_cast<int>(owner) * rows, j0 + k)];
    } else if (column < columns) {
      DF_NO_UNROLL
      for (unsigned r = 0; r < ranks; ++r) {
        const float* const there = in_block<kCluster>(a, r);
        DF_UNROLL
        for (int k = 0; k < kPanel; ++k) w[k] += there[at(rows + k, column)];
      }
    }
    kCluster ? sync_cluster() : __syncthreads();
    if (column < columns) {
      substitute<kForm>(w);
      DF_UNROLL
      for (int k = 0; k < kPanel; ++k) a[at(rows + k, column)] = w[k];
    }
    __syncthreads();
    update<kForm>(j0);
  }

  template <bool kCodes>
  __device__ void store(const Batch& b, int64_t index) const {
    for (int row = begin(); row < end() && first_row + row < b.rows; ++row) {
      const int64_t to = (index * b.rows + first_row + row) * b.columns;
      for (int c = lane; c < b.columns; c += 32) {
        if (kCodes)
          static_cast<uint16_t*>(b.q)[to + c] = minifloat_encode<true>(a[at(row, c)]);
        else
          static_cast<float*>(b.q)[to + c] = a[at(row, c)];
      }
    }
  }
};

template <bool kCodes, bool kCluster>
__global__ void __launch_bounds__(kMaxThreads, 1) orthonormalize_on_chip(const Table table, const float eps) {
  DF_DYNAMIC_SHARED(float, memory);
  const unsigned item = blockIdx.x / (kCluster ? cluster_size() : 1);
  const int mine = table.of_block(item);
  const Batch& b = table.item[mine];
  const int64_t index = item - table.first_block[mine];
  const Matrix<kCluster> m(memory, b);
  m.template load<kCodes>(b, index, eps);
  m.scale_columns();
  for (int j0 = 0; j0 < m.columns; j0 += kPanel) {
    m.factor_panel(j0);
    if (j0 + kPanel < m.columns) m.template reflect<false>(j0);
  }
  for (int j0 = m.columns - kPanel; j0 >= 0; j0 -= kPanel) m.template reflect<true>(j0);
  m.template store<kCodes>(b, index);
}

}  // namespace
}  // namespace dalle_fast::householder
