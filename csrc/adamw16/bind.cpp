// SPDX-License-Identifier: MIT
#include <algorithm>
#include <utility>
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

// One number in memory.
template <typename T>
T* read_number(const TensorArg& arg, const char* name, std::initializer_list<DType> dtypes, const Device& device,
               bool* is_double = nullptr) {
  if (arg.is_none()) return nullptr;
  const TensorRef t = arg.as(name);
  require_dtype(t, name, dtypes);
  if (t.numel() != 1)
    throw std::invalid_argument(std::string(name) + ": expected one element, got shape " + to_string(t.shape, t.rank));
  if (!(t.device == device)) throw std::invalid_argument(std::string(name) + ": expected the device of the parameters");
  if (is_double) *is_double = t.dtype == DType::kFloat64;
  return t.as<T>();
}

// Whether some elements may share memory: dimensions by stride, each beyond all that the smaller ones reach.
bool may_overlap(const TensorRef& t) {
  if (t.numel() == 0) return false;
  bool seen[kMaxRank] = {};
  int64_t reach = 0;
  for (int k = 0; k < t.rank; ++k) {
    int next = -1;
    for (int i = 0; i < t.rank; ++i)
      if (!seen[i] && (next < 0 || t.stride[i] < t.stride[next])) next = i;
    seen[next] = true;
    if (t.shape[next] == 1) continue;
    if (t.stride[next] <= reach) return true;
    reach += t.stride[next] * (t.shape[next] - 1);
  }
  return false;
}

// Elements from the first to the last in memory, the gaps counted; of a tensor with elements.
int64_t extent(const TensorRef& t) {
  int64_t last = 0;
  for (int i = 0; i < t.rank; ++i) last += t.stride[i] * (t.shape[i] - 1);
  return last + 1;
}

// Parameters are updated by several threads, each in its own memory. In most models they lie one behind the other.
void refuse_shared(std::vector<std::pair<const float*, const float*>> ranges) {
  const auto before = [](const auto& a, const auto& b) { return a.second <= b.first; };
  const auto apart = [&] {
    for (std::size_t i = 1; i < ranges.size(); ++i)
      if (!before(ranges[i - 1], ranges[i])) return false;
    return true;
  };
  if (apart()) return;
  std::sort(ranges.begin(), ranges.end());
  require(apart(), "params: expected tensors that share no memory, got two that do");
}

adamw16::Scalars* read_scalars(const TensorArg& arg, int64_t count, const Device& device) {
  const TensorRef t = arg.as("scalars");
  require_dtype(t, "scalars", {DType::kFloat32});
  require_shape(t, "scalars", {count, 4});
  require_contiguous(t, "scalars");
  require(t.device == device, "scalars: expected the device of the parameters");
  return t.as<adamw16::Scalars>();
}

}  // namespace

void bind_adamw16(pybind11::module_& m) {
  // Updates what lies in memory in the same order; returns the indices of the parameters that it left alone because
  // their tensors do not. `scalars` (of adamw16_advance) or None: `step`, `lr` and `grad_scale` rule.
  m.def("adamw16_step", [](const Tensors& param_args, const Tensors& mean_args, const Tensors& variance_args,
                           const Tensors& ema_args, const Tensors& grad_args, const TensorArg& scalars_arg,
                           const TensorArg& found_inf_arg, int64_t step, double lr, double grad_scale, double beta1,
                           double beta2, double eps, double weight_decay, double variance_clip, double ema_weight,
                           std::uintptr_t stream) {
    const std::size_t n = param_args.size();
    for (const Tensors* list : {&mean_args, &variance_args, &grad_args})
      require(list->size() == n, "means, variances, grads: expected one tensor for each parameter");
    require(ema_args.empty() || ema_args.size() == n, "emas: expected none or one tensor for each parameter");
    std::vector<adamw16::Segment> segments;
    std::vector<adamw16::Chunk> chunks;
    std::vector<int64_t> left;
    segments.reserve(n);
    chunks.reserve(n);
    const adamw16::Scalars* scalars = nullptr;
    Device device;
    std::vector<std::pair<const float*, const float*>> ranges;
    ranges.reserve(n);
    const auto refuse_overlap = [](const TensorRef& t, const char* name, std::size_t i) {
      if (!t.is_contiguous() && may_overlap(t))
        throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) +
                                    "]: expected elements that share no memory, got strides " +
                                    to_string(t.stride, t.rank));
    };
    for (std::size_t i = 0; i < n; ++i) {
      const TensorRef param = read(param_args, i, "params", nullptr, {DType::kFloat32});
      if (i == 0) device = param.device;
      if (!(param.device == device)) throw std::invalid_argument("params: expected all on one device");
      if (i == 0 && !scalars_arg.is_none()) scalars = read_scalars(scalars_arg, static_cast<int64_t>(n), device);
      const TensorRef grad = read(grad_args, i, "grads", &param, {DType::kFloat32, DType::kBFloat16, DType::kFloat64});
      const TensorRef mean = read(mean_args, i, "means", &param, {DType::kUInt16});
      const TensorRef variance = read(variance_args, i, "variances", &param, {DType::kUInt16});
      refuse_overlap(param, "params", i);
      refuse_overlap(mean, "means", i);
      refuse_overlap(variance, "variances", i);
      if (param.numel() > 0) ranges.emplace_back(param.as<float>(), param.as<float>() + extent(param));
      adamw16::Segment segment{};
      segment.param = param.as<float>();
      segment.grad = grad.data;
      segment.mean = mean.as<uint16_t>();
      segment.variance = variance.as<uint16_t>();
      segment.scalars = scalars ? scalars + i : nullptr;
      segment.count = param.numel();
      segment.grad_is_bf16 = grad.dtype == DType::kBFloat16;
      bool together = param.is_dense() && grad.same_strides(param) && mean.same_strides(param) &&
                      variance.same_strides(param) && grad.dtype != DType::kFloat64;
      if (!ema_args.empty()) {
        const TensorRef ema = read(ema_args, i, "emas", &param, {DType::kFloat32});
        refuse_overlap(ema, "emas", i);
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
    refuse_shared(std::move(ranges));
    adamw16::Params params{};
    params.segments = segments.data();
    params.num_segments = static_cast<int64_t>(segments.size());
    params.chunks = chunks.data();
    params.num_chunks = static_cast<int64_t>(chunks.size());
    params.found_inf = read_number<const float>(found_inf_arg, "found_inf", {DType::kFloat32}, device);
    if (!scalars) params.scalars = adamw16::scalars_at(step, {lr, beta1, beta2, weight_decay, grad_scale});
    params.beta1 = static_cast<float>(beta1);
    params.beta2 = static_cast<float>(beta2);
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

  // Adds one to every step number and writes the scalars of the update with that number, unless `found_inf`.
  m.def("adamw16_advance", [](const Tensors& step_args, const TensorArg& scalars_arg, const TensorArg& lr_arg,
                              const TensorArg& grad_scale_arg, const TensorArg& found_inf_arg, double beta1,
                              double beta2, double weight_decay, std::uintptr_t stream) {
    const auto n = static_cast<int64_t>(step_args.size());
    const Device device = scalars_arg.as("scalars").device;
    std::vector<int64_t*> steps;
    steps.reserve(step_args.size());
    for (const TensorArg& arg : step_args) steps.push_back(read_number<int64_t>(arg, "steps", {DType::kInt64}, device));
    adamw16::AdvanceParams params{};
    params.steps = steps.data();
    params.scalars = read_scalars(scalars_arg, n, device);
    params.num_steps = n;
    params.found_inf = read_number<const float>(found_inf_arg, "found_inf", {DType::kFloat32}, device);
    params.lr = read_number<const void>(lr_arg, "lr", {DType::kFloat32, DType::kFloat64}, device, &params.lr_is_double);
    params.grad_scale = read_number<const float>(grad_scale_arg, "grad_scale", {DType::kFloat32}, device);
    params.beta1 = beta1;
    params.beta2 = beta2;
    params.weight_decay = weight_decay;
    params.device = device;
    (void)stream;
    run_on(
        device, [&] { adamw16::advance_cpu(params); },
        DF_CUDA_LAUNCH(adamw16::advance_cuda(params, reinterpret_cast<void*>(stream))));
  });
}

}  // namespace dalle_fast
