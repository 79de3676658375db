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
