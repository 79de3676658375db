// SPDX-License-Identifier: MIT
#include "../core/bind.h"
#include "linear_cross_entropy.h"

namespace dalle_fast {

void bind_linear_cross_entropy(pybind11::module_& m) {
  m.def("linear_cross_entropy_check", [](const TensorArg& stats_arg, const TensorArg& target_arg, int64_t num_codes,
                                         int64_t ignore_index, std::uintptr_t stream) {
    const TensorRef stats = stats_arg.as("stats");
    const TensorRef target = target_arg.as("target");
    require_dtype(stats, "stats", {DType::kInt64});
    require_shape(stats, "stats", {2});
    require_contiguous(stats, "stats");
    require_dtype(target, "target", {DType::kInt64});
    require_rank(target, "target", 1);
    require_same_device(stats, "stats", target, "target");

    linear_cross_entropy::CheckParams params{};
    params.stats = stats.as<int64_t>();
    params.target = target.as<const int64_t>();
    params.target_stride = target.stride[0];
    params.num_rows = target.shape[0];
    params.num_codes = num_codes;
    params.ignore_index = ignore_index;
    params.device = target.device;
    (void)stream;
    run_on(
        params.device, [&] { linear_cross_entropy::check_cpu(params); },
        DF_CUDA_LAUNCH(linear_cross_entropy::check_cuda(params, reinterpret_cast<void*>(stream))));
  });

  m.def("linear_cross_entropy_loss_and_grad",
        [](const TensorArg& row_loss_arg, const TensorArg& grad_arg, const TensorArg& dbias_arg,
           const TensorArg& logits_arg, const TensorArg& target_arg, const TensorArg& stats_arg, int64_t ignore_index,
           double grad_scale, std::uintptr_t stream) {
          const TensorRef logits = logits_arg.as("logits");  // [num_rows, num_codes]
          const TensorRef target = target_arg.as("target");
          const TensorRef stats = stats_arg.as("stats");
          const TensorRef row_loss = row_loss_arg.as("row_loss");
          require_dtype(logits, "logits", {DType::kFloat32, DType::kBFloat16});
          require_rank(logits, "logits", 2);
          require_dense_rows(logits, "logits");
          require(logits.shape[1] < INT32_MAX - (1 << 16), "logits: expected fewer than 2^31 - 2^16 codes");
          require_dtype(target, "target", {DType::kInt64});
          require_shape(target, "target", {logits.shape[0]});
          require_same_device(target, "target", logits, "logits");
          require_dtype(stats, "stats", {DType::kInt64});
          require_shape(stats, "stats", {2});
          require_contiguous(stats, "stats");
          require_same_device(stats, "stats", logits, "logits");
          require_dtype(row_loss, "row_loss", {DType::kFloat32});
          require_shape(row_loss, "row_loss", {logits.shape[0]});
          require_contiguous(row_loss, "row_loss");
          require_same_device(row_loss, "row_loss", logits, "logits");

          linear_cross_entropy::Params params{};
          if (!grad_arg.is_none()) {
            const TensorRef grad = grad_arg.as("grad");
            require_shape(grad, "grad", {logits.shape[0], logits.shape[1]});
            require_dense_rows(grad, "grad");
            require_same_device(grad, "grad", logits, "logits");
            const bool in_place = grad.data == logits.data && grad.dtype == logits.dtype && grad.same_strides(logits);
#if !defined(DF_SIMT)
            require(in_place || grad.device.is_cuda(), "grad: expected the logits themselves");
#endif
            require(in_place || (grad.dtype == DType::kFloat16 && logits.dtype == DType::kFloat32),
                    "grad: expected the logits themselves, or float16 beside float32 logits");
            params.grad = grad.data;
            params.grad_stride = grad.stride[0];
            params.grad_dtype = grad.dtype;
          }
          if (!dbias_arg.is_none()) {
            const TensorRef dbias = dbias_arg.as("dbias");
            require_dtype(dbias, "dbias", {DType::kFloat32});
            require_shape(dbias, "dbias", {logits.shape[1]});
            require_contiguous(dbias, "dbias");
            require_same_device(dbias, "dbias", logits, "logits");
            params.dbias = dbias.as<float>();
          }
          params.row_loss = row_loss.as<float>();
          params.logits = logits.data;
          params.target = target.as<const int64_t>();
          params.stats = stats.as<const int64_t>();
          params.target_stride = target.stride[0];
          params.num_rows = logits.shape[0];
          params.num_codes = logits.shape[1];
          params.logits_stride = logits.stride[0];
          params.ignore_index = ignore_index;
          params.grad_scale = static_cast<float>(grad_scale);
          params.dtype = logits.dtype;
          params.device = logits.device;
#if !defined(DF_SIMT)
          // A target outside the row would be an access outside memory: looked at again, whoever calls.
          if (!logits.device.is_cuda()) {
            for (int64_t row = 0; row < params.num_rows; ++row) {
              const int64_t code = params.target[row * params.target_stride];
              if (code != ignore_index && (code < 0 || code >= params.num_codes))
                throw std::invalid_argument("target: expected values in [0, " + std::to_string(params.num_codes) +
                                            "), got " + std::to_string(code));
            }
          }
#endif
          (void)stream;
          run_on(
              params.device, [&] { linear_cross_entropy::loss_and_grad_cpu(params); },
              DF_CUDA_LAUNCH(linear_cross_entropy::loss_and_grad_cuda(params, reinterpret_cast<void*>(stream))));
        });

#if !defined(DF_SIMT)
  m.def("linear_cross_entropy_workspace", &linear_cross_entropy::whole_workspace);

  // The first row whose target is out of range, or -1.
  m.def("linear_cross_entropy_whole",
        [](const TensorArg& loss_arg, const TensorArg& dx_arg, const TensorArg& dweight_arg, const TensorArg& dbias_arg,
           const TensorArg& x_arg, const TensorArg& weight_arg, const TensorArg& target_arg, const TensorArg& bias_arg,
           const TensorArg& workspace_arg, int64_t chunk_rows, int64_t ignore_index, double grad_scale) {
          const TensorRef loss = loss_arg.as("loss");
          const TensorRef x = x_arg.as("x");                 // [num_rows, width]
          const TensorRef weight = weight_arg.as("weight");  // [num_codes, width]
          const TensorRef target = target_arg.as("target");
          const TensorRef workspace = workspace_arg.as("workspace");
          require(!x.device.is_cuda(), "x: expected a CPU tensor");
          require_rank(x, "x", 2);
          require_rank(weight, "weight", 2);
          const int64_t num_rows = x.shape[0], num_codes = weight.shape[0], width = x.shape[1];
          const auto floats = [&](const TensorRef& t, const char* name, std::initializer_list<int64_t> shape) {
            require_dtype(t, name, {DType::kFloat32});
            require_shape(t, name, shape);
            require_contiguous(t, name);
            require_same_device(t, name, x, "x");
            return t.as<float>();
          };
          const auto optional = [&](const TensorArg& arg, const char* name, std::initializer_list<int64_t> shape) {
            return arg.is_none() ? nullptr : floats(arg.as(name), name, shape);
          };
          require_dtype(target, "target", {DType::kInt64});
          require_shape(target, "target", {num_rows});
          require_same_device(target, "target", x, "x");
          require(chunk_rows > 0, "chunk_rows: expected at least one");

          int64_t stats[2] = {};
          linear_cross_entropy::WholeParams params{};
          params.loss = floats(loss, "loss", {});
          params.dx = optional(dx_arg, "dx", {num_rows, width});
          params.dweight = optional(dweight_arg, "dweight", {num_codes, width});
          params.dbias = optional(dbias_arg, "dbias", {num_codes});
          params.stats = stats;
          params.x = floats(x, "x", {num_rows, width});
          params.weight = floats(weight, "weight", {num_codes, width});
          params.bias = optional(bias_arg, "bias", {num_codes});
          params.target = target.as<const int64_t>();
          params.workspace = floats(workspace, "workspace", {-1});
          params.target_stride = target.stride[0];
          params.num_rows = num_rows;
          params.num_codes = num_codes;
          params.width = width;
          params.chunk_rows = chunk_rows;
          params.ignore_index = ignore_index;
          params.grad_scale = static_cast<float>(grad_scale);
          require(workspace.numel() >= linear_cross_entropy::whole_workspace(num_rows, num_codes, width, chunk_rows,
                                                                             params.wants_gradient()),
                  "workspace: expected more floats");
          run_on_cpu(x.device, [&] { linear_cross_entropy::whole_cpu(params); });
          return stats[1];
        });
#endif

  m.def("linear_cross_entropy_mean", [](const TensorArg& loss_arg, const TensorArg& row_loss_arg,
                                        const TensorArg& stats_arg, std::uintptr_t stream) {
    const TensorRef loss = loss_arg.as("loss");
    const TensorRef row_loss = row_loss_arg.as("row_loss");
    const TensorRef stats = stats_arg.as("stats");
    require_dtype(loss, "loss", {DType::kFloat32});
    require_shape(loss, "loss", {});
    require_dtype(row_loss, "row_loss", {DType::kFloat32});
    require_rank(row_loss, "row_loss", 1);
    require_contiguous(row_loss, "row_loss");
    require_same_device(row_loss, "row_loss", loss, "loss");
    require_dtype(stats, "stats", {DType::kInt64});
    require_shape(stats, "stats", {2});
    require_contiguous(stats, "stats");
    require_same_device(stats, "stats", loss, "loss");

    linear_cross_entropy::MeanParams params{};
    params.loss = loss.as<float>();
    params.row_loss = row_loss.as<const float>();
    params.stats = stats.as<const int64_t>();
    params.num_rows = row_loss.shape[0];
    params.device = loss.device;
    (void)stream;
    run_on(
        params.device, [&] { linear_cross_entropy::mean_cpu(params); },
        DF_CUDA_LAUNCH(linear_cross_entropy::mean_cuda(params, reinterpret_cast<void*>(stream))));
  });
}

}  // namespace dalle_fast
