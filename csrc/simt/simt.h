// SPDX-License-Identifier: MIT
// Stands in for the CUDA runtime when .cu files are compiled by a C++ compiler: kernels run on the CPU, thread by
// thread.
//
// Threads are fibers. Between two synchronisation points a thread runs alone; which one comes next is random, in fair
// turns or by ranks of warps, seeded with DALLE_FAST_SIMT_SEED or seed(). Shared memory is filled with NaN before each
// block. A barrier that not all threads reach, or that they reach at different lines, is an error that names block,
// thread and line. The blocks of a cluster live at the same time; the shared memory of one is filled with NaN again
// when its first thread begins and when its last has returned. Kernels meet this header through core/device.cuh only.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

struct Place {
  dim3 thread, block, block_size, grid;
  unsigned cluster_rank, cluster_size;
};
extern Place here;  // of the thread that runs

struct Site {
  const char* file;
  int line;
};

void seed(uint64_t value);

// Bugs that tests plant in any kernel: the barrier at "file:line" does nothing (empty: none), the last block of a grid
// is never run (in clusters, the last cluster). barriers() are the places of all barriers met so far, of blocks and of
// clusters; forget_barriers() starts anew.
void remove_barrier(const std::string& place);
void drop_last_block(bool drop);
std::vector<std::string> barriers();
void forget_barriers();

struct Launch {
  dim3 grid, block;
  unsigned cluster;  // blocks in a row along x
  std::size_t shared_bytes;
  const char* name;
  const void* address;  // of the kernel
};
// Throws where the simulated device (device.h) would refuse it.
void launch(const Launch& launch, const std::function<void()>& kernel);

// What was launched since the last call.
struct Launched {
  std::string name;
  uint64_t blocks;
  unsigned cluster;
  std::size_t fixed_bytes, dynamic_bytes;  // shared memory of a block
};
std::vector<Launched> take_launches();
void sync_block(const Site& site);
void cluster_barrier(const Site& site);
// The whole warp meets; `together` then runs once, on what each lane brought (a pointer into its stack).
void collective(void* mine, void (*together)(void* const* lanes), const Site& site);
// Asynchronous copies: each happens at once or, as if by chance, only when its thread waits for it; one that nobody
// waits for may never happen. `bytes` 0 fills with zeros.
void copy_async(void* to, const void* from, std::size_t size, std::size_t bytes, const Site& site);
void commit_copies();
void wait_copies(unsigned pending_groups);
void forget_waits(bool forget);  // a planted bug: waits do nothing
[[noreturn]] void fail_here(const std::string& what, const Site& site);
inline void require_aligned(const void* p, std::size_t bytes, const char* what, const Site& site) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes)
    fail_here(std::string(what) + " is not aligned to " + std::to_string(bytes) + " bytes", site);
}
// Waits for all lanes of `mask`; returns what each of the 32 lanes of the warp gave.
const uint64_t* exchange(unsigned mask, uint64_t value, const Site& site);
void* static_shared(std::size_t bytes, const Site& site);
void* dynamic_shared();
void* map_shared(const void* mine, unsigned rank, const Site& site);  // the same place in a block of the cluster

inline unsigned linear_thread() {
  return here.thread.x + here.block_size.x * (here.thread.y + here.block_size.y * here.thread.z);
}
inline unsigned lane() { return linear_thread() % 32; }

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const Site& site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move at most 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  const uint64_t* words = exchange(mask, word, site);
  const uint64_t got = words[source < 32 ? source : lane()];
  std::memcpy(&value, &got, sizeof value);
  return value;
}
inline uint32_t mul_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }
inline unsigned ballot(unsigned mask, bool vote, const Site& site) {
  const uint64_t* votes = exchange(mask, vote, site);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1u) && votes[i]) bits |= 1u << i;
  return bits;
}

}  // namespace simt

#define threadIdx (::simt::here.thread)
#define blockIdx (::simt::here.block)
#define blockDim (::simt::here.block_size)
#define gridDim (::simt::here.grid)

#define DF_SIMT_SITE \
  ::simt::Site { __FILE__, __LINE__ }
#define __syncthreads() ::simt::sync_block(DF_SIMT_SITE)
#define __umulhi(a, b) ::simt::mul_high((a), (b))
#define __syncwarp() (void)::simt::exchange(0xffffffffu, 0, DF_SIMT_SITE)
#define __shfl_sync(mask, value, source) ::simt::shuffle((mask), (value), (source), DF_SIMT_SITE)
#define __shfl_xor_sync(mask, value, bits) ::simt::shuffle((mask), (value), ::simt::lane() ^ (bits), DF_SIMT_SITE)
#define __shfl_down_sync(mask, value, by) ::simt::shuffle((mask), (value), ::simt::lane() + (by), DF_SIMT_SITE)
#define __ballot_sync(mask, vote) ::simt::ballot((mask), (vote), DF_SIMT_SITE)
#define __any_sync(mask, vote) (::simt::ballot((mask), (vote), DF_SIMT_SITE) != 0)
