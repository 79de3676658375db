// SPDX-License-Identifier: MIT
#include "cuda_status.h"

#include <cuda_runtime.h>

namespace dalle_fast {

std::string cuda_status() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return count > 0 ? "ok" : "no CUDA device";
}

}  // namespace dalle_fast
