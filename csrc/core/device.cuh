// SPDX-License-Identifier: MIT
// What .cu files use of the CUDA runtime: error checks, the device guard, the launch, shared memory, clusters of
// blocks. With DF_SIMT the same names are implemented on the host (csrc/simt/).
#pragma once

#include "shared_memory.h"

#if defined(DF_SIMT)
#include "../simt/device.h"
#include "../simt/simt.h"

#define DF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  DF_LAUNCH_CLUSTER(kernel, grid, block, 1, shared_bytes, stream, __VA_ARGS__)
#define DF_LAUNCH_CLUSTER(kernel, grid, block, cluster, shared_bytes, stream, ...)                                \
  ((void)(stream), ::simt::launch({(grid), (block), (cluster), (shared_bytes), #kernel, DF_SIMT_ADDRESS(kernel)}, \
                                  [&] { kernel(__VA_ARGS__); }))
#define DF_SIMT_ADDRESS(kernel) reinterpret_cast<const void*>(+kernel)
#define DF_SHARED(T, name, count)                                         \
  static_assert(sizeof(T) * (count) <= ::dalle_fast::kMostStatic, #name); \
  T* const name = static_cast<T*>(::simt::static_shared(sizeof(T) * (count), DF_SIMT_SITE))
#define DF_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::simt::dynamic_shared())
#define DF_UNROLL
#define DF_UNROLL_BY(count)
#define DF_NO_UNROLL
#define sync_cluster() ::simt::cluster_barrier(DF_SIMT_SITE)
#define remote_shared(mine, rank) \
  static_cast<std::decay_t<decltype(mine)>>(::simt::map_shared((mine), (rank), DF_SIMT_SITE))

namespace dalle_fast {
inline unsigned cluster_rank() { return ::simt::here.cluster_rank; }
inline unsigned cluster_size() { return ::simt::here.cluster_size; }
class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
};
inline std::size_t shared_limit(int) { return ::simt::device().shared_memory; }
inline int multiprocessors(int) { return ::simt::device().num_sms; }
template <typename Kernel>
void allow_dynamic_shared(Kernel kernel, std::size_t bytes) {
  ::simt::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes);
}
template <typename Kernel>
bool has_clusters(Kernel) {
  return ::simt::has_clusters();
}
}  // namespace dalle_fast

#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define DF_CUDA_CHECK(call) ::dalle_fast::check_cuda((call), #call, __FILE__, __LINE__)

// Launches and reports a bad configuration at once; errors inside the kernel surface at the next synchronisation.
#define DF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                \
  do {                                                                                           \
    kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ::dalle_fast::check_cuda(cudaGetLastError(), "launch of " #kernel, __FILE__, __LINE__);      \
  } while (0)

// The same with clusters of `cluster` blocks, neighbours along x, where its code has them (has_clusters); up to 8.
#define DF_LAUNCH_CLUSTER(kernel, grid, block, cluster, shared_bytes, stream, ...)                   \
  ::dalle_fast::check_cuda(                                                                          \
      ::dalle_fast::launch_cluster(kernel, grid, block, cluster, shared_bytes, stream, __VA_ARGS__), \
      "launch of " #kernel, __FILE__, __LINE__)

// Shared memory of a block: an array of a constant size, or what the launch asked for.
#define DF_SHARED(T, name, count)                                         \
  static_assert(sizeof(T) * (count) <= ::dalle_fast::kMostStatic, #name); \
  __shared__ T name[count]
#define DF_UNROLL _Pragma("unroll")
#define DF_PRAGMA(text) _Pragma(#text)
#define DF_UNROLL_BY(count) DF_PRAGMA(unroll count)
#define DF_NO_UNROLL DF_UNROLL_BY(1)  // long bodies, and loops of asynchronous copies, which do not wait anyway
#define DF_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char df_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(df_dynamic_shared)

namespace dalle_fast {

inline void check_cuda(cudaError_t status, const char* what, const char* file, int line) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" + file + ":" +
                             std::to_string(line) + ")");
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster,
                           std::size_t shared_bytes, void* stream, Arguments&&... arguments) {
  cudaLaunchAttribute shape{};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = cluster;
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &shape;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
}

// Makes `index` the current device until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    DF_CUDA_CHECK(cudaGetDevice(&previous_));
    if (previous_ != index) DF_CUDA_CHECK(cudaSetDevice(index));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

inline int multiprocessors(int device) {
  int count = 0;
  DF_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Bytes of shared memory a block may have, static and dynamic together.
inline std::size_t shared_limit(int device) {
  int bytes = 0;
  DF_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<std::size_t>(bytes);
}

// Leave for a kernel's launches on the current device to ask for so much dynamic shared memory: beyond 48 KiB, static
// and dynamic, they need it. Throws where the device does not have it.
template <typename Kernel>
void allow_dynamic_shared(Kernel kernel, std::size_t bytes) {
  if (bytes <= 32 * 1024) return;
  cudaFuncAttributes now;
  DF_CUDA_CHECK(cudaFuncGetAttributes(&now, kernel));
  if (static_cast<std::size_t>(now.maxDynamicSharedSizeBytes) >= bytes) return;
  int device = 0;
  DF_CUDA_CHECK(cudaGetDevice(&device));
  // All that there is, as another host thread may be about to launch with more. Where the static part already counts
  // what is reserved for each block (code for sm_90 declares it), `bytes` can be more than that: the runtime judges.
  const std::size_t limit = shared_limit(device), fixed = now.sharedSizeBytes;
  const std::size_t most = fixed + bytes <= limit ? limit - fixed : bytes;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)) !=
      cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("a kernel needs " + std::to_string(bytes) +
                             " bytes of dynamic shared memory a block and " + std::to_string(fixed) +
                             " of its own, device " + std::to_string(device) + " has " + std::to_string(limit));
  }
}

// Whether blocks of a kernel can form clusters on the current device. That is up to the code that is loaded: what was
// compiled from PTX below compute_90 knows clusters of one only, on newer devices too.
template <typename Kernel>
bool has_clusters(Kernel kernel) {
  cudaFuncAttributes loaded;
  DF_CUDA_CHECK(cudaFuncGetAttributes(&loaded, kernel));
  return loaded.ptxVersion >= 90 && loaded.binaryVersion >= 90;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// All threads of the cluster meet; what they wrote before, to any shared memory of the cluster, is seen after it. The
// first one also makes sure that all blocks have begun, the last one that none has left too early.
__device__ __forceinline__ void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// The same address in the shared memory of another block of the cluster
template <typename T>
__device__ __forceinline__ T* remote_shared(T* mine, unsigned rank) {
  T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(rank));
  return there;
}
#else
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void sync_cluster() { __syncthreads(); }
template <typename T>
__device__ __forceinline__ T* remote_shared(T* mine, unsigned) {
  return mine;
}
#endif

}  // namespace dalle_fast

#endif
