// SPDX-License-Identifier: MIT
// Table of contents of dalle_fast._C: one line per room. Private: only dalle_fast/ops/<room>/op.py calls it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/cuda_status.h"
#include "core/dispatch.h"
#if defined(DF_SIMT)
#include "simt/device.h"
#include "simt/simt.h"
#endif

namespace dalle_fast {
void bind_adamw16(pybind11::module_&);
void bind_conv2d(pybind11::module_&);
void bind_decode_attention(pybind11::module_&);
void bind_dropout(pybind11::module_&);
void bind_gumbel_softmax(pybind11::module_&);
void bind_householder(pybind11::module_& m);
void bind_linear_cross_entropy(pybind11::module_&);
void bind_max_pool2d(pybind11::module_&);
void bind_minifloat(pybind11::module_&);
void bind_null(pybind11::module_&);
void bind_powersgd(pybind11::module_& m);
void bind_sparse_attention(pybind11::module_&);
void bind_vq_bottleneck(pybind11::module_&);
}  // namespace dalle_fast

#if defined(DF_SIMT)
namespace dalle_fast::simt_controls {
void run(const std::string&, bool, float*, const float*);
}
#define DF_MODULE _C_simt
#else
#define DF_MODULE _C
#endif

namespace dalle_fast {
namespace {

#if defined(DF_WITH_CUDA) || defined(DF_SIMT)
pybind11::list describe_devices() {
  pybind11::list all;
  for (const DeviceStatus& status : cuda_devices()) {
    pybind11::dict one;
    one["name"] = status.properties.name;
    one["capability"] = std::to_string(status.properties.major) + "." + std::to_string(status.properties.minor);
    one["shared_memory_per_block"] = status.properties.shared_memory;
    one["num_sms"] = status.properties.num_sms;
    one["image"] = status.image;
    one["problem"] = status.problem;
    all.append(one);
  }
  return all;
}
#endif

}  // namespace
}  // namespace dalle_fast

PYBIND11_MODULE(DF_MODULE, m) {
  using namespace dalle_fast;
  pybind11::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    }
  });

  bind_adamw16(m);
  bind_conv2d(m);
  bind_decode_attention(m);
  bind_dropout(m);
  bind_gumbel_softmax(m);
  bind_householder(m);
  bind_linear_cross_entropy(m);
  bind_max_pool2d(m);
  bind_minifloat(m);
  bind_null(m);
  bind_powersgd(m);
  bind_sparse_attention(m);
  bind_vq_bottleneck(m);

  std::vector<int> levels;
  for (const CpuLevel level : built_cpu_levels()) levels.push_back(static_cast<int>(level));
  m.attr("cpu_levels") = levels;
  if (best_cpu_level() == CpuLevel::kNone)
    throw pybind11::import_error(
        "the extension was built for another processor (DF_CPU_LEVELS=native) and this one runs none of its levels; "
        "build it again, or with DF_CPU_LEVELS=all");
  m.def("cpu_level", [] { return static_cast<int>(cpu_level()); });
  m.def("best_cpu_level", [] { return static_cast<int>(best_cpu_level()); });
  m.def("set_cpu_level", [](int level) { set_cpu_level(static_cast<CpuLevel>(level)); });
#if defined(DF_SIMT)
  m.attr("simt") = true;  // CUDA kernels, on CPU tensors
  m.def("simt_seed", &simt::seed);
  m.def("simt_remove_barrier", &simt::remove_barrier);
  m.def("simt_drop_last_block", &simt::drop_last_block);
  m.def("simt_forget_waits", &simt::forget_waits);
  m.def("simt_barriers", &simt::barriers);
  m.def("simt_forget_barriers", &simt::forget_barriers);
  // (kernel, blocks, blocks of a cluster, static and dynamic shared memory of a block) of the launches since the last
  // call
  m.def("simt_launches", [] {
    std::vector<std::tuple<std::string, uint64_t, unsigned, std::size_t, std::size_t>> all;
    for (const simt::Launched& l : simt::take_launches())
      all.emplace_back(l.name, l.blocks, l.cluster, l.fixed_bytes, l.dynamic_bytes);
    return all;
  });
  // (name, major, minor, shared memory of a block, SMs) of each device; archs as DF_CUDA_ARCHS; versions as 13000
  using SimulatedDevice = std::tuple<std::string, int, int, std::size_t, int>;
  m.def("simt_set_devices",
        [](const std::vector<SimulatedDevice>& devices, const std::string& archs, int driver, int runtime) {
          simt::Platform platform{{}, archs, driver, runtime};
          for (const auto& [name, major, minor, shared_memory, num_sms] : devices)
            platform.devices.push_back({name, major, minor, shared_memory, num_sms});
          simt::set_platform(platform);
        });
#if defined(__SANITIZE_ADDRESS__)
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
  m.def("simt_control", [](const std::string& name, bool planted, std::vector<float> values) {
    if (values.size() != 64) throw std::invalid_argument("values: expected 64 numbers");
    alignas(16) float in[64];
    std::copy(values.begin(), values.end(), in);
    float out = 0.0f;
    simt_controls::run(name, planted, &out, in);
    return out;
  });
#else
  m.attr("simt") = false;
#endif
#if defined(DF_WITH_CUDA)
  m.attr("cuda_archs") = DF_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = "";
#endif
#if defined(DF_WITH_CUDA) || defined(DF_SIMT)
  m.def("cuda_status", &cuda_status);
  m.def("cuda_problem", &cuda_problem);
  m.def("cuda_devices", &describe_devices);
  m.def("cuda_driver", &driver_version);
  m.def("cuda_runtime", &runtime_version);
#else
  m.def("cuda_status", [] { return std::string("built without CUDA"); });
  m.def("cuda_problem", [](int) { return std::string("the extension was built without CUDA"); });
  m.def("cuda_devices", [] { return pybind11::list(); });
  m.def("cuda_driver", [] { return 0; });
  m.def("cuda_runtime", [] { return 0; });
#endif
}
