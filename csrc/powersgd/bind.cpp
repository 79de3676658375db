// SPDX-License-Identifier: MIT
#include "../core/bind.h"
#include "powersgd.h"

namespace dalle_fast {
namespace {

// Whether the first dimension is the dense one; throws where neither is. The stride of the other goes to `stride`.
bool dense_first(const TensorRef& t, const char* name, int64_t& stride) {
  const bool last = t.stride[1] == 1 || t.shape[1] == 1;
  require(last || t.stride[0] == 1 || t.shape[0] == 1, (std::string(name) + ": expected one dense dimension").c_str());
  stride = t.stride[last ? 0 : 1];
  return !last;
}

int64_t workspace_floats(const TensorRef& error, int64_t rank) {
#if defined(DF_SIMT)
  const bool needed = true;
#else
  const bool needed = error.device.is_cuda();
#endif
  return needed ? powersgd::ProjectPlan(error.shape[0], error.shape[1], rank).workspace_floats : 0;
}

}  // namespace

void bind_powersgd(pybind11::module_& m) {
  // Elements of the float32 tensor that powersgd_project wants to work in.
  m.def("powersgd_workspace", [](const TensorArg& error_arg, int64_t rank) {
    const TensorRef error = error_arg.as("error");
    require_rank(error, "error", 2);
    return workspace_floats(error, rank);
  });

  m.def("powersgd_project", [](const TensorArg& out_arg, const TensorArg& status_arg, const TensorArg& error_arg,
                               const TensorArg& factor_arg, const TensorArg& grad_arg, const TensorArg& workspace_arg,
                               double inverse_grad_scale, double scale, std::uintptr_t stream) {
    const TensorRef error = error_arg.as("error");     // [rows, depth]
    const TensorRef factor = factor_arg.as("factor");  // [depth, rank]
    const TensorRef out = out_arg.as("out");
    const TensorRef status = status_arg.as("status");
    require_dtype(error, "error", {DType::kUInt16});
    require_rank(error, "error", 2);
    require_dtype(factor, "factor", {DType::kUInt16, DType::kFloat32});
    require_rank(factor, "factor", 2);
    require_shape(factor, "factor", {error.shape[1], factor.shape[1]});
    require_contiguous(factor, "factor");
    require_same_device(factor, "factor", error, "error");
    require_dtype(out, "out", {DType::kUInt16});
    require_shape(out, "out", {error.shape[0], factor.shape[1]});
    require_contiguous(out, "out");
    require_same_device(out, "out", error, "error");
    require_dtype(status, "status", {DType::kInt32});
    require_shape(status, "status", {3});
    require_contiguous(status, "status");
    require_same_device(status, "status", error, "error");

    powersgd::ProjectParams params{};
    params.transposed = dense_first(error, "error", params.error_stride);
    if (!grad_arg.is_none()) {
      const TensorRef grad = grad_arg.as("grad");
      require_dtype(grad, "grad", {DType::kFloat32, DType::kBFloat16});
      require_shape(grad, "grad", {error.shape[0], error.shape[1]});
      require_same_device(grad, "grad", error, "error");
      require(grad.stride[params.transposed ? 0 : 1] == 1 || grad.shape[params.transposed ? 0 : 1] == 1,
              "grad: expected the dense dimension of error");
      params.grad = grad.data;
      params.grad_stride = grad.stride[params.transposed ? 1 : 0];
      params.grad_is_bf16 = grad.dtype == DType::kBFloat16;
    }
    const TensorRef workspace = workspace_arg.as("workspace");
    require_dtype(workspace, "workspace", {DType::kFloat32});
    require_contiguous(workspace, "workspace");
    require_same_device(workspace, "workspace", error, "error");
    require(workspace.numel() >= workspace_floats(error, factor.shape[1]), "workspace: expected a larger tensor");
    params.workspace = workspace.as<float>();
    params.error = error.as<uint16_t>();
    params.factor = factor.data;
    params.factor_is_codes = factor.dtype == DType::kUInt16;
    params.out = out.as<uint16_t>();
    params.status = status.as<int32_t>();
    params.rows = error.shape[0];
    params.depth = error.shape[1];
    params.rank = factor.shape[1];
    params.inverse_grad_scale = static_cast<float>(inverse_grad_scale);
    params.scale = static_cast<float>(scale);
    params.device = error.device;
    (void)stream;
    run_on(
        params.device, [&] { powersgd::project_cpu(params); },
        DF_CUDA_LAUNCH(powersgd::project_cuda(params, reinterpret_cast<void*>(stream))));
  });

  m.def("powersgd_reconstruct",
        [](const TensorArg& grad_arg, const TensorArg& p_arg, const TensorArg& q_arg, const TensorArg& error_arg,
           double grad_factor, double error_factor, std::uintptr_t stream) {
          const TensorRef grad = grad_arg.as("grad");  // [rows, columns]
          const TensorRef p = p_arg.as("p");           // [rows, rank]
          const TensorRef q = q_arg.as("q");           // [columns, rank]
          require_dtype(p, "p", {DType::kUInt16});
          require_rank(p, "p", 2);
          require_contiguous(p, "p");
          require_dtype(q, "q", {DType::kUInt16});
          require_rank(q, "q", 2);
          require_shape(q, "q", {q.shape[0], p.shape[1]});
          require_contiguous(q, "q");
          require_same_device(q, "q", p, "p");
          require_dtype(grad, "grad", {DType::kFloat32});
          require_shape(grad, "grad", {p.shape[0], q.shape[0]});
          require_same_device(grad, "grad", p, "p");

          powersgd::ReconstructParams params{};
          const bool transposed = dense_first(grad, "grad", params.grad_stride);
          if (!error_arg.is_none()) {
            const TensorRef error = error_arg.as("error");
            require_dtype(error, "error", {DType::kUInt16});
            require_shape(error, "error", {p.shape[0], q.shape[0]});
            require_same_device(error, "error", p, "p");
            require(error.stride[transposed ? 0 : 1] == 1 || error.shape[transposed ? 0 : 1] == 1,
                    "error: expected the dense dimension of grad");
            params.error = error.as<uint16_t>();
            params.error_stride = error.stride[transposed ? 1 : 0];
          }
          params.left = (transposed ? q : p).as<const uint16_t>();  // G^T = Q P^T
          params.right = (transposed ? p : q).as<const uint16_t>();
          params.grad = grad.as<float>();
          params.rows = grad.shape[transposed ? 1 : 0];
          params.columns = grad.shape[transposed ? 0 : 1];
          params.rank = p.shape[1];
          params.grad_factor = static_cast<float>(grad_factor);
          params.error_factor = static_cast<float>(error_factor);
          params.device = p.device;
          (void)stream;
          run_on(
              params.device, [&] { powersgd::reconstruct_cpu(params); },
              DF_CUDA_LAUNCH(powersgd::reconstruct_cuda(params, reinterpret_cast<void*>(stream))));
        });
}

}  // namespace dalle_fast
