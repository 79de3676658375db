// SPDX-License-Identifier: MIT
#include "dropout.h"

#include <cmath>

#include "../core/bind.h"

namespace dalle_fast {

void bind_dropout(pybind11::module_& m) {
  m.def("dropout", [](const TensorArg& out_arg, const TensorArg& x_arg, double p, int64_t seed, int64_t offset,
                      int64_t row_offset, std::uintptr_t stream) {
    const TensorRef out = out_arg.as("out");
    const TensorRef x = x_arg.as("x");  // [num_rows, row_len]
    require_dtype(x, "x", {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
    require_rank(x, "x", 2);
    require_dense_rows(x, "x");
    require_same_dtype(out, "out", x, "x");
    require_same_device(out, "out", x, "x");
    require_shape(out, "out", {x.shape[0], x.shape[1]});
    require_contiguous(out, "out");
    require(p > 0.0 && p < 1.0, "p: expected 0 < p < 1, got " + std::to_string(p));

    dropout::Params params{};
    params.out = out.data;
    params.x = x.data;
    params.num_rows = x.shape[0];
    params.row_len = x.shape[1];
    params.row_stride = x.stride[0];
    params.last_dropped = static_cast<uint32_t>(std::ceil(p * 0x1p32) - 1.0);  // exact: p is scaled by a power of two
    params.scale = static_cast<float>(1.0 / (1.0 - p));
    params.seed = static_cast<uint64_t>(seed);
    params.offset = static_cast<uint64_t>(offset);
    params.row_offset = static_cast<uint32_t>(row_offset);
    params.dtype = x.dtype;
    params.device = x.device;
    (void)stream;
    run_on(
        params.device, [&] { dropout::drop_cpu(params); },
        DF_CUDA_LAUNCH(dropout::drop_cuda(params, reinterpret_cast<void*>(stream))));
  });
}

}  // namespace dalle_fast
