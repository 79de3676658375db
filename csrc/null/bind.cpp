// SPDX-License-Identifier: MIT
// Binding of the template room: TensorArg -> checks -> Params -> back end. Outputs first, stream last.
#include "../core/bind.h"
#include "null.h"

namespace dalle_fast {

void bind_null(pybind11::module_& m) {
  m.def("null_copy", [](const TensorArg& out_arg, const TensorArg& input_arg, std::uintptr_t stream) {
    const TensorRef out = out_arg.as("out");
    const TensorRef input = input_arg.as("input");  // [num_rows, row_len]
    require_dtype(input, "input", {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
    require_rank(input, "input", 2);
    require_dense_rows(input, "input");
    require_same_dtype(out, "out", input, "input");
    require_same_device(out, "out", input, "input");
    require_shape(out, "out", {input.shape[0], input.shape[1]});
    require_contiguous(out, "out");

    null::Params params{};
    params.out = out.data;
    params.input = input.data;
    params.num_rows = input.shape[0];
    params.row_len = input.shape[1];
    params.row_stride = input.stride[0];
    params.dtype = input.dtype;
    params.device = input.device;
    (void)stream;
    run_on(
        params.device, [&] { null::copy_cpu(params); },
        DF_CUDA_LAUNCH(null::copy_cuda(params, reinterpret_cast<void*>(stream))));
  });
}

}  // namespace dalle_fast
