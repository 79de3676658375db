// SPDX-License-Identifier: MIT
// One launch a layer. A block takes rows (samples, times the query heads of a group) of one caption and key-value head:
// 64, a warp 16 of them, or, where few rows have to fill the machine, 16, whose text keys the warps share out. Text
// keys and values come through two stages of asynchronous copies, once for all rows, and meet them on tensor cores
// (float32 as three products of tf32 parts). Then a warp takes a row's image window: lanes over channels and keys, 16
// loads of 16 bytes in flight a lane, merged with the text's part under one softmax. The new key and value come from
// the arguments, and nobody reads the slot that they are written to. Only the kernel looks at the position.
//
// Floor: windows once a sample, text once a block from the second-level cache. 512 samples of one caption, 62 heads x
// 64 channels, 256 + 33 keys, bfloat16: 268 MB of windows, 62 us at 4.3 TB/s or 108 k cycles of a multiprocessor, which
// has 3.76 blocks of 64 rows. Their text is 7.9 M multiply-adds, 8 k cycles at 1024 a cycle (half the peak of
// mma.sync); float32 has twice the bytes, and at a sixth of that rate 46 k of 216 k cycles. Their windows are 2.0 MB,
// at most 420 instructions of a warp for 8 KB: 27 k cycles of four schedulers. 16 warps hold 128 KB of loads in
// flight; 4.3 TB/s at 1 us take 33 KB. Query heads of a group read a window again, from the first-level cache.
#include <stdexcept>

#include "parts.cuh"

namespace dalle_fast::decode_attention {
namespace {

constexpr int kMostDim = 256;
constexpr float kLog2e = 1.4426950408889634f;

template <typename T>
__device__ __forceinline__ T* row3(const Tensor3& t, int64_t b, int64_t h) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h;
}
template <typename T>
__device__ __forceinline__ T* row4(const Tensor4& t, int64_t b, int64_t h, int64_t l) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h + l * t.stride_l;
}

struct Plan {
  Window window;
  int rows;             // of a block: 64, or 16
  int rows_of_caption;  // samples x query heads of a key-value head
  int tiles;            // blocks of a caption and key-value head
  int group;            // query heads of a key-value head
  Divisor by_tiles, by_kv_heads, by_group;
  bool vectors;  // all rows begin at multiples of 16 bytes and are made of such
};

// Rows [0, count) of shared memory from row_of(r), or zeros where that is null; `valid` is any address with 16 bytes.
template <typename T, int kDim, typename F>
__device__ __forceinline__ void load_rows(T* tile, int count, int dim, bool vectors, const T* valid, F row_of) {
  using S = Shape<T, kDim>;
  for (int i = static_cast<int>(threadIdx.x); i < count * S::kChunks; i += kThreads) {
    const int r = i / S::kChunks, c = i % S::kChunks * S::kChunk;
    const T* const from = row_of(r);
    T* const to = tile + r * S::kStride + c;
    if (vectors) {
      const bool there = from && c < dim;
      DF_COPY_ASYNC_16(to, there ? from + c : valid, there);
    } else {
      for (int j = 0; j < S::kChunk; ++j) to[j] = from && c + j < dim ? from[c + j] : T{};
    }
  }
}

// ---- the kernel

template <typename T, int kDim>
struct Block {
  using S = Shape<T, kDim>;
  const Params& p;
  const Plan& plan;
  const Token token;
  const int64_t caption, kv;
  const int begin, count, dim, warp, lane;  // rows [begin, begin + count) of the caption

  __device__ __forceinline__ int64_t sample(int row) const {
    return caption * (p.batch / p.text_batch) + plan.by_group.divide(begin + row);
  }
  __device__ __forceinline__ int member(int row) const {  // of the group
    return begin + row - plan.by_group.divide(begin + row) * plan.group;
  }
  __device__ __forceinline__ T* at(const Tensor3& t, int row) const {
    return row3<T>(t, sample(row), kv * plan.group + member(row));
  }
  __device__ __forceinline__ const T* text(const Tensor4& t, int key) const {
    return key < token.num_text ? row4<T>(t, caption, kv, key) : nullptr;
  }

  // The window and the new token itself of one row, a part of `parts`; part 0 also writes the token into its cache.
  template <bool kVectors>
  __device__ __forceinline__ RowPart<T, kDim> look_back(const T* q_row, int row, int part, int parts) const {
    using Part = RowPart<T, kDim>;
    const int64_t b = sample(row);
    Vector16 new_k[S::kPer], new_v[S::kPer];
    DF_UNROLL
    for (int u = 0; u < S::kPer; ++u) {
      new_k[u] = load_chunk<kVectors>(row3<T>(p.k, b, kv), Part::channel(u), dim);
      new_v[u] = load_chunk<kVectors>(row3<T>(p.v, b, kv), Part::channel(u), dim);
    }
    float q[S::kHeld];
    DF_UNROLL
    for (int i = 0; i < S::kHeld; ++i)
      q[i] = to_float(q_row[Part::channel(i / S::kChunk) + i % S::kChunk]) * (p.scale * kLog2e);
    Part r;
    r.template add_window<kVectors>(q, row4<T>(p.image_k, b, kv, 0), row4<T>(p.image_v, b, kv, 0), p.image_k.stride_l,
                                    p.image_v.stride_l, plan.window, token, dim, part, parts);
    if (part > 0) return r;
    float x[S::kHeld];
    DF_UNROLL
    for (int u = 0; u < S::kPer; ++u) unpack_chunk<T>(x + u * S::kChunk, new_v[u]);
    r.merge(Part::dot(q, new_k), 1.0f, [&](int i) { return x[i]; });
    if (member(row) > 0 || lane >= S::kLanes) return r;
    T* const to_k = token.text ? row4<T>(p.text_k, b, kv, token.position) : row4<T>(p.image_k, b, kv, token.slot);
    T* const to_v = token.text ? row4<T>(p.text_v, b, kv, token.position) : row4<T>(p.image_v, b, kv, token.slot);
    DF_UNROLL
    for (int u = 0; u < S::kPer; ++u) {
      store_chunk<kVectors>(to_k, Part::channel(u), dim, new_k[u]);
      store_chunk<kVectors>(to_v, Part::channel(u), dim, new_v[u]);
    }
    return r;
  }
  __device__ __forceinline__ RowPart<T, kDim> look_back(const T* q_row, int row, int part, int parts) const {
    return plan.vectors ? look_back<true>(q_row, row, part, parts) : look_back<false>(q_row, row, part, parts);
  }

  __device__ __forceinline__ void write(int row, const RowPart<T, kDim>& r) const {
    if (lane >= S::kLanes) return;
    const float inverse = 1.0f / r.sum;
    DF_UNROLL
    for (int u = 0; u < S::kPer; ++u) {
      const float* x = r.out + u * S::kChunk;
      Vector16 chunk;
      DF_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4)
          chunk.word[i] = float_bits(x[i] * inverse);
        else
          chunk.word[i] = pack2<T>(x[2 * i] * inverse, x[2 * i + 1] * inverse);
      }
      const int c = RowPart<T, kDim>::channel(u);
      plan.vectors ? store_chunk<true>(at(p.out, row), c, dim, chunk)
                   : store_chunk<false>(at(p.out, row), c, dim, chunk);
    }
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, Shape<T, kDim>::kBlocks) decode(const Params p, const Plan plan) {
  using S = Shape<T, kDim>;
  DF_DYNAMIC_SHARED(unsigned char, memory);
  DF_SHARED(float, largest, kMostRows);
  DF_SHARED(float, sum, kMostRows);
  T* const q = reinterpret_cast<T*>(memory + S::kWorkBytes);
  T* const stages = reinterpret_cast<T*>(memory);         // keys, values, keys, values
  float* const parts = reinterpret_cast<float*>(memory);  // after them: row r of warp w at 16 w + r
  const int64_t position = p.position_at ? *p.position_at : p.position;
  const bool possible = is_possible(p, position);
  const int head = plan.by_tiles.divide(static_cast<int>(blockIdx.x)), caption = plan.by_kv_heads.divide(head);
  const int begin = (static_cast<int>(blockIdx.x) - head * plan.tiles) * plan.rows;
  const int left = plan.rows_of_caption - begin;
  const Block<T, kDim> block{p,
                             plan,
                             plan.window.token(possible ? static_cast<int>(position) : plan.window.text_len),
                             caption,
                             head - caption * p.num_kv_heads,
                             begin,
                             left < plan.rows ? left : plan.rows,
                             static_cast<int>(p.head_dim),
                             static_cast<int>(threadIdx.x) / 32,
                             static_cast<int>(threadIdx.x) % 32};
  const int warp = block.warp, count = block.count, num_text = block.token.num_text;
  if (!possible) {
    for (int row = warp; row < count; row += kWarps)
      for (int d = block.lane; d < block.dim; d += 32) from_float(block.at(p.out, row) + d, NAN);
    return;
  }

  const auto load = [&](int i) {
    T* const k = stages + i % 2 * 2 * S::kTile;
    const T* valid = block.at(p.q, 0);
    load_rows<T, kDim>(k, S::kKeys, block.dim, plan.vectors, valid,
                       [&](int r) { return block.text(p.text_k, i * S::kKeys + r); });
    load_rows<T, kDim>(k + S::kTile, S::kKeys, block.dim, plan.vectors, valid,
                       [&](int r) { return block.text(p.text_v, i * S::kKeys + r); });
    copy_async_commit();
  };
  load_rows<T, kDim>(q, plan.rows, block.dim, plan.vectors, block.at(p.q, 0),
                     [&](int r) { return r < count ? block.at(p.q, r) : nullptr; });
  load(0);
  const bool wide = plan.rows == kMostRows;  // warps have rows of their own, otherwise keys
  const int text_parts = wide ? 1 : kWarps;  // of a row
  const float factor = p.scale * kLog2e;
  TextPart<kDim> part;
  for (int i = 0; i * S::kKeys < num_text; ++i) {
    copy_async_wait<0>();
    __syncthreads();  // tile i is here, and nobody reads tile i - 1 any more
    if ((i + 1) * S::kKeys < num_text) load(i + 1);
    const T* k = stages + i % 2 * 2 * S::kTile;
    const int there = num_text - i * S::kKeys, mine = warp * S::kShare;
    if (wide) {
      if (warp * 16 < count)
        part.template add_keys<S::kKeys>(q + warp * 16 * S::kStride, k, k + S::kTile, there, factor);
    } else if (mine < S::kKeys && mine < there) {
      k += mine * S::kStride;
      part.template add_keys<S::kShare>(q, k, k + S::kTile, there - mine, factor);
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // q is here, and nobody reads a tile any more
  DF_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 16 + block.lane / 4 + 8 * i, column = block.lane % 4 * 2;
    DF_UNROLL
    for (int n = 0; n < kDim / 8; ++n)
      for (int j = 0; j < 2; ++j) parts[row * S::kPartStride + n * 8 + column + j] = part.out[n][2 * i + j];
    const float its_sum = across<1, 4>(part.sum[i], add);
    if (column == 0) {
      largest[row] = part.largest[i];
      sum[row] = its_sum;
    }
  }
  __syncthreads();
  // A warp looks back for rows of its own, or, where there are fewer than warps, all share the window of every row.
  const bool alone = count >= kWarps;
  for (int row = alone ? warp : 0; row < count; row += alone ? kWarps : 1) {
    RowPart<T, kDim> r = block.look_back(q + row * S::kStride, row, alone ? 0 : warp, alone ? 1 : kWarps);
    if (alone) {
      for (int w = 0; w < text_parts; ++w) r.merge(parts, largest, sum, 16 * w + row);
      block.write(row, r);
    } else if (block.lane < S::kLanes) {
      r.store(parts, largest, sum, 16 * warp + kWarps + row);  // behind the text's rows
    }
  }
  if (alone) return;
  __syncthreads();
  if (warp >= count) return;
  RowPart<T, kDim> r;
  for (int w = 0; w < text_parts; ++w) r.merge(parts, largest, sum, 16 * w + warp);
  for (int w = 0; w < kWarps; ++w) r.merge(parts, largest, sum, 16 * w + kWarps + warp);
  block.write(warp, r);
}

// ---- launch

template <typename Tensor>
bool is_vector_tensor(const Tensor& t, int chunk) {
  bool rows = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride_b % chunk == 0 && t.stride_h % chunk == 0;
  if constexpr (std::is_same_v<Tensor, Tensor4>) rows = rows && t.stride_l % chunk == 0;
  return rows;
}
bool has_vectors(const Params& p, int chunk) {
  for (const Tensor3* t : {&p.q, &p.k, &p.v, &p.out})
    if (!is_vector_tensor(*t, chunk)) return false;
  for (const Tensor4* t : {&p.text_k, &p.text_v, &p.image_k, &p.image_v})
    if (!is_vector_tensor(*t, chunk)) return false;
  return p.head_dim % chunk == 0;
}

template <typename T, int kDim>
void run(const Params& p, void* stream) {
  using S = Shape<T, kDim>;
  const int64_t group = p.num_heads / p.num_kv_heads, rows = p.batch / p.text_batch * group;
  const int64_t heads = p.text_batch * p.num_kv_heads;
  const auto tiles = [&](int64_t of) { return (rows + of - 1) / of; };
  // 64 rows share each text key, but 16 leave more blocks, and more warps for the text of each
  const bool wide = rows > 16 && 2 * heads * tiles(kMostRows) >= 3 * multiprocessors(p.device.index);
  Plan plan{Window(p), wide ? kMostRows : 16, static_cast<int>(rows), 0, static_cast<int>(group), {}, {}, {}, false};
  const int64_t blocks = heads * tiles(plan.rows);
  if (rows > INT32_MAX || blocks > INT32_MAX) throw std::invalid_argument("q: too many rows for one launch");
  plan.tiles = static_cast<int>(tiles(plan.rows));
  plan.by_tiles = Divisor(static_cast<uint32_t>(plan.tiles));
  plan.by_kv_heads = Divisor(static_cast<uint32_t>(p.num_kv_heads));
  plan.by_group = Divisor(static_cast<uint32_t>(group));
  plan.vectors = has_vectors(p, S::kChunk);
  const std::size_t bytes = S::kWorkBytes + sizeof(T) * static_cast<std::size_t>(plan.rows * S::kStride);
  allow_dynamic_shared(decode<T, kDim>, bytes);
  DF_LAUNCH((decode<T, kDim>), static_cast<unsigned>(blocks), kThreads, bytes, stream, p, plan);
}

}  // namespace

void forward_cuda(const Params& p, void* stream) {
  if (p.head_dim > kMostDim) throw std::invalid_argument("q: the CUDA kernel takes at most 256 channels a head");
  if (p.pattern.length() > kMostPositions)
    throw std::invalid_argument("pattern: the CUDA kernel takes at most 2^28 positions");
  const DeviceGuard guard(p.device.index);
  with_element_type(p.dtype, [&](auto x) {
    using T = decltype(x);
    if (p.head_dim <= 32) return run<T, 32>(p, stream);
    if (p.head_dim <= 64) return run<T, 64>(p, stream);
    if (p.head_dim <= 128) return run<T, 128>(p, stream);
    run<T, 256>(p, stream);
  });
}

}  // namespace dalle_fast::decode_attention
