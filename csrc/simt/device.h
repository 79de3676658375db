// SPDX-License-Identifier: MIT
// The devices that the executor pretends to have: what core/device_queries.h and core/device.cuh answer about them.
// Kernels run on the first one, and a launch that it would refuse is refused.
#pragma once

#include <string>
#include <vector>

#include "../core/device_queries.h"

namespace simt {

struct Platform {
  // few SMs, so that small grids fill them
  std::vector<dalle_fast::DeviceProperties> devices{{"simulated", 9, 0, std::size_t{227} << 10, 2}};
  std::string archs = "8.0 9.0+PTX";  // that the kernels were compiled for, as DF_CUDA_ARCHS
  int driver = 13000, runtime = 13000;
};

const Platform& platform();
void set_platform(const Platform& platform);

const dalle_fast::DeviceProperties& device();  // that kernels run on
bool has_clusters();                           // whether the code that it has loaded knows them

// As cudaFuncSetAttribute: how much dynamic shared memory launches of a kernel may ask for beyond 48 KiB.
void allow_dynamic_shared(const void* kernel, std::size_t bytes);
// Why a block of `kernel` with so much shared memory is refused; empty: it is not.
std::string refusal(const void* kernel, std::size_t fixed_bytes, std::size_t dynamic_bytes);

}  // namespace simt
