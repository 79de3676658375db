// SPDX-License-Identifier: MIT
#include "../core/bind.h"
#include "adamw16.h"

namespace dalle_fast {
namespace {

// The update is elementwise: the shape does not matter, its memory order does.
void check_flat(const TensorRef& t, const char* name, const TensorRef& first, std::initializer_list<DType> dtypes) {
  require_dtype(t, name, dtypes);
  require(t.numel() == first.numel(), std::string(name) + ": expected " + std::to_string(first.numel()) +
                                          " elements like param, got " + std::to_string(t.numel()));
  require_contiguous(t, name);
  require_same_device(t, name, first, "param");
}

}  // namespace

void bind_adamw16(pybind11::module_& m) {
  m.def("adamw16_step", [](const TensorArg& param_arg, const TensorArg& mean_arg, const TensorArg& variance_arg,
                           const TensorArg& ema_arg, const TensorArg& grad_arg, double inverse_grad_scale, double beta1,
                           double beta2, double decay, double step_size, double inverse_root_correction, double eps,
                           double variance_clip, double ema_weight, std::uintptr_t) {
    const TensorRef param = param_arg.as("param");
    const TensorRef grad = grad_arg.as("grad");
    const TensorRef mean = mean_arg.as("mean");
    const TensorRef variance = variance_arg.as("variance");
    check_flat(param, "param", param, {DType::kFloat32});
    check_flat(grad, "grad", param, {DType::kFloat32, DType::kBFloat16});
    check_flat(mean, "mean", param, {DType::kUInt16});
    check_flat(variance, "variance", param, {DType::kUInt16});
    adamw16::Params params{};
    if (!ema_arg.is_none()) {
      const TensorRef ema = ema_arg.as("ema");
      check_flat(ema, "ema", param, {DType::kFloat32});
      params.ema = ema.as<float>();
    }
    params.param = param.as<float>();
    params.grad = grad.data;
    params.mean = mean.as<uint16_t>();
    params.variance = variance.as<uint16_t>();
    params.count = param.numel();
    params.grad_dtype = grad.dtype;
    params.inverse_grad_scale = static_cast<float>(inverse_grad_scale);
    params.beta1 = static_cast<float>(beta1);
    params.beta2 = static_cast<float>(beta2);
    params.decay = static_cast<float>(decay);
    params.step_size = static_cast<float>(step_size);
    params.inverse_root_correction = static_cast<float>(inverse_root_correction);
    params.eps = static_cast<float>(eps);
    params.variance_clip = static_cast<float>(variance_clip);
    params.ema_weight = static_cast<float>(ema_weight);
    run_on_cpu(param.device, [&] { adamw16::step_cpu(params); });
  });
}

}  // namespace dalle_fast
