// SPDX-License-Identifier: MIT
#include "../core/bind.h"
#include "../scalar/philox.h"
#include "gumbel_softmax.h"

namespace dalle_fast {
namespace {

void check_like(const TensorRef& t, const char* name, const TensorRef& first, const char* first_name) {
  require_same_dtype(t, name, first, first_name);
  require_shape(t, name, {first.shape[0], first.shape[1], first.shape[2]});
  require_contiguous(t, name);
  require_same_device(t, name, first, first_name);
}

void check_main(const TensorRef& t, const char* name) {
  require_dtype(t, name, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  require_rank(t, name, 3);
  require_contiguous(t, name);
  require(t.shape[1] < INT32_MAX - (1 << 16), std::string(name) + ": expected fewer than 2^31 - 2^16 codes");
}

gumbel_softmax::Params params_of(const TensorRef& logits, int64_t seed, int64_t offset, int64_t row_offset) {
  gumbel_softmax::Params params{};
  params.logits = logits.data;
  params.outer = logits.shape[0];
  params.num_codes = logits.shape[1];
  params.inner = logits.shape[2];
  params.seed = static_cast<uint64_t>(seed);
  params.offset = static_cast<uint64_t>(offset);
  params.row_offset = static_cast<uint32_t>(row_offset);
  params.dtype = logits.dtype;
  params.device = logits.device;
  return params;
}

}  // namespace

void bind_gumbel_softmax(pybind11::module_& m) {
  m.def("gumbel_softmax_forward", [](const TensorArg& y_arg, const TensorArg& logits_arg, double tau, int64_t seed,
                                     int64_t offset, int64_t row_offset, std::uintptr_t stream) {
    const TensorRef logits = logits_arg.as("logits");
    const TensorRef y = y_arg.as("y");
    check_main(logits, "logits");
    check_like(y, "y", logits, "logits");
    gumbel_softmax::Params params = params_of(logits, seed, offset, row_offset);
    params.y = y.data;
    params.inverse_tau = static_cast<float>(1.0 / tau);
    (void)stream;
    run_on(
        params.device, [&] { gumbel_softmax::forward_cpu(params); },
        DF_CUDA_LAUNCH(gumbel_softmax::forward_cuda(params, reinterpret_cast<void*>(stream))));
  });

  m.def("gumbel_softmax_argmax", [](const TensorArg& index_arg, const TensorArg& logits_arg, int64_t seed,
                                    int64_t offset, int64_t row_offset, std::uintptr_t stream) {
    const TensorRef logits = logits_arg.as("logits");
    const TensorRef index = index_arg.as("index");
    check_main(logits, "logits");
    require_dtype(index, "index", {DType::kInt64});
    require_shape(index, "index", {logits.shape[0] * logits.shape[2]});
    require_contiguous(index, "index");
    require_same_device(index, "index", logits, "logits");
    require(logits.shape[1] > 0 || index.numel() == 0, "logits: expected at least one code");
    gumbel_softmax::Params params = params_of(logits, seed, offset, row_offset);
    params.index = index.as<int64_t>();
    (void)stream;
    run_on(
        params.device, [&] { gumbel_softmax::argmax_cpu(params); },
        DF_CUDA_LAUNCH(gumbel_softmax::argmax_cuda(params, reinterpret_cast<void*>(stream))));
  });

  m.def("gumbel_softmax_backward", [](const TensorArg& dlogits_arg, const TensorArg& y_arg, const TensorArg& dy_arg,
                                      double tau, std::uintptr_t stream) {
    const TensorRef y = y_arg.as("y");
    const TensorRef dy = dy_arg.as("dy");
    const TensorRef dlogits = dlogits_arg.as("dlogits");
    check_main(y, "y");
    check_like(dy, "dy", y, "y");
    check_like(dlogits, "dlogits", y, "y");
    gumbel_softmax::BackwardParams params{};
    params.dlogits = dlogits.data;
    params.y = y.data;
    params.dy = dy.data;
    params.outer = y.shape[0];
    params.num_codes = y.shape[1];
    params.inner = y.shape[2];
    params.inverse_tau = static_cast<float>(1.0 / tau);
    params.dtype = y.dtype;
    params.device = y.device;
    (void)stream;
    run_on(
        params.device, [&] { gumbel_softmax::backward_cpu(params); },
        DF_CUDA_LAUNCH(gumbel_softmax::backward_cuda(params, reinterpret_cast<void*>(stream))));
  });

  // The scalar generator itself, for its published known answers.
  m.def("gumbel_softmax_philox", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    const Philox4 out = philox4x32(c0, c1, c2, c3, k0, k1);
    return std::vector<uint32_t>(out.word, out.word + 4);
  });
}

}  // namespace dalle_fast
