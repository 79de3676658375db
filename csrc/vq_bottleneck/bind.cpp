// SPDX-License-Identifier: MIT
#include "../core/bind.h"
#include "vq_bottleneck.h"

namespace dalle_fast {
namespace {

using vq_bottleneck::RowStats;

// A matrix of a chunk: dense, rows aligned to 16 bytes.
void check_chunk(const TensorRef& t, const char* name, std::initializer_list<DType> dtypes, const TensorRef& logits) {
  require_dtype(t, name, dtypes);
  require_shape(t, name, {logits.shape[0], logits.shape[1]});
  require_contiguous(t, name);
  require_same_device(t, name, logits, "logits");
  require(reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0, std::string(name) + ": expected memory aligned to 16 bytes");
}

void check_rows(const TensorRef& t, const char* name, std::initializer_list<int64_t> shape, const TensorRef& logits) {
  require_dtype(t, name, {DType::kFloat32});
  require_shape(t, name, shape);
  require_contiguous(t, name);
  require_same_device(t, name, logits, "logits");
}

// What both directions have: the logits of a chunk with room for `stride` codes a row, the bias, the noise.
template <typename P>
void read_common(P& params, const TensorRef& logits, const TensorArg& bias_arg, const TensorRef& stats,
                 int64_t num_codes, double tau, int64_t seed, int64_t offset, int64_t first_row) {
  require_rank(logits, "logits", 2);
  check_chunk(logits, "logits", {DType::kFloat32}, logits);
  require(logits.shape[1] % 16 == 0 && num_codes >= 0 && num_codes <= logits.shape[1],
          "logits: expected rows of a multiple of 16 elements, at least num_codes");
  check_rows(stats, "stats", {logits.shape[0], 4}, logits);
  if (!bias_arg.is_none()) {
    const TensorRef bias = bias_arg.as("bias");
    check_rows(bias, "bias", {num_codes}, logits);
    params.bias = bias.as<const float>();
  }
  params.logits = logits.as<const float>();
  params.stats = stats.as<RowStats>();
  params.num_rows = logits.shape[0];
  params.num_codes = num_codes;
  params.stride = logits.shape[1];
  params.inverse_tau = static_cast<float>(1.0 / tau);
  params.seed = static_cast<uint64_t>(seed);
  params.offset = static_cast<uint64_t>(offset);
  params.first_row = static_cast<uint32_t>(first_row);
  params.device = logits.device;
}

}  // namespace

void bind_vq_bottleneck(pybind11::module_& m) {
  m.def("vq_bottleneck_relax", [](const TensorArg& y_arg, const TensorArg& kl_arg, const TensorArg& stats_arg,
                                  const TensorArg& logits_arg, const TensorArg& bias_arg, int64_t num_codes, double tau,
                                  int64_t seed, int64_t offset, int64_t first_row, std::uintptr_t stream) {
    const TensorRef logits = logits_arg.as("logits");
    const TensorRef y = y_arg.as("y");
    const TensorRef kl = kl_arg.as("kl");
    vq_bottleneck::Params params{};
    read_common(params, logits, bias_arg, stats_arg.as("stats"), num_codes, tau, seed, offset, first_row);
    check_chunk(y, "y", {DType::kFloat32, DType::kBFloat16}, logits);
    check_rows(kl, "kl", {logits.shape[0]}, logits);
    params.y = y.data;
    params.kl = kl.as<float>();
    params.dtype = y.dtype;
    (void)stream;
    run_on(
        params.device, [&] { vq_bottleneck::relax_cpu(params); },
        DF_CUDA_LAUNCH(vq_bottleneck::relax_cuda(params, reinterpret_cast<void*>(stream))));
  });

  m.def("vq_bottleneck_gradient",
        [](const TensorArg& y_arg, const TensorArg& dlogits_arg, const TensorArg& logits_arg, const TensorArg& bias_arg,
           const TensorArg& dy_arg, const TensorArg& stats_arg, const TensorArg& kl_arg, const TensorArg& dkl_arg,
           int64_t num_codes, double tau, int64_t seed, int64_t offset, int64_t first_row, std::uintptr_t stream) {
          const TensorRef logits = logits_arg.as("logits");
          const TensorRef y = y_arg.as("y");
          const TensorRef dlogits = dlogits_arg.as("dlogits");
          const TensorRef dy = dy_arg.as("dy");
          const TensorRef kl = kl_arg.as("kl");
          const TensorRef dkl = dkl_arg.as("dkl");
          vq_bottleneck::GradientParams params{};
          read_common(params, logits, bias_arg, stats_arg.as("stats"), num_codes, tau, seed, offset, first_row);
          check_chunk(y, "y", {DType::kFloat32, DType::kBFloat16}, logits);
          check_chunk(dlogits, "dlogits", {y.dtype}, logits);
          check_chunk(dy, "dy", {DType::kFloat32}, logits);
          check_rows(kl, "kl", {logits.shape[0]}, logits);
          check_rows(dkl, "dkl", {logits.shape[0]}, logits);
          params.y = y.data;
          params.dlogits = dlogits.data;
          params.dy = dy.as<const float>();
          params.kl = kl.as<const float>();
          params.dkl = dkl.as<const float>();
          params.dtype = y.dtype;
          (void)stream;
          run_on(
              params.device, [&] { vq_bottleneck::gradient_cpu(params); },
              DF_CUDA_LAUNCH(vq_bottleneck::gradient_cuda(params, reinterpret_cast<void*>(stream))));
        });
}

}  // namespace dalle_fast
