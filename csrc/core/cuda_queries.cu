// SPDX-License-Identifier: MIT
#include "device.cuh"
#include "device_queries.h"

namespace dalle_fast {
namespace {

__global__ void probe() {}  // compiled for the same architectures as all kernels

// An error that was answered in words must not turn up at the next launch.
std::string words(cudaError_t status) {
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(status);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  words(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace

int driver_version() {
  int version = 0;
  words(cudaDriverGetVersion(&version));
  return version;
}

int runtime_version() {
  int version = 0;
  words(cudaRuntimeGetVersion(&version));
  return version;
}

DeviceCount count_devices() {
  DeviceCount devices;
  devices.error = words(cudaGetDeviceCount(&devices.count));
  return devices;
}

DeviceProperties properties_of(int device) {
  DeviceProperties p;
  cudaDeviceProp all{};
  if (words(cudaGetDeviceProperties(&all, device)).empty()) p.name = all.name;
  p.major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  p.minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  p.shared_memory = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  p.num_sms = attribute(cudaDevAttrMultiProcessorCount, device);
  return p;
}

KernelImage image_on(int device) {
  KernelImage image;
  cudaFuncAttributes loaded{};
  try {
    const DeviceGuard guard(device);
    image.error = words(cudaFuncGetAttributes(&loaded, probe));
  } catch (const std::exception& error) {
    cudaGetLastError();
    image.error = error.what();
  }
  image.binary = loaded.binaryVersion;
  image.ptx = loaded.ptxVersion;
  return image;
}

}  // namespace dalle_fast
