// SPDX-License-Identifier: MIT
// Small kernels with a planted bug each, which the executor's tests must see it find (tests/test_simt.py).
#include <stdexcept>
#include <string>

#include "../core/mma.cuh"

namespace dalle_fast::simt_controls {
namespace {

constexpr int kThreads = 64;

// out[0] = sum of in[0..63], by a tree in shared memory
template <bool kBarrier>
__global__ void tree_sum(float* out, const float* in) {
  DF_SHARED(float, part, kThreads);
  const unsigned t = threadIdx.x;
  part[t] = in[t];
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (kBarrier) __syncthreads();
    if (t < half) part[t] += part[t + half];
  }
  if (t == 0) out[0] = part[0];
}

// the same in registers of two warps
template <bool kWhole>
__global__ void warp_sum(float* out, const float* in) {
  DF_SHARED(float, part, 2);
  float x = in[threadIdx.x];
  if (kWhole || threadIdx.x % 32 < 31)  // a lane that leaves before the shuffle
    for (unsigned bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = part[0] + part[1];
}

// half of the block takes another barrier
template <bool kDivergent>
__global__ void two_barriers(float* out, const float* in) {
  DF_SHARED(float, part, kThreads);
  part[threadIdx.x] = in[threadIdx.x];
  if (kDivergent && threadIdx.x < kThreads / 2) {
    __syncthreads();  // another one than below
  } else {
    __syncthreads();
  }
  float sum = 0.0f;
  for (int i = 0; i < kThreads; ++i) sum += part[i];
  if (threadIdx.x == 0) out[0] = sum;
}

// the last element of the tile is never loaded
template <bool kShort>
__global__ void short_tile(float* out, const float* in) {
  DF_SHARED(float, tile, kThreads);
  if (!kShort || threadIdx.x + 1 < kThreads) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < kThreads; ++i) sum += tile[i];
  if (threadIdx.x == 0) out[0] = sum;
}

// an element behind the tile is written
template <bool kOver>
__global__ void tile_overrun(float* out, const float* in) {
  DF_SHARED(float, tile, kThreads);
  tile[threadIdx.x + (kOver && threadIdx.x + 1 == kThreads ? 1 : 0)] = in[threadIdx.x];
  if (kOver && threadIdx.x + 1 == kThreads) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < kThreads; ++i) sum += tile[i];
  if (threadIdx.x == 0) out[0] = sum;
}

struct alignas(16) Four {
  float at[4];
};

// vectors of four that begin one element too early or where they should
template <bool kMisaligned>
__global__ void vector_sum(float* out, const float* in) {
  DF_SHARED(Four, tile, kThreads / 4 + 1);
  float* const base = reinterpret_cast<float*>(tile) + (kMisaligned ? 1 : 0);
  base[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < kThreads / 4; ++i) {
    const Four four = reinterpret_cast<const Four*>(base)[i];
    sum += (four.at[0] + four.at[1]) + (four.at[2] + four.at[3]);
  }
  if (threadIdx.x == 0) out[0] = sum;
}

// tiles of 16 bytes come by asynchronous copies
template <bool kWait, bool kAligned>
__global__ void copied_sum(float* out, const float* in) {
  DF_SHARED(Vector16, tile, kThreads / 4);
  auto* const to = reinterpret_cast<float*>(tile);
  if (threadIdx.x < kThreads / 4 - 1)
    DF_COPY_ASYNC_16(to + 4 * threadIdx.x, in + 4 * threadIdx.x + (kAligned ? 0 : 1), true);
  if (threadIdx.x >= kThreads - 4) to[threadIdx.x] = in[threadIdx.x];
  copy_async_commit();
  if (kWait) copy_async_wait<0>();
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < kThreads; ++i) sum += to[i];
  if (threadIdx.x == 0) out[0] = sum;
}

// the sum of the first 60, in tiles of 16: the last has an edge
template <bool kWrong>
__global__ void masked_sum(float* out, const float* in) {
  float sum = 0.0f;
  const int lane = threadIdx.x % 16;
  for (int tile = 0; tile < kThreads; tile += 16)
    if (kWrong ? tile + lane <= 60 : tile + lane < 60) sum += in[tile + lane];
  for (unsigned bits = 8; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (threadIdx.x == 0) out[0] = sum + in[60] + in[61] + in[62] + in[63];
}

// the sum by way of dynamic shared memory, of which nothing but 64 numbers are used, and kStatic more words
template <int kStatic>
__global__ void dynamic_sum(float* out, const float* in) {
  DF_DYNAMIC_SHARED(float, tile);
  DF_SHARED(float, part, kStatic);
  tile[threadIdx.x] = in[threadIdx.x];
  part[0] = 0.0f;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 0; i < kThreads; ++i) part[0] += tile[i];
  out[0] = part[0];
}

template <int kStatic>
void run_with_shared(std::size_t bytes, bool allow, float* out, const float* in) {
  if (allow) allow_dynamic_shared(dynamic_sum<kStatic>, bytes);
  DF_LAUNCH(dynamic_sum<kStatic>, 1, kThreads, bytes, nullptr, out, in);
}

enum class ClusterBug { kNone, kNoBarrier, kLeaves, kHasLeft, kDivergent, kReturns };

constexpr unsigned kCluster = 4, kShare = kThreads / kCluster;

// the same in a cluster: the first block reads what all have
template <ClusterBug kBug>
__global__ void cluster_sum(float* out, const float* in) {
  DF_SHARED(float, part, kShare);
  const unsigned rank = cluster_rank();
  part[threadIdx.x] = in[rank * kShare + threadIdx.x];
  const float* theirs[kCluster];
  for (unsigned r = 0; r < cluster_size(); ++r) theirs[r] = remote_shared(part, r);
  if (kBug == ClusterBug::kDivergent && rank == 1) {
    sync_cluster();  // another one than below
  } else if (kBug != ClusterBug::kNoBarrier) {
    sync_cluster();
  }
  if (kBug == ClusterBug::kReturns && rank == 1) return;
  constexpr bool kLeaves = kBug == ClusterBug::kLeaves || kBug == ClusterBug::kHasLeft;
  if (kLeaves) __syncthreads();  // others are gone before the first block goes on
  if (rank == 0 && threadIdx.x == 0) {
    float sum = 0.0f;
    for (unsigned r = 0; r < cluster_size(); ++r) {
      if (kBug == ClusterBug::kHasLeft) theirs[r] = remote_shared(part, r);
      for (unsigned i = 0; i < kShare; ++i) sum += theirs[r][i];
    }
    out[0] = sum;
  }
  if (!kLeaves) sync_cluster();
}

template <ClusterBug kBug>
void run_clusters(bool planted, float* out, const float* in) {
  void* stream = nullptr;
  planted ? DF_LAUNCH_CLUSTER(cluster_sum<kBug>, kCluster, kShare, kCluster, 0, stream, out, in)
          : DF_LAUNCH_CLUSTER(cluster_sum<ClusterBug::kNone>, kCluster, kShare, kCluster, 0, stream, out, in);
}

}  // namespace

// Runs a control, with or without its bug; out and in are float32 on the host, 1 and 64 of them, `in` aligned to 16
// bytes.
void run(const std::string& name, bool planted, float* out, const float* in) {
  void* stream = nullptr;
  if (name == "barrier_removed") {
    planted ? DF_LAUNCH(tree_sum<false>, 1, kThreads, 0, stream, out, in)
            : DF_LAUNCH(tree_sum<true>, 1, kThreads, 0, stream, out, in);
  } else if (name == "lane_missing") {
    planted ? DF_LAUNCH(warp_sum<false>, 1, kThreads, 0, stream, out, in)
            : DF_LAUNCH(warp_sum<true>, 1, kThreads, 0, stream, out, in);
  } else if (name == "barrier_divergent") {
    planted ? DF_LAUNCH(two_barriers<true>, 1, kThreads, 0, stream, out, in)
            : DF_LAUNCH(two_barriers<false>, 1, kThreads, 0, stream, out, in);
  } else if (name == "tile_short") {
    planted ? DF_LAUNCH(short_tile<true>, 1, kThreads, 0, stream, out, in)
            : DF_LAUNCH(short_tile<false>, 1, kThreads, 0, stream, out, in);
  } else if (name == "tile_overrun") {
    planted ? DF_LAUNCH(tile_overrun<true>, 1, kThreads, 0, stream, out, in)
            : DF_LAUNCH(tile_overrun<false>, 1, kThreads, 0, stream, out, in);
  } else if (name == "misaligned_vector") {
    planted ? DF_LAUNCH(vector_sum<true>, 1, kThreads, 0, stream, out, in)
            : DF_LAUNCH(vector_sum<false>, 1, kThreads, 0, stream, out, in);
  } else if (name == "copy_not_waited") {
    planted ? DF_LAUNCH((copied_sum<false, true>), 1, kThreads, 0, stream, out, in)
            : DF_LAUNCH((copied_sum<true, true>), 1, kThreads, 0, stream, out, in);
  } else if (name == "copy_misaligned") {
    planted ? DF_LAUNCH((copied_sum<true, false>), 1, kThreads, 0, stream, out, in)
            : DF_LAUNCH((copied_sum<true, true>), 1, kThreads, 0, stream, out, in);
  } else if (name == "cluster_barrier_removed") {
    run_clusters<ClusterBug::kNoBarrier>(planted, out, in);
  } else if (name == "cluster_block_leaves") {
    run_clusters<ClusterBug::kLeaves>(planted, out, in);
  } else if (name == "cluster_block_has_left") {
    run_clusters<ClusterBug::kHasLeft>(planted, out, in);
  } else if (name == "cluster_barrier_divergent") {
    run_clusters<ClusterBug::kDivergent>(planted, out, in);
  } else if (name == "cluster_block_returns") {
    run_clusters<ClusterBug::kReturns>(planted, out, in);
  } else if (name == "shared_fits") {
    run_with_shared<1>(kLeastSharedLimit - 4, true, out, in);
  } else if (name == "shared_exceeds") {
    run_with_shared<1>(kLeastSharedLimit - (planted ? 0 : 4), true, out, in);
  } else if (name == "static_exceeds") {
    planted ? run_with_shared<9>(kLeastSharedLimit - 32, true, out, in)
            : run_with_shared<8>(kLeastSharedLimit - 32, true, out, in);
  } else if (name == "shared_not_allowed") {
    run_with_shared<2>(planted ? 64 << 10 : 40 << 10, false, out, in);
  } else if (name == "edge_mask") {
    planted ? DF_LAUNCH(masked_sum<true>, 1, kThreads, 0, stream, out, in)
            : DF_LAUNCH(masked_sum<false>, 1, kThreads, 0, stream, out, in);
  } else {
    throw std::invalid_argument("name: no such control: " + name);
  }
}

}  // namespace dalle_fast::simt_controls
