// SPDX-License-Identifier: MIT
// What every bind.cpp needs: arguments with names, and one way to leave Python for a back end.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "caster.h"
#include "check.h"

namespace dalle_fast {

// Releases the GIL and runs the CPU or the CUDA launcher. Call it after every TensorArg has been read.
template <typename Cpu, typename Cuda>
void run_on(const Device& device, Cpu&& cpu, Cuda&& cuda) {
#if defined(DF_SIMT)  // the CUDA code on CPU tensors; the executor is one thread
  (void)cpu;
  if (device.is_cuda()) throw std::runtime_error("the host executor takes CPU tensors");
  cuda();
  return;
#endif
  pybind11::gil_scoped_release no_gil;
  if (device.is_cuda()) {
#if defined(DF_WITH_CUDA)
    cuda();
#else
    (void)cuda;
    throw std::runtime_error("this build of dalle_fast has no CUDA kernels (no nvcc was found when it was built)");
#endif
  } else {
    cpu();
  }
}

// For rooms without a CUDA kernel.
template <typename Cpu>
void run_on_cpu(const Device& device, Cpu&& cpu) {
  if (device.is_cuda()) throw std::runtime_error("this op has no CUDA kernel yet; use backend=\"reference\"");
  pybind11::gil_scoped_release no_gil;
  cpu();
}

}  // namespace dalle_fast

// Wraps the CUDA launcher so that a CPU-only build has no reference to it.
#if defined(DF_WITH_CUDA) || defined(DF_SIMT)
#define DF_CUDA_LAUNCH(call) [&] { call; }
#else
#define DF_CUDA_LAUNCH(call) [] {}
#endif
