// SPDX-License-Identifier: MIT
// What .cu files use of the CUDA runtime: error checks, the device guard and the launch.
#pragma once

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

}  // namespace dalle_fast
