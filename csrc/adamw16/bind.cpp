// SPDX-License-Identifier: MIT
#include <vector>

#include "../core/bind.h"
#include "adamw16.h"

namespace dalle_fast {
namespace {

using Tensors = std::vector<TensorArg>;

// Throws with the element's place in the list; the name is put together only then.
TensorRef read(const Tensors& list, std::size_t i, const char* name, const TensorRef* param,
               std::initializer_list<DType> dtypes) {
  const auto checked = [&](const char* where) {
    const TensorRef t = list[i].as(where);
    require_dtype(t, where, dtypes);
    if (!param) return t;
    bool ok = t.rank == param->rank;
    for (int d = 0; ok && d < t.rank; ++d) ok = t.shape[d] == param->shape[d];
    if (!ok)
      throw std::invalid_argument(std::string(where) + ": expected shape " + to_string(param->shape, param->rank) +
                                  ", got " + to_string(t.shape, t.rank));
    require_same_device(t, where, *param, "its parameter");
    return t;
  };
  try {
    return checked(name);
  } catch (const std::exception&) {
    return checked((std::string(name) + "[" + std::to_string(i) + "]").c_str());
  }
}

}  // namespace

void bind_adamw16(pybind11::module_& m) {
  // Updates what lies in memory in the same order; returns the indices of the parameters that it left alone because
  // their tensors do not.
  m.def("adamw16_step", [](const Tensors& param_args, const Tensors& mean_args, const Tensors& variance_args,
                           const Tensors& ema_args, const Tensors& grad_args, double inverse_grad_scale, double beta1,
                           double beta2, double decay, double step_size, double inverse_root_correction, double eps,
                           double variance_clip, double ema_weight, std::uintptr_t stream) {
    const std::size_t n = param_args.size();
    for (const Tensors* list : {&mean_args, &variance_args, &grad_args})
      require(list->size() == n, "means, variances, grads: expected one tensor for each parameter");
    require(ema_args.empty() || ema_args.size() == n, "emas: expected none or one tensor for each parameter");
    std::vector<adamw16::Segment> segments;
    std::vector<adamw16::Chunk> chunks;
    std::vector<int64_t> left;
    segments.reserve(n);
    chunks.reserve(n);
    Device device;
    for (std::size_t i = 0; i < n; ++i) {
      const TensorRef param = read(param_args, i, "params", nullptr, {DType::kFloat32});
      if (i == 0) device = param.device;
      if (!(param.device == device)) throw std::invalid_argument("params: expected all on one device");
      const TensorRef grad = read(grad_args, i, "grads", &param, {DType::kFloat32, DType::kBFloat16, DType::kFloat64});
      const TensorRef mean = read(mean_args, i, "means", &param, {DType::kUInt16});
      const TensorRef variance = read(variance_args, i, "variances", &param, {DType::kUInt16});
      adamw16::Segment segment{param.as<float>(), grad.data,     mean.as<uint16_t>(),           variance.as<uint16_t>(),
                               nullptr,           param.numel(), grad.dtype == DType::kBFloat16};
      bool together = param.is_dense() && grad.same_strides(param) && mean.same_strides(param) &&
                      variance.same_strides(param) && grad.dtype != DType::kFloat64;
      if (!ema_args.empty()) {
        const TensorRef ema = read(ema_args, i, "emas", &param, {DType::kFloat32});
        segment.ema = ema.as<float>();
        together = together && ema.same_strides(param);
      }
      if (!together) {
        left.push_back(static_cast<int64_t>(i));
        continue;
      }
      for (int64_t begin = 0; begin < segment.count; begin += adamw16::kChunk) {
        const int64_t end = begin + adamw16::kChunk < segment.count ? begin + adamw16::kChunk : segment.count;
        chunks.push_back({static_cast<int32_t>(segments.size()), begin, end});
      }
      segments.push_back(segment);
    }
    adamw16::Params params{};
    params.segments = segments.data();
    params.num_segments = static_cast<int64_t>(segments.size());
    params.chunks = chunks.data();
    params.num_chunks = static_cast<int64_t>(chunks.size());
    params.inverse_grad_scale = static_cast<float>(inverse_grad_scale);
    params.beta1 = static_cast<float>(beta1);
    params.beta2 = static_cast<float>(beta2);
    params.decay = static_cast<float>(decay);
    params.step_size = static_cast<float>(step_size);
    params.inverse_root_correction = static_cast<float>(inverse_root_correction);
    params.eps = static_cast<float>(eps);
    params.variance_clip = static_cast<float>(variance_clip);
    params.ema_weight = static_cast<float>(ema_weight);
    params.device = device;
    (void)stream;
    run_on(
        device, [&] { adamw16::step_cpu(params); },
        DF_CUDA_LAUNCH(adamw16::step_cuda(params, reinterpret_cast<void*>(stream))));
    return left;
  });
}

}  // namespace dalle_fast
