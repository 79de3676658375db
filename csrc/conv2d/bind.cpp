// SPDX-License-Identifier: MIT
#include "../core/bind.h"
#include "conv2d.h"

namespace dalle_fast {
namespace {

using namespace conv2d;

// contiguous, on the CPU
void* dense(const TensorArg& arg, const char* name, std::initializer_list<int64_t> shape, DType dtype) {
  if (arg.is_none()) return nullptr;
  const TensorRef t = arg.as(name);
  require_dtype(t, name, {dtype});
  require_shape(t, name, shape);
  require_contiguous(t, name);
  if (t.device.is_cuda()) throw std::runtime_error(std::string(name) + ": this op has no CUDA kernel");
  return t.data;
}

float* dense_float(const TensorArg& arg, const char* name, int64_t size) {
  return static_cast<float*>(dense(arg, name, {size}, DType::kFloat32));
}

// float32, any strides
Weight read_weight(const TensorArg& arg, const char* name, const Shape& s) {
  if (arg.is_none()) return {};
  const TensorRef t = arg.as(name);
  require_dtype(t, name, {DType::kFloat32});
  require_shape(t, name, {s.num_out, s.num_in, s.kernel, s.kernel});
  if (t.device.is_cuda()) throw std::runtime_error(std::string(name) + ": this op has no CUDA kernel");
  return {t.as<float>(), {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}};
}

// Shared by both directions: x, weight and workspace. Returns the dtype of all but weights and biases.
template <typename P>
DType read_inputs(P& p, const TensorArg& x_arg, const TensorArg& weight_arg, const TensorArg& workspace,
                  int64_t (*needed)(const Shape&), double gain, bool relu, int64_t scale) {
  const TensorRef x = x_arg.as("x"), weight = weight_arg.as("weight");
  require_dtype(x, "x", {DType::kFloat32, DType::kBFloat16});
  require_rank(x, "x", 4);
  require_rank(weight, "weight", 4);
  p.shape = {x.shape[0], x.shape[1], weight.shape[0], x.shape[2], x.shape[3], weight.shape[2], scale};
  const Shape& s = p.shape;
  require(s.kernel % 2 == 1, "weight: expected an odd kernel");
  require(scale == 1 || (scale == 2 && s.kernel == 1), "scale: expected 1, or 2 with a kernel of 1");
  p.x = dense(x_arg, "x", {s.batch, s.num_in, s.height, s.width}, x.dtype);
  p.weight = read_weight(weight_arg, "weight", s);
  p.workspace = dense_float(workspace, "workspace", needed(s));
  p.gain = static_cast<float>(gain);
  p.relu = relu;
  return x.dtype;
}

// Runs one of the two; bfloat16 has no other way.
template <typename P>
void run(DType dtype, const P& params, void (*float32)(const P&), bool (*bfloat16)(const P&)) {
  pybind11::gil_scoped_release no_gil;
  if (dtype == DType::kFloat32) return float32(params);
  if (!bfloat16(params)) throw std::invalid_argument("x: this processor multiplies no bfloat16");
}

void run_forward(const TensorArg& out, const TensorArg& x, const TensorArg& weight, const TensorArg& bias,
                 const TensorArg& residual, const TensorArg& workspace, double gain, bool relu, int64_t scale) {
  ForwardParams p{};
  const DType dtype = read_inputs(p, x, weight, workspace, forward_workspace, gain, relu, scale);
  const Shape& s = p.shape;
  p.out = dense(out, "out", {s.batch, s.num_out, scale * s.height, scale * s.width}, dtype);
  p.bias = dense_float(bias, "bias", s.num_out);
  p.residual = dense(residual, "residual", {s.batch, s.num_out, scale * s.height, scale * s.width}, dtype);
  require(!out.is_none() && !bias.is_none(), "out and bias: expected tensors");
  run(dtype, p, forward_cpu, forward_bf16);
}

void run_backward(const TensorArg& dx, const TensorArg& dweight, const TensorArg& dbias, const TensorArg& dout,
                  const TensorArg& x, const TensorArg& weight, const TensorArg& workspace, double gain, bool relu,
                  int64_t scale) {
  BackwardParams p{};
  const DType dtype = read_inputs(p, x, weight, workspace, backward_workspace, gain, relu, scale);
  const Shape& s = p.shape;
  p.dx = dense(dx, "dx", {s.batch, s.num_in, s.height, s.width}, dtype);
  p.dweight = read_weight(dweight, "dweight", s);
  p.dbias = dense_float(dbias, "dbias", s.num_out);
  p.dout = dense(dout, "dout", {s.batch, s.num_out, scale * s.height, scale * s.width}, dtype);
  require(!dout.is_none() && dweight.is_none() == dbias.is_none(),
          "dout: expected a tensor; dweight and dbias: expected both or none");
  run(dtype, p, backward_cpu, backward_bf16);
}

}  // namespace

void bind_conv2d(pybind11::module_& m) {
  m.def("conv2d_forward", &run_forward);
  m.def("conv2d_backward", &run_backward);
  m.def("conv2d_workspace", [](int64_t batch, int64_t num_in, int64_t num_out, int64_t height, int64_t width,
                               int64_t kernel, int64_t scale, bool backward) {
    const Shape shape{batch, num_in, num_out, height, width, kernel, scale};
    return backward ? backward_workspace(shape) : forward_workspace(shape);
  });
}

}  // namespace dalle_fast
