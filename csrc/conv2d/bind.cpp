// SPDX-License-Identifier: MIT
#include "../core/bind.h"
#include "conv2d.h"

namespace dalle_fast {
namespace {

using namespace conv2d;

// float32, contiguous
template <typename T>
T* dense(const TensorArg& arg, const char* name, std::initializer_list<int64_t> shape) {
  if (arg.is_none()) return nullptr;
  const TensorRef t = arg.as(name);
  require_dtype(t, name, {DType::kFloat32});
  require_shape(t, name, shape);
  require_contiguous(t, name);
  if (t.device.is_cuda()) throw std::runtime_error(std::string(name) + ": this op has no CUDA kernel");
  return t.as<T>();
}

Shape read_shape(const TensorArg& x_arg, const TensorArg& weight_arg, int64_t scale) {
  const TensorRef x = x_arg.as("x"), weight = weight_arg.as("weight");
  require_rank(x, "x", 4);
  require_rank(weight, "weight", 4);
  const Shape shape{x.shape[0],      x.shape[1], weight.shape[0], scale * x.shape[2], scale * x.shape[3],
                    weight.shape[2], scale};
  require(shape.kernel % 2 == 1, "weight: expected an odd kernel");
  require(scale == 1 || scale == 2, "scale: expected 1 or 2");
  return shape;
}

// Shared by both directions: the inputs and the workspace.
template <typename P>
void read_inputs(P& p, const TensorArg& x, const TensorArg& weight, const TensorArg& workspace, int64_t needed,
                 double gain, bool relu) {
  const Shape& s = p.shape;
  p.x = dense<const float>(x, "x", {s.batch, s.num_in, s.height / s.scale, s.width / s.scale});
  p.weight = dense<const float>(weight, "weight", {s.num_out, s.num_in, s.kernel, s.kernel});
  p.workspace = dense<float>(workspace, "workspace", {needed});
  p.gain = static_cast<float>(gain);
  p.relu = relu;
}

void run_forward(const TensorArg& out, const TensorArg& x, const TensorArg& weight, const TensorArg& bias,
                 const TensorArg& residual, const TensorArg& workspace, double gain, bool relu, int64_t scale) {
  ForwardParams p{};
  p.shape = read_shape(x, weight, scale);
  const Shape& s = p.shape;
  read_inputs(p, x, weight, workspace, forward_workspace(s), gain, relu);
  p.out = dense<float>(out, "out", {s.batch, s.num_out, s.height, s.width});
  p.bias = dense<const float>(bias, "bias", {s.num_out});
  p.residual = dense<const float>(residual, "residual", {s.batch, s.num_out, s.height, s.width});
  require(!out.is_none() && !bias.is_none(), "out and bias: expected tensors");
  pybind11::gil_scoped_release no_gil;
  forward_cpu(p);
}

void run_backward(const TensorArg& dx, const TensorArg& dweight, const TensorArg& dbias, const TensorArg& dout,
                  const TensorArg& x, const TensorArg& weight, const TensorArg& workspace, double gain, bool relu,
                  int64_t scale) {
  BackwardParams p{};
  p.shape = read_shape(x, weight, scale);
  const Shape& s = p.shape;
  read_inputs(p, x, weight, workspace, backward_workspace(s), gain, relu);
  p.dx = dense<float>(dx, "dx", {s.batch, s.num_in, s.height / s.scale, s.width / s.scale});
  p.dweight = dense<float>(dweight, "dweight", {s.num_out, s.num_in, s.kernel, s.kernel});
  p.dbias = dense<float>(dbias, "dbias", {s.num_out});
  p.dout = dense<const float>(dout, "dout", {s.batch, s.num_out, s.height, s.width});
  require(!dout.is_none() && dweight.is_none() == dbias.is_none(),
          "dout: expected a tensor; dweight and dbias: expected both or none");
  pybind11::gil_scoped_release no_gil;
  backward_cpu(p);
}

}  // namespace

void bind_conv2d(pybind11::module_& m) {
  m.def("conv2d_forward", &run_forward);
  m.def("conv2d_backward", &run_backward);
  m.def("conv2d_workspace", [](int64_t batch, int64_t num_in, int64_t num_out, int64_t height, int64_t width,
                               int64_t kernel, bool backward) {
    const Shape shape{batch, num_in, num_out, height, width, kernel, 1};
    return backward ? backward_workspace(shape) : forward_workspace(shape);
  });
}

}  // namespace dalle_fast
