// SPDX-License-Identifier: MIT
// One launch a layer. A block takes rows (samples, times the query heads of a group) of one caption and key-value head:
// 64, a warp 16 of them, or, where few rows have to fill the machine, 16, whose text keys the warps share out. Text
// keys and values come through two stages of asynchronous copies, once for all rows, and meet them on tensor cores
// (float32 as three products of tf32 parts). Then a warp takes samples, or all warps share one where there are fewer:
// batches of the image window come through two stages of copies that belong to the warp, lanes over channels and keys,
// and join the text's part under one softmax. The new key and value come from the arguments, and nobody reads the slot
// that they are written to. Only the kernel looks at the position; grid and shared memory do not depend on it.
//
// Floor: windows once a sample, text once a block from the second-level cache. 512 samples of one caption, 62 heads x
// 64 channels, 256 + 33 keys, bfloat16: 268 MB of windows, 62 us at 4.3 TB/s or 108 k cycles of a multiprocessor, which
// has 240 rows in 3.76 blocks. Their text is 7.9 M multiply-adds, 8 k cycles at 1024 a cycle (half the peak of
// mma.sync); float32 has twice the bytes, and at a sixth of that rate 46 k of 216 k cycles. A window takes some 900
// instructions of a warp: half of what four schedulers issue in that time. Two blocks hold up to 147 KB of windows in
// flight; 4.3 TB/s at 1 us take 33 KB. Where an SM has less than 200 KB, a smaller plan leaves it two blocks (A100) or
// one (99 KB). The first windows go to the second-level cache while the text is worked on.
#include <stdexcept>

#include "parts.cuh"

namespace dalle_fast::decode_attention {
namespace {

constexpr int kMostDim = 256;
constexpr int64_t kMostStride = int64_t{1} << 30;  // of slots made of vectors: 32 bits in bytes

template <typename T>
__device__ __forceinline__ T* row3(const Tensor3& t, int64_t b, int64_t h) {
  return static_cast<T*>(t.data) + h * t.stride_h + b * t.stride_b;  // what a block has in common first
}
template <typename T>
__device__ __forceinline__ T* row4(const Tensor4& t, int64_t b, int64_t h, int64_t l) {
  return static_cast<T*>(t.data) + h * t.stride_h + l * t.stride_l + b * t.stride_b;
}

struct Plan {
  explicit Plan(const Params& p) : window(p) {}
  Window window;
  int rows;             // of a block: kManyRows, or 16
  int rows_of_caption;  // samples x query heads of a key-value head
  int share;            // samples of a caption
  int tiles;            // blocks of a caption and key-value head
  int group;            // query heads of a key-value head
  Divisor by_tiles, by_kv_heads, by_group;
  bool wide;     // a warp has rows of its own for the text; otherwise all have the same and share out the keys
  bool vectors;  // all rows begin at multiples of 16 bytes and are made of such
};

// Rows [begin, begin + count) of a caption and key-value head, which belong to samples from first_sample on.
template <typename T, typename S>
struct Block {
  using Part = RowPart<S, T>;
  const Params& p;
  const Plan& plan;
  Token token;
  int caption, kv, begin, count, first_sample, num_samples, dim, warp, lane;

  __device__ __forceinline__ Block(const Params& p_, const Plan& plan_, int64_t position)
      : p(p_), plan(plan_), token(plan_.window.token(static_cast<int>(position))) {
    const int head = plan.by_tiles.divide(static_cast<int>(blockIdx.x)), kv_heads = static_cast<int>(p.num_kv_heads);
    caption = plan.by_kv_heads.divide(head);
    kv = head - caption * kv_heads;
    begin = (static_cast<int>(blockIdx.x) - head * plan.tiles) * plan.rows;
    const int left = plan.rows_of_caption - begin;
    count = left < plan.rows ? left : plan.rows;
    first_sample = plan.by_group.divide(begin);
    num_samples = plan.by_group.divide(begin + count - 1) + 1 - first_sample;
    dim = static_cast<int>(p.head_dim);
    warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
  }
  // q or out
  __device__ __forceinline__ T* at(const Tensor3& t, int row) const {
    const int sample = plan.by_group.divide(begin + row), member = begin + row - sample * plan.group;
    return row3<T>(t, batch_of(sample), kv * plan.group + member);
  }
  __device__ __forceinline__ int64_t batch_of(int sample) const {
    return static_cast<int64_t>(caption) * plan.share + sample;
  }

  // Rows [0, rows) of shared memory from row_of(r), or zeros where that is null.
  template <typename F>
  __device__ __forceinline__ void load_rows(T* tile, int rows, F row_of) const {
    const T* const valid = at(p.q, 0);
    DF_NO_UNROLL
    for (int i = static_cast<int>(threadIdx.x); i < rows * S::kChunks; i += S::kThreads) {
      const int r = i / S::kChunks, c = i % S::kChunks * S::kChunk;
      const T* const from = row_of(r);
      const bool there = from && c < dim;
      T* const to = tile + r * S::kStride + c;
      const T* const chunk = there ? from + c : valid;
      const int channels = there ? dim - c : 0;
      plan.vectors ? load_chunk<true>(to, chunk, channels) : load_chunk<false>(to, chunk, channels);
    }
  }
  // 16 bytes of a row with so many channels left, or zeros; `from` can be read in any case.
  template <bool kVectors>
  __device__ __forceinline__ static void load_chunk(T* to, const T* from, int left) {
    if constexpr (kVectors) {
      DF_COPY_ASYNC_16(to, from, left > 0);
    } else {
      DF_NO_UNROLL
      for (int j = 0; j < S::kChunk; ++j) to[j] = j < left ? from[j] : T{};
    }
  }
  // The i-th tile of text keys before the token, and its values.
  __device__ __forceinline__ void load_text(T* stages, int i) const {
    T* const keys = stages + i % 2 * 2 * S::kTile;
    const auto row_of = [&](const Tensor4& t, int r) {
      const int key = i * S::kKeys + r;
      return key < token.num_text ? row4<T>(t, caption, kv, key) : nullptr;
    };
    load_rows(keys, S::kKeys, [&](int r) { return row_of(p.text_k, r); });
    load_rows(keys + S::kTile, S::kKeys, [&](int r) { return row_of(p.text_v, r); });
    copy_async_commit();
  }

  // A batch of a sample's window, and with the first the new token, into a stage of this warp: each lane loads what it
  // is going to read. Bits of the result say which keys of the batch are there.
  template <bool kVectors>
  __device__ __forceinline__ unsigned load_window(Vector16* stage, int sample, int batch) const {
    const int64_t b = batch_of(sample);
    const auto first = [&](int u) { return Part::channel(u) < dim ? Part::channel(u) : 0; };
    const T* const keys = row4<T>(p.image_k, b, kv, 0) + first(0);
    const T* const values = row4<T>(p.image_v, b, kv, 0) + first(0);
    T* const to = reinterpret_cast<T*>(stage + lane);
    const int mine = lane < S::kBatch ? plan.window.slot(token, batch * S::kBatch + lane) : -1;
    const auto load = [&](int i, const T* key, const T* value, bool there) {
      DF_UNROLL
      for (int u = 0; u < S::kPer; ++u) {
        const int at = (i * S::kPer + u) * 32 * S::kChunk, left = there ? dim - Part::channel(u) : 0;
        load_chunk<kVectors>(to + at, key + (first(u) - first(0)), left);
        load_chunk<kVectors>(to + at + S::kStage / 2 * S::kChunk, value + (first(u) - first(0)), left);
      }
    };
    DF_UNROLL
    for (int i = 0; i < S::kLoads; ++i) {
      const int slot = __shfl_sync(0xffffffffu, mine, i * S::kTogether + lane / S::kLanes), at = slot < 0 ? 0 : slot;
      load(i, row_at<kVectors>(keys, at, p.image_k.stride_l), row_at<kVectors>(values, at, p.image_v.stride_l),
           slot >= 0);
    }
    load(S::kLoads, row3<T>(p.k, b, kv) + first(0), row3<T>(p.v, b, kv) + first(0), batch == 0 && lane < S::kLanes);
    copy_async_commit();
    return __ballot_sync(0xffffffffu, mine >= 0);
  }
  __device__ __forceinline__ unsigned load_window(Vector16* stage, int sample, int batch) const {
    return plan.vectors ? load_window<true>(stage, sample, batch) : load_window<false>(stage, sample, batch);
  }
  // The lines of the first keys into the second-level cache.
  __device__ __forceinline__ void prefetch_window(int sample, int most) const {
    DF_NO_UNROLL
    for (int i = lane; i < token.count && i < most; i += 32) {
      const int slot = plan.window.slot(token, i);
      if (slot < 0) continue;
      for (int c = 0; c < dim; c += 128 / static_cast<int>(sizeof(T))) {
        prefetch_line(row4<T>(p.image_k, batch_of(sample), kv, slot) + c);
        prefetch_line(row4<T>(p.image_v, batch_of(sample), kv, slot) + c);
      }
    }
  }
  // The new token from a stage into its cache.
  __device__ __forceinline__ void keep_token(const Vector16* stage, int sample) const {
    if (lane >= S::kLanes) return;
    const int64_t b = batch_of(sample);
    T* const k = token.text ? row4<T>(p.text_k, b, kv, token.position) : row4<T>(p.image_k, b, kv, token.slot);
    T* const v = token.text ? row4<T>(p.text_v, b, kv, token.position) : row4<T>(p.image_v, b, kv, token.slot);
    for (int u = 0; u < S::kPer; ++u) {
      const int c = Part::channel(u);
      const T* const from = reinterpret_cast<const T*>(stage + (S::kLoads * S::kPer + u) * 32 + lane);
      store_chunk(k + c, from, dim - c);
      store_chunk(v + c, from + S::kStage / 2 * S::kChunk, dim - c);
    }
  }
  __device__ __forceinline__ void store_chunk(T* to, const T* from, int left) const {
    if (left <= 0) return;
    if (plan.vectors) {
      *reinterpret_cast<Vector16*>(to) = *reinterpret_cast<const Vector16*>(from);
    } else {
      DF_NO_UNROLL
      for (int j = 0; j < S::kChunk && j < left; ++j) to[j] = from[j];
    }
  }
  __device__ __forceinline__ void write(int row, const Part& r) const {
    if (lane >= S::kLanes) return;
    const float inverse = 1.0f / r.sum;
    T* const to = at(p.out, row);
    DF_UNROLL
    for (int u = 0; u < S::kPer; ++u) {
      const int c = Part::channel(u);
      if (c >= dim) continue;
      alignas(16) T chunk[S::kChunk];
      DF_UNROLL
      for (int j = 0; j < S::kChunk; ++j) from_float(&chunk[j], r.out[u * S::kChunk + j] * inverse);
      if (plan.vectors) {
        *reinterpret_cast<Vector16*>(to + c) = *reinterpret_cast<const Vector16*>(chunk);
      } else {
        DF_UNROLL
        for (int j = 0; j < S::kChunk; ++j)
          if (c + j < dim) to[c + j] = chunk[j];
      }
    }
  }
};

template <typename T, int kDim, bool kLarge>
__global__ void __launch_bounds__(Shape<T, kDim, kLarge>::kThreads, Shape<T, kDim, kLarge>::kBlocks)
    decode_kernel(const Params p, const Plan plan) {
  using S = Shape<T, kDim, kLarge>;
  using Part = RowPart<S, T>;
  constexpr int kWarps = S::kWarps;
  DF_DYNAMIC_SHARED(unsigned char, memory);
  T* const q = reinterpret_cast<T*>(memory + S::kWorkBytes);
  T* const text = reinterpret_cast<T*>(memory);
  float* const parts = reinterpret_cast<float*>(memory);  // after the text: row r of warp w at 16 w + r
  const int64_t position = p.position_at ? *p.position_at : p.position;
  const bool possible = is_possible(p, position);
  const Block<T, S> block(p, plan, possible ? position : 0);
  const int warp = block.warp, count = block.count, num_text = block.token.num_text;
  if (!possible) {
    for (int row = warp; row < count; row += kWarps)
      for (int d = block.lane; d < block.dim; d += 32) from_float(block.at(p.out, row) + d, NAN);
    return;
  }

  block.load_rows(q, plan.rows, [&](int r) { return r < count ? block.at(p.q, r) : nullptr; });
  block.load_text(text, 0);
  for (int i = warp; i < block.num_samples && i < 3 * kWarps; i += kWarps)  // what the cache has room for
    block.prefetch_window(block.first_sample + i, 64);
  const float factor = p.scale * kLog2e;
  TextPart<kDim> part;
  for (int i = 0; i * S::kKeys < num_text; ++i) {
    copy_async_wait<0>();
    __syncthreads();  // tile i is here, and nobody reads tile i - 1 any more
    if ((i + 1) * S::kKeys < num_text) block.load_text(text, i + 1);
    const T* k = text + i % 2 * 2 * S::kTile;
    const int there = num_text - i * S::kKeys, mine = warp * S::kShare;
    if (S::kManyRows > 16 && plan.wide) {
      if (warp * 16 < count)
        part.template add_keys<S::kKeys>(q + warp * 16 * S::kStride, k, k + S::kTile, there, factor);
    } else if (mine < S::kKeys && mine < there) {
      k += mine * S::kStride;
      part.template add_keys<S::kShare>(q, k, k + S::kTile, there - mine, factor);
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // q is here, and nobody reads a tile any more

  // A warp takes samples of its own, or, where there are too few, every fourth batch of each.
  const bool alone = plan.wide || block.num_samples >= kWarps;
  const int batches = block.token.count > S::kBatch ? (block.token.count + S::kBatch - 1) / S::kBatch : 1;
  const int first_batch = alone ? 0 : warp, batch_step = alone ? 1 : kWarps, sample_step = alone ? kWarps : 1;
  Vector16* const stages = reinterpret_cast<Vector16*>(memory + S::kPartBytes) + warp * 2 * S::kStage;
  int sample = first_batch < batches ? (alone ? warp : 0) : block.num_samples, batch = first_batch;
  unsigned there = 0;
  if (sample < block.num_samples) there = block.load_window(stages, block.first_sample + sample, batch);

  DF_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 16 + block.lane / 4 + 8 * i, column = block.lane % 4 * 2;
    DF_UNROLL
    for (int n = 0; n < kDim / 8; ++n)
      for (int j = 0; j < 2; ++j) parts[row * S::kPartStride + n * 8 + column + j] = part.out[n][2 * i + j];
    const float its_sum = across<1, 4>(part.sum[i], add);
    if (column == 0) *reinterpret_cast<RowStats*>(parts + row * S::kPartStride + kDim) = {part.largest[i], its_sum};
  }
  __syncthreads();

  for (int step = 0; sample < block.num_samples; ++step) {
    const bool last = batch + batch_step >= batches;
    const int next_sample = last ? sample + sample_step : sample, next_batch = last ? first_batch : batch + batch_step;
    unsigned next_there = 0;
    if (next_sample < block.num_samples) {
      next_there = block.load_window(stages + (step + 1) % 2 * S::kStage, block.first_sample + next_sample, next_batch);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    const Vector16* const stage = stages + step % 2 * S::kStage;
    const int first_row = (block.first_sample + sample) * plan.group - block.begin, end_row = first_row + plan.group;
    if (batch == 0 && first_row >= 0) block.keep_token(stage, block.first_sample + sample);
    for (int row = first_row > 0 ? first_row : 0; row < end_row && row < count; ++row) {
      float q_row[S::kHeld];
      DF_UNROLL
      for (int i = 0; i < S::kHeld; ++i)
        q_row[i] = to_float(q[row * S::kStride + Part::channel(i / S::kChunk) + i % S::kChunk]) * factor;
      Part r(q_row, stage, there, batch == 0);
      if (alone) {
        r.merge(parts, row);
        for (int w = 1; w < kWarps && batch == 0 && !plan.wide; ++w) r.merge(parts, 16 * w + row);
        last ? block.write(row, r) : r.store(parts, row);
      } else {
        r.merge(parts, 16 * warp + row);
        r.store(parts, 16 * warp + row);
      }
    }
    sample = next_sample;
    batch = next_batch;
    there = next_there;
  }
  if (alone) return;
  __syncthreads();
  for (int row = warp; row < count; row += kWarps) {
    Part r;
    for (int w = 0; w < kWarps; ++w) r.merge(parts, 16 * w + row);
    block.write(row, r);
  }
}

// ---- launch

template <typename Tensor>
bool is_vector_tensor(const Tensor& t, int chunk) {
  bool rows = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride_b % chunk == 0 && t.stride_h % chunk == 0;
  if constexpr (std::is_same_v<Tensor, Tensor4>) rows = rows && t.stride_l % chunk == 0 && t.stride_l < kMostStride;
  return rows;
}
bool has_vectors(const Params& p, int chunk) {
  for (const Tensor3* t : {&p.q, &p.k, &p.v, &p.out})
    if (!is_vector_tensor(*t, chunk)) return false;
  for (const Tensor4* t : {&p.text_k, &p.text_v, &p.image_k, &p.image_v})
    if (!is_vector_tensor(*t, chunk)) return false;
  return p.head_dim % chunk == 0;
}

// Whether blocks of so many rows take the large plan; on every device, what they take fits.
template <typename T, int kDim>
constexpr bool is_large([[maybe_unused]] int rows, [[maybe_unused]] std::size_t limit) {
  using Large = Shape<T, kDim, true>;
  if constexpr (Large::kHasSmall)
    return takes_large_plan(Large::bytes(rows), Shape<T, kDim, false>::bytes(rows), Large::kBlocks, limit);
  else
    return true;
}
template <typename T, int kDim>
constexpr bool all_plans_fit(int rows) {
  return fits_every_device([rows](std::size_t limit) constexpr {
    constexpr bool kHasSmall = Shape<T, kDim, true>::kHasSmall;
    return is_large<T, kDim>(rows, limit) ? Shape<T, kDim, true>::bytes(rows) : Shape<T, kDim, !kHasSmall>::bytes(rows);
  });
}

template <typename T, int kDim, bool kLarge>
void launch(const Params& p, const Plan& plan, int64_t blocks, void* stream) {
  using S = Shape<T, kDim, kLarge>;
  allow_dynamic_shared(decode_kernel<T, kDim, kLarge>, S::bytes(plan.rows));
  DF_LAUNCH((decode_kernel<T, kDim, kLarge>), static_cast<unsigned>(blocks), S::kThreads, S::bytes(plan.rows), stream,
            p, plan);
}

template <typename T, int kDim>
void run(const Params& p, void* stream) {
  using S = Shape<T, kDim, true>;  // with the tiles, chunks and rows of the small one
  static_assert(all_plans_fit<T, kDim>(16) && all_plans_fit<T, kDim>(S::kManyRows), "shared memory of a device");
  const int64_t share = p.batch / p.text_batch, group = p.num_heads / p.num_kv_heads, rows = share * group;
  const int64_t heads = p.text_batch * p.num_kv_heads;
  const auto tiles = [&](int64_t of) { return (rows + of - 1) / of; };
  if (p.batch * p.num_heads > INT32_MAX) throw std::invalid_argument("q: expected fewer than 2^31 rows");
  // 64 rows share each text key, but 16 leave more blocks, and more warps for the text of each
  Plan plan(p);
  plan.wide = S::kManyRows > 16 && rows > 16 && 2 * heads * tiles(S::kManyRows) >= 3 * multiprocessors(p.device.index);
  plan.rows = plan.wide ? S::kManyRows : 16;
  plan.rows_of_caption = static_cast<int>(rows);
  plan.share = static_cast<int>(share);
  plan.tiles = static_cast<int>(tiles(plan.rows));
  plan.group = static_cast<int>(group);
  plan.by_tiles = Divisor(static_cast<uint32_t>(plan.tiles));
  plan.by_kv_heads = Divisor(static_cast<uint32_t>(p.num_kv_heads));
  plan.by_group = Divisor(static_cast<uint32_t>(group));
  plan.vectors = has_vectors(p, S::kChunk);
  if constexpr (S::kHasSmall)
    if (!is_large<T, kDim>(plan.rows, shared_limit(p.device.index)))
      return launch<T, kDim, false>(p, plan, heads * plan.tiles, stream);
  launch<T, kDim, true>(p, plan, heads * plan.tiles, stream);
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
