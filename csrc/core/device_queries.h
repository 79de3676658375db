// SPDX-License-Identifier: MIT
// What the CUDA runtime says about the driver, the devices and this build's kernels on them: by cuda_queries.cu, or by
// the tests' simulated devices (csrc/simt/device.cpp). Nothing throws, nothing needs a driver.
#pragma once

#include <cstddef>
#include <string>

namespace dalle_fast {

struct DeviceCount {
  int count = 0;
  std::string error;  // in the runtime's words; empty: none
};
struct DeviceProperties {
  std::string name;
  int major = 0, minor = 0;
  std::size_t shared_memory = 0;  // bytes a block may have, static and dynamic together
  int num_sms = 0;
};
// The code of a kernel on a device: compiled for sm_<binary> from compute_<ptx>.
struct KernelImage {
  int binary = 0, ptx = 0;
  std::string error;  // why there is none, in the runtime's words
};

int driver_version();   // 13000: CUDA 13.0; 0: no driver
int runtime_version();  // that the kernels were built with
DeviceCount count_devices();
DeviceProperties properties_of(int device);
KernelImage image_on(int device);

}  // namespace dalle_fast
