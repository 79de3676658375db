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

// One float32 number, or several, for each row of `first`.
float* of_rows(const TensorArg& arg, const char* name, const TensorRef& first, const char* first_name,
               int64_t numbers = 1) {
  const TensorRef t = arg.as(name);
  require_dtype(t, name, {DType::kFloat32});
  require_shape(t, name, {numbers * first.shape[0] * first.shape[2]});
  require_contiguous(t, name);
  require_same_device(t, name, first, first_name);
  return t.as<float>();
}

// The KL is computed where both are given.
void set_kl(gumbel_softmax::Params& params, const TensorArg& kl, const TensorArg& stats, const TensorRef& logits) {
  if (kl.is_none()) return;
  require(logits.shape[1] > 0 || logits.shape[0] * logits.shape[2] == 0, "logits: expected at least one code");
  params.kl = of_rows(kl, "kl", logits, "logits");
  params.stats = of_rows(stats, "stats", logits, "logits", 2);
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
  m.def("gumbel_softmax_forward",
        [](const TensorArg& y_arg, const TensorArg& kl, const TensorArg& stats, const TensorArg& logits_arg, double tau,
           int64_t seed, int64_t offset, int64_t row_offset, std::uintptr_t stream) {
          const TensorRef logits = logits_arg.as("logits");
          const TensorRef y = y_arg.as("y");
          check_main(logits, "logits");
          check_like(y, "y", logits, "logits");
          gumbel_softmax::Params params = params_of(logits, seed, offset, row_offset);
          params.y = y.data;
          params.inverse_tau = static_cast<float>(1.0 / tau);
          set_kl(params, kl, stats, logits);
          (void)stream;
          run_on(
              params.device, [&] { gumbel_softmax::forward_cpu(params); },
              DF_CUDA_LAUNCH(gumbel_softmax::forward_cuda(params, reinterpret_cast<void*>(stream))));
        });

  m.def("gumbel_softmax_argmax",
        [](const TensorArg& index_arg, const TensorArg& kl, const TensorArg& stats, const TensorArg& logits_arg,
           int64_t seed, int64_t offset, int64_t row_offset, std::uintptr_t stream) {
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
          set_kl(params, kl, stats, logits);
          (void)stream;
          run_on(
              params.device, [&] { gumbel_softmax::argmax_cpu(params); },
              DF_CUDA_LAUNCH(gumbel_softmax::argmax_cuda(params, reinterpret_cast<void*>(stream))));
        });

  m.def("gumbel_softmax_backward",
        [](const TensorArg& dlogits_arg, const TensorArg& y, const TensorArg& dy, const TensorArg& logits,
           const TensorArg& kl, const TensorArg& stats, const TensorArg& dkl, double tau, std::uintptr_t stream) {
          const TensorRef dlogits = dlogits_arg.as("dlogits");
          check_main(dlogits, "dlogits");
          const auto like = [&](const TensorArg& arg, const char* name) {
            const TensorRef t = arg.as(name);
            check_like(t, name, dlogits, "dlogits");
            return t.data;
          };
          gumbel_softmax::BackwardParams params{};
          params.dlogits = dlogits.data;
          if (!dy.is_none()) {
            params.y = like(y, "y");
            params.dy = like(dy, "dy");
          }
          if (!dkl.is_none()) {
            params.logits = like(logits, "logits");
            params.kl = of_rows(kl, "kl", dlogits, "dlogits");
            params.stats = of_rows(stats, "stats", dlogits, "dlogits", 2);
            params.dkl = of_rows(dkl, "dkl", dlogits, "dlogits");
          }
          require(params.dy || params.dkl || dlogits.numel() == 0, "dy, dkl: expected at least one of them");
          params.outer = dlogits.shape[0];
          params.num_codes = dlogits.shape[1];
          params.inner = dlogits.shape[2];
          params.inverse_tau = static_cast<float>(1.0 / tau);
          params.dtype = dlogits.dtype;
          params.device = dlogits.device;
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
