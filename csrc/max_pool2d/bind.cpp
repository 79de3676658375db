// SPDX-License-Identifier: MIT
#include "max_pool2d.h"

#include "../core/bind.h"

namespace dalle_fast {
namespace {

using namespace max_pool2d;

void* dense(const TensorArg& arg, const char* name, const TensorRef& x, int64_t divisor) {
  const TensorRef t = arg.as(name);
  require_same_dtype(t, name, x, "x");
  require_shape(t, name, {x.shape[0], x.shape[1], x.shape[2] / divisor, x.shape[3] / divisor});
  require_contiguous(t, name);
  require_same_device(t, name, x, "x");
  return t.data;
}

Params read(const TensorRef& x) {
  require_dtype(x, "x", {DType::kFloat32, DType::kBFloat16});
  require_rank(x, "x", 4);
  require_contiguous(x, "x");
  require(x.shape[2] % 2 == 0 && x.shape[3] % 2 == 0, "x: expected even height and width");
  Params p{};
  p.x = x.data;
  p.planes = x.shape[0] * x.shape[1];
  p.height = x.shape[2] / 2;
  p.width = x.shape[3] / 2;
  p.dtype = x.dtype;
  return p;
}

}  // namespace

void bind_max_pool2d(pybind11::module_& m) {
  m.def("max_pool2d_forward", [](const TensorArg& out, const TensorArg& x_arg) {
    const TensorRef x = x_arg.as("x");
    Params p = read(x);
    p.out = dense(out, "out", x, 2);
    run_on_cpu(x.device, [&] { forward_cpu(p); });
  });
  m.def("max_pool2d_backward", [](const TensorArg& dx, const TensorArg& dout, const TensorArg& x_arg) {
    const TensorRef x = x_arg.as("x");
    Params p = read(x);
    p.out = dense(dx, "dx", x, 1);
    p.dout = dense(dout, "dout", x, 2);
    run_on_cpu(x.device, [&] { backward_cpu(p); });
  });
}

}  // namespace dalle_fast
