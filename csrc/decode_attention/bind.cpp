// SPDX-License-Identifier: MIT
#include "../core/bind.h"
#include "../core/pattern_arg.h"
#include "decode_attention.h"

namespace dalle_fast {
namespace {

using decode_attention::Tensor3;
using decode_attention::Tensor4;

Tensor3 read3(const TensorArg& arg, const char* name, const TensorRef& q, int64_t heads) {
  const TensorRef t = arg.as(name);
  require_same_dtype(t, name, q, "q");
  require_shape(t, name, {q.shape[0], heads, q.shape[2]});
  require_dense_rows(t, name);
  require_same_device(t, name, q, "q");
  return {t.data, t.stride[0], t.stride[1]};
}

Tensor4 read4(const TensorArg& arg, const char* name, const TensorRef& q, int64_t batch, int64_t heads, int64_t slots) {
  const TensorRef t = arg.as(name);
  require_same_dtype(t, name, q, "q");
  require_shape(t, name, {batch, heads, slots, q.shape[2]});
  require_dense_rows(t, name);
  require_same_device(t, name, q, "q");
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

}  // namespace

void bind_decode_attention(pybind11::module_& m) {
  m.def("decode_attention_forward",
        [](const TensorArg& out, const TensorArg& q_arg, const TensorArg& k_arg, const TensorArg& v,
           const TensorArg& text_k_arg, const TensorArg& text_v, const TensorArg& image_k_arg, const TensorArg& image_v,
           double scale, const PatternArg& pattern, int64_t position, const TensorArg& position_at,
           std::uintptr_t stream) {
          const TensorRef q = q_arg.as("q");
          const TensorRef k = k_arg.as("k");
          const TensorRef text_k = text_k_arg.as("text_k");
          const TensorRef image_k = image_k_arg.as("image_k");
          require_dtype(q, "q", {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
          require_rank(q, "q", 3);
          require_rank(k, "k", 3);
          require_rank(text_k, "text_k", 4);
          require_rank(image_k, "image_k", 4);
          decode_attention::Params params{};
          params.pattern = pattern_of(pattern);
          params.batch = q.shape[0];
          params.num_heads = q.shape[1];
          params.head_dim = q.shape[2];
          params.num_kv_heads = k.shape[1];
          params.text_batch = text_k.shape[0];
          params.ring_len = image_k.shape[2];
          params.position = position;
          params.scale = static_cast<float>(scale);
          params.dtype = q.dtype;
          const int64_t heads = params.num_kv_heads, text_len = params.pattern.text_len;
          require(heads > 0 && params.num_heads > 0 && params.num_heads % heads == 0,
                  "k: the heads of q are not a multiple of its heads");
          if (!position_at.is_none()) {  // back ends look at the value
            const TensorRef at = position_at.as("position");
            require_dtype(at, "position", {DType::kInt64});
            require(at.numel() == 1, "position: expected one element");
            require_same_device(at, "position", q, "q");
            params.position_at = at.as<int64_t>();
            position = params.pattern.length() - 1;  // which looks back furthest
          }
          require(position >= 0 && position < params.pattern.length(), "position: outside of the pattern");
          require(params.batch == 0 || (params.text_batch > 0 && params.batch % params.text_batch == 0),
                  "text_k: the batch of q is not a multiple of its batch");
          require(position >= text_len || params.text_batch == params.batch,
                  "text_k: a text position needs a text cache for every sample");
          const int64_t query = position - text_len;
          const int64_t back = query - first_image_key(params.pattern, query < 0 ? 0 : query) + 1;
          require(query < 0 || params.ring_len >= back, "image_k: fewer slots than the pattern looks back on");
          params.q = read3(q_arg, "q", q, params.num_heads);
          params.k = read3(k_arg, "k", q, heads);
          params.v = read3(v, "v", q, heads);
          params.out = read3(out, "out", q, params.num_heads);
          params.text_k = read4(text_k_arg, "text_k", q, params.text_batch, heads, text_len);
          params.text_v = read4(text_v, "text_v", q, params.text_batch, heads, text_len);
          params.image_k = read4(image_k_arg, "image_k", q, params.batch, heads, params.ring_len);
          params.image_v = read4(image_v, "image_v", q, params.batch, heads, params.ring_len);
          if (params.batch == 0) return;
          params.device = q.device;
          (void)stream;
          run_on(
              params.device,
              [&] {
                if (params.dtype == DType::kBFloat16 && decode_attention::forward_bf16(params)) return;
                decode_attention::forward_cpu(params);
              },
              DF_CUDA_LAUNCH(decode_attention::forward_cuda(params, reinterpret_cast<void*>(stream))));
        });
}

}  // namespace dalle_fast
