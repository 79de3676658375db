// SPDX-License-Identifier: MIT
// What .cu files use of the CUDA runtime: error checks, the device guard, the launch, shared memory. With DF_SIMT the
// same names are implemented on the host (csrc/simt/).
#pragma once

#if defined(DF_SIMT)
#include "../simt/simt.h"

#define DF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), ::simt::launch((grid), (block), (shared_bytes), #kernel, [&] { kernel(__VA_ARGS__); }))
#define DF_SHARED(T, name, count) \
  T* const name = static_cast<T*>(::simt::static_shared(sizeof(T) * (count), DF_SIMT_SITE))
#define DF_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::simt::dynamic_shared())
#define DF_UNROLL
#define DF_KEEP_LOOP

namespace dalle_fast {
class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
};
inline std::size_t dynamic_shared_limit(int) { return 16 * 1024; }  // small, so that tests meet both sides of it
template <typename Kernel>
void allow_dynamic_shared(Kernel, std::size_t) {}
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

// Shared memory of a block: an array of a constant size, or what the launch asked for.
#define DF_SHARED(T, name, count) __shared__ T name[count]
#define DF_UNROLL _Pragma("unroll")
#define DF_KEEP_LOOP _Pragma("unroll 1")
#define DF_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char df_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(df_dynamic_shared)

namespace dalle_fast {

inline void check_cuda(cudaError_t status, const char* what, const char* file, int line) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" + file + ":" +
                             std::to_string(line) + ")");
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

// Bytes of shared memory a block may have in all, and leave for a kernel to use more than 48 KiB of it.
inline std::size_t dynamic_shared_limit(int device) {
  int bytes = 0;
  DF_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<std::size_t>(bytes);
}
template <typename Kernel>
void allow_dynamic_shared(Kernel kernel, std::size_t bytes) {
  if (bytes > 32 * 1024)
    DF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

}  // namespace dalle_fast

#endif
