// SPDX-License-Identifier: MIT
#include "device.h"

#include <map>
#include <sstream>
#include <stdexcept>

#include "../core/shared_memory.h"

namespace simt {
namespace {

using dalle_fast::DeviceCount;
using dalle_fast::DeviceProperties;
using dalle_fast::KernelImage;

Platform& current() {
  static auto* made = new Platform();
  return *made;
}
std::map<const void*, std::size_t>& allowed() {
  static auto* made = new std::map<const void*, std::size_t>();
  return *made;
}

// What a driver loads of code for `archs`: the newest machine code of the same major version that is not newer than the
// device, otherwise the newest PTX, compiled for the device.
KernelImage image_for(const DeviceProperties& device, const Platform& platform) {
  KernelImage best;
  int newest_ptx = 0;
  std::istringstream archs(platform.archs);
  for (std::string arch; archs >> arch;) {
    const bool has_ptx = arch.size() > 4 && arch.compare(arch.size() - 4, 4, "+PTX") == 0;
    const std::size_t dot = arch.find('.');
    const int major = std::stoi(arch.substr(0, dot)), minor = std::stoi(arch.substr(dot + 1)), sm = major * 10 + minor;
    if (major == device.major && minor <= device.minor && sm > best.binary) best.binary = best.ptx = sm;
    if (has_ptx && sm <= device.major * 10 + device.minor && sm > newest_ptx) newest_ptx = sm;
  }
  if (best.binary) return best;
  if (!newest_ptx)
    best.error = "no kernel image is available for execution on the device";
  else if (platform.driver < platform.runtime)
    best.error = "the provided PTX was compiled with an unsupported toolchain.";
  else
    best = {device.major * 10 + device.minor, newest_ptx, ""};
  return best;
}

}  // namespace

const Platform& platform() { return current(); }
void set_platform(const Platform& platform) {
  current() = platform;
  allowed().clear();
}

const DeviceProperties& device() {
  if (current().devices.empty()) throw std::runtime_error("simt: no CUDA device");
  return current().devices.front();
}

bool has_clusters() { return image_for(device(), current()).ptx >= 90; }

void allow_dynamic_shared(const void* kernel, std::size_t bytes) {
  if (bytes > allowed()[kernel]) allowed()[kernel] = bytes;
}

std::string refusal(const void* kernel, std::size_t fixed_bytes, std::size_t dynamic_bytes) {
  const KernelImage image = image_for(device(), current());
  if (!image.error.empty()) return image.error;
  if (fixed_bytes > dalle_fast::kMostStatic) return std::to_string(fixed_bytes) + " bytes of static shared memory";
  const std::size_t bytes = fixed_bytes + dynamic_bytes;
  if (bytes > device().shared_memory)
    return "invalid argument: " + std::to_string(bytes) + " bytes of shared memory, where the device has " +
           std::to_string(device().shared_memory);
  if (bytes > dalle_fast::kMostStatic && dynamic_bytes > allowed()[kernel])
    return "invalid argument: " + std::to_string(bytes) + " bytes of shared memory, which nobody has allowed";
  return "";
}

}  // namespace simt

namespace dalle_fast {

int driver_version() { return simt::platform().driver; }
int runtime_version() { return simt::platform().runtime; }
DeviceCount count_devices() {
  if (driver_version() / 1000 < runtime_version() / 1000)
    return {0, "CUDA driver version is insufficient for CUDA runtime version"};
  if (simt::platform().devices.empty()) return {0, "no CUDA-capable device is detected"};
  return {static_cast<int>(simt::platform().devices.size()), ""};
}
DeviceProperties properties_of(int device) { return simt::platform().devices.at(static_cast<std::size_t>(device)); }
KernelImage image_on(int device) { return simt::image_for(properties_of(device), simt::platform()); }

}  // namespace dalle_fast
