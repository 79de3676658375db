// SPDX-License-Identifier: MIT
#include "../core/bind.h"
#include "../core/pattern_arg.h"
#include "sparse_attention.h"

namespace dalle_fast {
namespace {

sparse_attention::Tensor4 read4(const TensorArg& arg, const char* name, const TensorRef& q, int64_t heads) {
  const TensorRef t = arg.as(name);
  require_same_dtype(t, name, q, "q");
  require_shape(t, name, {q.shape[0], heads, q.shape[2], q.shape[3]});
  require_dense_rows(t, name);
  require_same_device(t, name, q, "q");
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

sparse_attention::Params common(const TensorArg& q_arg, const TensorArg& k_arg, const TensorArg& v_arg,
                                const TensorArg& out_arg, const TensorArg& lse_arg, double scale,
                                const PatternArg& pattern, Device* device) {
  const TensorRef q = q_arg.as("q");
  require_dtype(q, "q", {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  require_rank(q, "q", 4);
  const TensorRef k = k_arg.as("k");
  require_rank(k, "k", 4);
  const int64_t kv_heads = k.shape[1];
  sparse_attention::Params params{};
  params.q = read4(q_arg, "q", q, q.shape[1]);
  params.k = read4(k_arg, "k", q, kv_heads);
  params.v = read4(v_arg, "v", q, kv_heads);
  params.out = read4(out_arg, "out", q, q.shape[1]);
  const TensorRef lse = lse_arg.as("lse");
  require_dtype(lse, "lse", {DType::kFloat32});
  require_shape(lse, "lse", {q.shape[0], q.shape[1], q.shape[2]});
  require_contiguous(lse, "lse");
  require_same_device(lse, "lse", q, "q");
  params.lse = lse.as<float>();
  params.batch = q.shape[0];
  params.num_heads = q.shape[1];
  params.num_kv_heads = kv_heads;
  params.length = q.shape[2];
  params.head_dim = q.shape[3];
  params.scale = static_cast<float>(scale);
  params.pattern = pattern_of(pattern);
  params.dtype = q.dtype;
  params.device = q.device;
  require(kv_heads > 0 && params.num_heads % kv_heads == 0, "k: the heads of q are not a multiple of its heads");
  require(params.length <= params.pattern.length(), "q: more positions than the pattern has");
  *device = q.device;
  return params;
}

}  // namespace

void bind_sparse_attention(pybind11::module_& m) {
  m.def("sparse_attention_forward",
        [](const TensorArg& out, const TensorArg& lse, const TensorArg& q, const TensorArg& k, const TensorArg& v,
           double scale, const PatternArg& pattern, std::uintptr_t stream) {
          Device device;
          const sparse_attention::Params params = common(q, k, v, out, lse, scale, pattern, &device);
          (void)stream;
          run_on(
              device,
              [&] {
                if (params.dtype == DType::kBFloat16 && sparse_attention::forward_bf16(params)) return;
                sparse_attention::forward_cpu(params);
              },
              DF_CUDA_LAUNCH(sparse_attention::forward_cuda(params, reinterpret_cast<void*>(stream))));
        });

  m.def("sparse_attention_backward",
        [](const TensorArg& dq, const TensorArg& dk, const TensorArg& dv, const TensorArg& terms_arg,
           const TensorArg& dout, const TensorArg& out, const TensorArg& lse, const TensorArg& q, const TensorArg& k,
           const TensorArg& v, double scale, const PatternArg& pattern, std::uintptr_t stream) {
          Device device;
          sparse_attention::Params params = common(q, k, v, out, lse, scale, pattern, &device);
          const TensorRef first = q.as("q");
          params.dout = read4(dout, "dout", first, params.num_heads);
          params.dq = read4(dq, "dq", first, params.num_heads);
          params.dk = read4(dk, "dk", first, params.num_kv_heads);
          params.dv = read4(dv, "dv", first, params.num_kv_heads);
          const TensorRef terms = terms_arg.as("terms");
          require_dtype(terms, "terms", {DType::kFloat32});
          require_shape(terms, "terms", {params.batch, params.num_heads, params.length, 2});
          require_contiguous(terms, "terms");
          require_same_device(terms, "terms", first, "q");
          params.terms = terms.data;
          (void)stream;
          run_on(
              device,
              [&] {
                if (params.dtype == DType::kBFloat16 && sparse_attention::backward_bf16(params)) return;
                sparse_attention::backward_cpu(params);
              },
              DF_CUDA_LAUNCH(sparse_attention::backward_cuda(params, reinterpret_cast<void*>(stream))));
        });

  // csrc/scalar/pattern.h itself, for the test against AttentionPattern.mask().
  m.def("sparse_attention_mask", [](const TensorArg& mask_arg, const PatternArg& pattern) {
    const TensorRef mask = mask_arg.as("mask");
    require_dtype(mask, "mask", {DType::kBool});
    require_rank(mask, "mask", 2);
    require_shape(mask, "mask", {mask.shape[0], mask.shape[0]});
    require_contiguous(mask, "mask");
    sparse_attention::MaskParams params{mask.as<uint8_t>(), mask.shape[0], pattern_of(pattern)};
    run_on_cpu(mask.device, [&] { sparse_attention::mask_cpu(params); });
  });
}

}  // namespace dalle_fast
