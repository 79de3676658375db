// SPDX-License-Identifier: MIT
// Whether this build's kernels can run, and why not. Nothing here throws or needs a driver.
#pragma once

#include <string>
#include <vector>

#include "device_queries.h"

namespace dalle_fast {

struct DeviceStatus {
  DeviceProperties properties;
  std::string image;    // the code that its kernels have: "sm_90", "sm_100 from compute_90"; empty: none
  std::string problem;  // why they cannot run; empty: they can
};

// "ok", or why no kernel can run on any device.
std::string cuda_status();
// Empty, or why no kernel can run on this device. Asks about the code, which makes the device ready for use.
std::string cuda_problem(int device);
std::vector<DeviceStatus> cuda_devices();

}  // namespace dalle_fast
