// SPDX-License-Identifier: MIT
// What the attention kernels share. A block has four warps and owns rows (queries, or keys for dk and dv), a warp 16 or
// 32 of them: one or two halves, the rows of a tensor core's product. Tiles of the other side come through two stages
// of asynchronous copies; a warp computes of a tile what its rows meet: wide chunks without a mask where every row
// meets every column, elsewhere pieces of 16 rows x 16 columns with one.
#pragma once

#include "../core/mma.cuh"
#include "walk.cuh"

namespace dalle_fast::sparse_attention {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kMaxDim = 128;

// Rows of a tile of the other side: at most 8 KiB of elements
template <typename T, int kDim>
inline constexpr int kTileRows = kDim * sizeof(T) <= 128 ? 64 : 8192 / (kDim * sizeof(T));

// Halves of a warp that owns queries, and rows of its block. With 32 rows, a fragment of keys or values serves two
// products: what shared memory delivers then suffices for the tensor cores.
template <typename T, int kDim>
inline constexpr int kQueryHalves = sizeof(T) == 2 && kDim <= 64 ? 2 : 1;
template <typename T, int kDim>
inline constexpr int kQueryRows = kWarps * 16 * kQueryHalves<T, kDim>;

// Whether their fragments stay in registers: of float32, twice as many
template <typename T, int kDim>
inline constexpr bool kHoldsQueries = sizeof(T) == 2 || kDim <= 32;

// Columns of a wide chunk, and whether there are none: float32 takes so many products that a mask costs little beside
// them, a second copy of the code more.
template <typename T, int kDim>
inline constexpr int kWideColumns = kDim * sizeof(T) <= 64 ? 32 : 16;
template <typename T>
inline constexpr bool kPiecesOnly = sizeof(T) == 4;

// Tiles that the queries meet
template <typename T>
struct KeyStage {
  const T *k, *v;
};

// The 16 bytes between the elements of a row of a tile and the next one, for what belongs to the row
template <typename U, int kDim, typename T>
__device__ __forceinline__ auto& behind_row(T* tile, int row) {
  using Place = std::conditional_t<std::is_const_v<T>, const U, U>;
  static_assert(sizeof(U) <= 16, "room of a row");
  return *reinterpret_cast<Place*>(tile + row * kTileStride<kDim, std::remove_const_t<T>> + kDim);
}

// ln of a query's softmax denominator, times log2(e), and out . dout: what the backward pass knows of it
struct alignas(8) Terms {
  float lse, delta;
};

// ---- work of a block

struct Place {
  unsigned b, h, kv;
  Rows rows;
};
// Blocks of a head follow each other: they share keys in the second-level cache. Later ones see more and come first.
__device__ __forceinline__ Place query_block(const Params& p, const Walk& walk, int num_rows) {
  const auto group = static_cast<unsigned>(p.num_heads / p.num_kv_heads);
  return {blockIdx.z, blockIdx.y, blockIdx.y / group,
          rows_of(walk, static_cast<int>(gridDim.x - 1 - blockIdx.x), num_rows)};
}
// Row of a query in lse and terms
__device__ __forceinline__ int64_t query_row(const Params& p, unsigned b, unsigned h, int position) {
  return (b * p.num_heads + h) * p.length + position;
}

// ---- rows between device and shared memory

template <typename T>
__device__ __forceinline__ T* head_of(const Tensor4& t, unsigned b, unsigned h) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h;
}

// Elements of 16 bytes; a thread moves as many, always of one column.
template <typename T>
inline constexpr int kChunk = 16 / sizeof(T);

// A head of a tensor and where its rows go
template <typename T>
struct Copy {
  T* tile;
  const T* head;
  uint32_t stride;

  __device__ __forceinline__ Copy(T* to, const Tensor4& t, unsigned b, unsigned h)
      : tile(to), head(head_of<T>(t, b, h)), stride(static_cast<uint32_t>(t.stride_l)) {}
  __device__ __forceinline__ const T* row(int position) const {
    return head + static_cast<uint64_t>(static_cast<uint32_t>(position)) * stride;
  }
};

// Rows [begin, begin + kCount) of some heads, the first of which exists; what does not is zero. `vectors`: rows begin
// at multiples of 16 bytes and are made of such.
template <int kDim, int kCount, typename T, typename... More>
__device__ __forceinline__ void load_rows(const Walk& walk, const Rows& rows, int dim, bool vectors,
                                          const Copy<T>& first, const More&... more) {
  constexpr int kPerRow = kDim / kChunk<T>, kStep = kThreads / kPerRow;
  const int r0 = static_cast<int>(threadIdx.x) / kPerRow, c = static_cast<int>(threadIdx.x) % kPerRow * kChunk<T>;
  // Each row has an address that may be read, whether it is `there` or not.
  const int origin = rows.begin + (rows.image ? walk.text_len : 0);
  const int count = (rows.image ? walk.num_image : walk.num_text) - rows.begin;
  const auto line = [&](int r, bool* there) {
    *there = r < count;
    return *there ? origin + r : origin;
  };
  const auto columns = [&](int r, bool* there) {
    const int raster = walk.raster(rows.begin + r);
    *there = rows.begin + r < walk.slots && raster < walk.num_image;
    return walk.text_len + (*there ? raster : 0);
  };
  const bool by_columns = rows.image && walk.kind == PatternKind::kColumn;
  if (vectors) {
    const auto copy_all = [&](const auto& position_of) {
      DF_UNROLL
      for (int i = 0; i < kCount; i += kStep) {
        bool there;
        const int position = position_of(r0 + i, &there);
        const auto copy = [&](const Copy<T>& one) {
          T* const to = one.tile + (r0 + i) * kTileStride<kDim, T> + c;
          DF_COPY_ASYNC_16(to, one.row(position) + (c < dim ? c : 0), there && c < dim);
        };
        copy(first);
        (copy(more), ...);
      }
    };
    by_columns ? copy_all(columns) : copy_all(line);
    return;
  }
  DF_NO_UNROLL
  for (int r = r0; r < kCount; r += kStep) {
    bool there;
    const int position = by_columns ? columns(r, &there) : line(r, &there);
    const auto copy = [&](const Copy<T>& one) {
      DF_NO_UNROLL
      for (int j = c; j < c + kChunk<T>; ++j)
        one.tile[r * kTileStride<kDim, T> + j] = there && j < dim ? one.row(position)[j] : T{};
    };
    copy(first);
    (copy(more), ...);
  }
}

__device__ __forceinline__ void store_pair(float* to, float a, float b) {
  to[0] = a;
  to[1] = b;
}
template <typename T>
__device__ __forceinline__ void store_pair(T* to, float a, float b) {
  *reinterpret_cast<uint32_t*>(to) = pack2<T>(a, b);
}

// Writes c * factor (one factor for rows g, one for rows g + 8) to the 16 rows from `rows`, by way of `tile`, which
// belongs to this warp.
template <int kDim, typename T>
__device__ __forceinline__ void store_rows(const Tensor4& t, T* tile, const float (*c)[4], const float* factor,
                                           const Walk& walk, const Rows& rows, unsigned b, unsigned h, int dim,
                                           bool vectors) {
  constexpr int kPerRow = kDim / kChunk<T>;
  const int lane = threadIdx.x % 32, g = lane / 4, column = lane % 4 * 2;
  __syncwarp();
  DF_UNROLL
  for (int n = 0; n < kDim / 8; ++n)
    for (int i = 0; i < 2; ++i)
      store_pair(tile + (g + 8 * i) * kTileStride<kDim, T> + n * 8 + column, c[n][2 * i] * factor[i],
                 c[n][2 * i + 1] * factor[i]);
  __syncwarp();
  T* const head = head_of<T>(t, b, h);
  for (int i = lane; i < 16 * kPerRow; i += 32) {
    const int r = i / kPerRow, at = i % kPerRow * kChunk<T>;
    const int position = walk.position(rows.image, rows.begin + r);
    if (position < 0) continue;
    T* const to = head + position * t.stride_l + at;
    const T* const from = tile + r * kTileStride<kDim, T> + at;
    if (vectors) {
      if (at < dim) *reinterpret_cast<Vector16*>(to) = *reinterpret_cast<const Vector16*>(from);
    } else {
      for (int j = 0; j < kChunk<T> && at + j < dim; ++j) to[j] = from[j];
    }
  }
}

// Sixteen rows as the left side of products: in registers, or read from shared memory each time.
template <typename T, int kDim, bool kHeld>
struct LeftRows {
  uint32_t held[kHeld ? kDim / kProductDepth<T> : 1][4];
  const T* tile;
  int row;

  __device__ __forceinline__ void take(const T* from, int first) {
    tile = from;
    row = first;
    if constexpr (kHeld) {
      DF_UNROLL
      for (int k = 0; k < kDim; k += kProductDepth<T>) load_a<kDim>(held[k / kProductDepth<T>], tile, row, k);
    }
  }
  __device__ __forceinline__ void fragment(uint32_t* a, int k) const {
    if constexpr (kHeld) {
      DF_UNROLL
      for (int i = 0; i < 4; ++i) a[i] = held[k / kProductDepth<T>][i];
    } else {
      load_a<kDim>(a, tile, row, k);
    }
  }
};

// ---- a warp and a tile

// The mask of this thread's eight scores in a piece of 16 x 16: bits of rows g and g + 8, from its first column on
struct Piece {
  uint32_t bits[2];

  // `seen`: of row lane % 16
  __device__ __forceinline__ explicit Piece(uint32_t seen) {
    const int lane = threadIdx.x % 32;
    DF_UNROLL
    for (int i = 0; i < 2; ++i) bits[i] = __shfl_sync(0xffffffffu, seen, lane / 4 + 8 * i) >> lane % 4 * 2;
  }
  // element j of block n of a result
  __device__ __forceinline__ bool operator()(int n, int j) const { return bits[j / 2] >> (n * 8 + j % 2) & 1; }
};
// no mask
struct Whole {
  __device__ __forceinline__ bool operator()(int, int) const { return true; }
};

// Calls step<halves, columns>(first half, first column of the tile, mask) of the warp that owns the rows from `row` on.
template <int kTile, bool kRowsAreQueries, typename Warp, typename Stage>
__device__ __forceinline__ void meet(Warp& warp, const Stage& stage, const Sight<kRowsAreQueries>& sight, int row,
                                     const Rows& tile) {
  constexpr int kHalves = Warp::kHalves, kColumns = Warp::kColumns;
  const int last = sight.num_rows() - 1;
  if (row > last) return;
  const int bottom = row + 16 * kHalves - 1 < last ? row + 16 * kHalves - 1 : last;
  Range all{1, 0};  // no column
  if (!Warp::kOnlyPieces && !sight.has_holes()) all = {sight.range(bottom).low, sight.range(row).high};
  DF_NO_UNROLL
  for (int c = 0; c < kTile; c += kColumns) {
    const int column = tile.begin + c;
    if (!Warp::kOnlyPieces && all.low <= column && column + kColumns - 1 <= all.high) {
      warp.template step<kHalves, kColumns>(0, c, stage, Whole{});
      continue;
    }
    DF_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      if (row + 16 * h > last) break;
      const int wanted = row + 16 * h + static_cast<int>(threadIdx.x) % 16, mine = wanted < last ? wanted : last;
      const Range range = sight.range(mine);
      const int low = __shfl_sync(0xffffffffu, range.low, 0), high = __shfl_sync(0xffffffffu, range.high, 15);
      DF_NO_UNROLL
      for (int piece = c; piece < c + kColumns; piece += 16) {
        const int begin = tile.begin + piece;
        if (low <= begin + 15 && begin <= high)
          warp.template step<1, 16>(h, piece, stage, Piece(sight.seen(mine, range, begin)));
      }
    }
  }
}

// ---- launches

inline bool is_vector_tensor(const Tensor4& t, int chunk) {
  if (!t.data) return true;
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride_b % chunk == 0 && t.stride_h % chunk == 0 &&
         t.stride_l % chunk == 0;
}
template <typename T>
bool has_vectors(const Params& p) {
  for (const Tensor4* t : {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv})
    if (!is_vector_tensor(*t, kChunk<T>)) return false;
  return p.head_dim % kChunk<T> == 0;
}

// kTiles: rows that shared memory holds
template <typename T, int kDim, int kTiles, typename Kernel, typename... More>
void launch(Kernel kernel, const dim3& blocks, void* stream, const Params& p, const Walk& walk, const More&... more) {
  constexpr std::size_t kBytes = sizeof(T) * kTileStride<kDim, T> * kTiles;
  static_assert(kBytes <= kLeastSharedLimit, "shared memory of a device");
  allow_dynamic_shared(kernel, kBytes);
  DF_LAUNCH(kernel, blocks, kThreads, kBytes, stream, p, walk, has_vectors<T>(p), more...);
}

inline dim3 query_blocks(const Params& p, const Walk& walk, int rows) {
  return {static_cast<unsigned>(walk.blocks(rows)), static_cast<unsigned>(p.num_heads), static_cast<unsigned>(p.batch)};
}

// f(T{}, width): the element type, and the head's width as a constant
template <typename F>
void dispatch(const Params& p, F&& f) {
  with_element_type(p.dtype, [&](auto element) {
    if (p.head_dim <= 32) return f(element, std::integral_constant<int, 32>());
    if (p.head_dim <= 64) return f(element, std::integral_constant<int, 64>());
    f(element, std::integral_constant<int, kMaxDim>());
  });
}

// Throws for what the kernels do not take.
Walk checked_walk(const Params& p);

}  // namespace dalle_fast::sparse_attention
