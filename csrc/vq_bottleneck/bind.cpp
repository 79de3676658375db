// SPDX-License-Identifier: MIT
#include "../core/bind.h"
#include "vq_bottleneck.h"

namespace dalle_fast {
namespace {

using namespace vq_bottleneck;

Noise noise_of(double tau, int64_t seed, int64_t offset, int64_t first_row) {
  return {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), static_cast<uint32_t>(first_row),
          static_cast<float>(1.0 / tau)};
}

// dense, on the device of `first`
TensorRef dense(const TensorArg& arg, const char* name, std::initializer_list<int64_t> shape, const TensorRef& first,
                const char* first_name, DType dtype = DType::kFloat32) {
  const TensorRef t = arg.as(name);
  require_dtype(t, name, {dtype});
  require_shape(t, name, shape);
  require_contiguous(t, name);
  require_same_device(t, name, first, first_name);
  return t;
}

// ---- a chunk, for CUDA

// A matrix of a chunk: rows aligned to 16 bytes.
TensorRef matrix(const TensorArg& arg, const char* name, std::initializer_list<DType> dtypes, const TensorRef& logits) {
  const TensorRef t = arg.as(name);
  require_dtype(t, name, dtypes);
  require_shape(t, name, {logits.shape[0], logits.shape[1]});
  require_contiguous(t, name);
  require_same_device(t, name, logits, "logits");
  require(reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0,
          std::string(name) + ": expected memory aligned to 16 bytes");
  return t;
}

// What both directions have: logits with room for `stride` codes a row, the bias, the noise.
template <typename P>
TensorRef read_chunk(P& params, const TensorArg& logits_arg, const TensorArg& bias, const TensorArg& stats,
                     int64_t num_codes, const Noise& noise) {
  const TensorRef logits = logits_arg.as("logits");
  require_rank(logits, "logits", 2);
  matrix(logits_arg, "logits", {DType::kFloat32}, logits);
  require(logits.shape[1] % 16 == 0 && 0 <= num_codes && num_codes <= logits.shape[1] && num_codes < INT32_MAX / 2,
          "logits: expected rows of a multiple of 16 elements, at least num_codes");
  params.logits = logits.as<const float>();
  params.stats = dense(stats, "stats", {logits.shape[0], 4}, logits, "logits").as<RowStats>();
  if (!bias.is_none()) params.bias = dense(bias, "bias", {num_codes}, logits, "logits").as<const float>();
  params.num_rows = logits.shape[0];
  params.num_codes = num_codes;
  params.stride = logits.shape[1];
  params.noise = noise;
  params.device = logits.device;
  return logits;
}

template <typename Cuda>
void run_on_cuda(const Device& device, Cuda&& cuda) {
  run_on(device, [] { throw std::runtime_error("chunks are CUDA's; the CPU does the whole op at once"); }, cuda);
}

void relax(const TensorArg& y, const TensorArg& kl, const TensorArg& stats, const TensorArg& logits_arg,
           const TensorArg& bias, int64_t num_codes, double tau, int64_t seed, int64_t offset, int64_t first_row,
           std::uintptr_t stream) {
  RelaxParams params{};
  const TensorRef logits =
      read_chunk(params, logits_arg, bias, stats, num_codes, noise_of(tau, seed, offset, first_row));
  const TensorRef result = matrix(y, "y", {DType::kFloat32, DType::kBFloat16}, logits);
  params.y = result.data;
  params.dtype = result.dtype;
  params.kl = dense(kl, "kl", {logits.shape[0]}, logits, "logits").as<float>();
  (void)stream;
  run_on_cuda(params.device, DF_CUDA_LAUNCH(relax_cuda(params, reinterpret_cast<void*>(stream))));
}

void gradient(const TensorArg& y, const TensorArg& dlogits, const TensorArg& logits_arg, const TensorArg& bias,
              const TensorArg& dy, const TensorArg& stats, const TensorArg& kl, const TensorArg& dkl, int64_t num_codes,
              double tau, int64_t seed, int64_t offset, int64_t first_row, std::uintptr_t stream) {
  GradientParams params{};
  const TensorRef logits =
      read_chunk(params, logits_arg, bias, stats, num_codes, noise_of(tau, seed, offset, first_row));
  const TensorRef result = matrix(y, "y", {DType::kFloat32, DType::kBFloat16}, logits);
  params.y = result.data;
  params.dtype = result.dtype;
  params.dlogits = matrix(dlogits, "dlogits", {result.dtype}, logits).data;
  params.dy = matrix(dy, "dy", {DType::kFloat32}, logits).as<const float>();
  params.kl = dense(kl, "kl", {logits.shape[0]}, logits, "logits").as<const float>();
  params.dkl = dense(dkl, "dkl", {logits.shape[0]}, logits, "logits").as<const float>();
  (void)stream;
  run_on_cuda(params.device, DF_CUDA_LAUNCH(gradient_cuda(params, reinterpret_cast<void*>(stream))));
}

// ---- the whole op, for the CPU

#if !defined(DF_SIMT)  // the host executor runs the CUDA path on CPU tensors

// What both directions have. x may have any row stride.
template <typename P>
TensorRef read_inputs(P& params, const TensorArg& x_arg, const TensorArg& head_weight, const TensorArg& head_bias,
                      const TensorArg& codebook, const TensorArg& stats, const Noise& noise) {
  const TensorRef x = x_arg.as("x");
  require_dtype(x, "x", {DType::kFloat32, DType::kBFloat16});
  require_rank(x, "x", 2);
  require_dense_rows(x, "x");
  require(!x.device.is_cuda(), "x: expected a tensor on cpu");
  const TensorRef head = dense(head_weight, "head_weight", {-1, x.shape[1]}, x, "x", x.dtype);
  const TensorRef book = dense(codebook, "codebook", {-1, head.shape[0]}, x, "x", x.dtype);
  if (!head_bias.is_none()) params.head_bias = dense(head_bias, "head_bias", {head.shape[0]}, x, "x").as<float>();
  params.x = x.data;
  params.head_weight = head.data;
  params.codebook = book.data;
  params.stats = dense(stats, "stats", {x.shape[0], 4}, x, "x").as<RowStats>();
  params.num_rows = x.shape[0];
  params.num_channels = x.shape[1];
  params.num_codes = head.shape[0];
  params.width = book.shape[0];
  params.x_stride = x.stride[0];
  params.noise = noise;
  return x;
}

// A result of at least `rows` rows of at least `columns`.
TensorRef result(const TensorArg& arg, const char* name, int64_t rows, int64_t columns, const TensorRef& x,
                 DType dtype = DType::kFloat32) {
  const TensorRef t = dense(arg, name, {-1, -1}, x, "x", dtype);
  require(t.shape[0] >= rows && t.shape[1] >= columns,
          std::string(name) + ": expected at least [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
  return t;
}

// A result in the dtype of x; float32 rows are whole vectors.
TensorRef result_like(const TensorArg& arg, const char* name, int64_t columns, const TensorRef& x) {
  return result(arg, name, x.shape[0], x.dtype == DType::kFloat32 ? padded(columns) : columns, x, x.dtype);
}

float* workspace_of(const TensorArg& arg, int64_t size, const TensorRef& x) {
  const TensorRef t = dense(arg, "workspace", {-1}, x, "x");
  require(t.shape[0] >= size, "workspace: expected at least " + std::to_string(size) + " elements");
  return t.as<float>();
}

// Runs one of the two; bfloat16 has no other way.
template <typename P>
void run_on_cpu(const TensorRef& x, const P& params, void (*float32)(const P&), bool (*bfloat16)(const P&)) {
  ::dalle_fast::run_on_cpu(x.device, [&] {
    if (x.dtype == DType::kFloat32) return float32(params);
    if (!bfloat16(params)) throw std::invalid_argument("x: this processor multiplies no bfloat16");
  });
}

void forward(const TensorArg& out, const TensorArg& kl, const TensorArg& stats, const TensorArg& x_arg,
             const TensorArg& head_weight, const TensorArg& head_bias, const TensorArg& codebook,
             const TensorArg& codebook_bias, const TensorArg& workspace, double tau, int64_t seed, int64_t offset,
             int64_t first_row) {
  ForwardParams params{};
  const TensorRef x =
      read_inputs(params, x_arg, head_weight, head_bias, codebook, stats, noise_of(tau, seed, offset, first_row));
  if (!codebook_bias.is_none())
    params.codebook_bias = dense(codebook_bias, "codebook_bias", {params.width}, x, "x").as<float>();
  const TensorRef y = result_like(out, "out", params.width, x);
  params.out = y.data;
  params.out_stride = y.shape[1];
  params.kl = dense(kl, "kl", {params.num_rows}, x, "x").as<float>();
  params.workspace = workspace_of(workspace, forward_workspace(params.num_channels, params.num_codes, params.width), x);
  run_on_cpu(x, params, forward_cpu, forward_bf16);
}

void backward(const TensorArg& dx, const TensorArg& dhead_weight, const TensorArg& dhead_bias,
              const TensorArg& dcodebook, const TensorArg& x_arg, const TensorArg& head_weight,
              const TensorArg& head_bias, const TensorArg& codebook, const TensorArg& stats, const TensorArg& kl,
              const TensorArg& dout, const TensorArg& dkl, const TensorArg& workspace, int64_t chunk_rows, double tau,
              int64_t seed, int64_t offset, int64_t first_row) {
  BackwardParams params{};
  const TensorRef x =
      read_inputs(params, x_arg, head_weight, head_bias, codebook, stats, noise_of(tau, seed, offset, first_row));
  if (!dx.is_none()) {
    const TensorRef t = result_like(dx, "dx", params.num_channels, x);
    params.dx = t.data;
    params.dx_stride = t.shape[1];
  }
  if (!dhead_weight.is_none()) {
    const TensorRef t = result(dhead_weight, "dhead_weight", padded(params.num_codes), padded(params.num_channels), x);
    params.dhead_weight = t.as<float>();
    params.dhead_stride = t.shape[1];
  }
  if (!dcodebook.is_none()) {
    const TensorRef t = result(dcodebook, "dcodebook", padded(params.width), padded(params.num_codes), x);
    params.dcodebook = t.as<float>();
    params.dcodebook_stride = t.shape[1];
  }
  if (!dhead_bias.is_none())
    params.dhead_bias = dense(dhead_bias, "dhead_bias", {params.num_codes}, x, "x").as<float>();
  params.kl = dense(kl, "kl", {params.num_rows}, x, "x").as<float>();
  params.dout = dense(dout, "dout", {params.num_rows, params.width}, x, "x", x.dtype).data;
  params.dkl = dense(dkl, "dkl", {params.num_rows}, x, "x").as<float>();
  require(chunk_rows > 0, "chunk_rows: expected at least one row");
  params.chunk_rows = chunk_rows;
  params.workspace =
      workspace_of(workspace, backward_workspace(params.num_channels, params.num_codes, params.width, chunk_rows), x);
  run_on_cpu(x, params, backward_cpu, backward_bf16);
}

#endif

}  // namespace

void bind_vq_bottleneck(pybind11::module_& m) {
  m.def("vq_bottleneck_relax", &relax);
  m.def("vq_bottleneck_gradient", &gradient);
#if !defined(DF_SIMT)
  m.def("vq_bottleneck_forward", &forward);
  m.def("vq_bottleneck_backward", &backward);
  m.def("vq_bottleneck_forward_workspace", &forward_workspace);
  m.def("vq_bottleneck_backward_workspace", &backward_workspace);
#endif
}

}  // namespace dalle_fast
