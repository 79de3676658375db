// SPDX-License-Identifier: MIT
#include "cuda_status.h"

namespace dalle_fast {
namespace {

constexpr int kLeastMajor = 8;  // bfloat16, mma.m16n8k16, cp.async

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}
std::string capability_text(const DeviceProperties& p) {
  return std::to_string(p.major) + "." + std::to_string(p.minor);
}
std::string versions_text() {
  return "the driver is for CUDA " + version_text(driver_version()) + ", the kernels were built with CUDA " +
         version_text(runtime_version());
}

// why there is no device at all; empty: there are some
std::string problem_of_all() {
  const DeviceCount devices = count_devices();
  if (!devices.error.empty()) {
    if (driver_version() == 0) return devices.error + " (no NVIDIA driver is loaded)";
    return driver_version() / 1000 < runtime_version() / 1000 ? devices.error + " (" + versions_text() + ")"
                                                              : devices.error;
  }
  return devices.count > 0 ? "" : "no CUDA device";
}

DeviceStatus status_of(int device) {
  DeviceStatus status{properties_of(device), "", ""};
  if (status.properties.major < kLeastMajor) {
    status.problem = "its compute capability is " + capability_text(status.properties) + ", the kernels need " +
                     std::to_string(kLeastMajor) + ".0 or newer";
    return status;
  }
  const KernelImage image = image_on(device);
  if (image.error.empty()) {
    status.image = "sm_" + std::to_string(image.binary);
    if (image.ptx < image.binary) status.image += " from compute_" + std::to_string(image.ptx);
  } else {
    status.problem = "no code of the kernels loads on its compute capability " + capability_text(status.properties) +
                     ": " + image.error;
    if (driver_version() < runtime_version()) status.problem += " (" + versions_text() + ")";
  }
  return status;
}

}  // namespace

std::string cuda_status() {
  const std::string problem = problem_of_all();
  if (!problem.empty()) return problem;
  std::string first;
  for (int device = 0; device < count_devices().count; ++device) {
    const std::string its = status_of(device).problem;
    if (its.empty()) return "ok";
    if (first.empty()) first = its;
  }
  return "device 0: " + first;
}

std::string cuda_problem(int device) {
  const std::string problem = problem_of_all();
  if (!problem.empty()) return problem;
  if (device < 0 || device >= count_devices().count) return "there is no CUDA device " + std::to_string(device);
  return status_of(device).problem;
}

std::vector<DeviceStatus> cuda_devices() {
  std::vector<DeviceStatus> all;
  const DeviceCount devices = count_devices();
  for (int device = 0; devices.error.empty() && device < devices.count; ++device) all.push_back(status_of(device));
  return all;
}

}  // namespace dalle_fast
