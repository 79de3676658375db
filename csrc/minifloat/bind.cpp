// SPDX-License-Identifier: MIT
#include "minifloat.h"

#include "../core/bind.h"
#include "../scalar/minifloat.h"

namespace dalle_fast {
namespace {

minifloat::Params params_of(const TensorRef& code, const TensorRef& value, bool has_sign) {
  require_dtype(code, "code", {DType::kUInt16});
  require_dtype(value, "value", {DType::kFloat32});
  require_rank(code, "code", 1);
  require_shape(value, "value", {code.shape[0]});
  require_contiguous(code, "code");
  require_contiguous(value, "value");
  require_same_device(value, "value", code, "code");
  return {code.as<uint16_t>(), value.as<float>(), code.shape[0], has_sign, code.device};
}

}  // namespace

void bind_minifloat(pybind11::module_& m) {
  m.def("minifloat_encode",
        [](const TensorArg& code_arg, const TensorArg& value_arg, bool has_sign, std::uintptr_t stream) {
          const TensorRef code = code_arg.as("code");
          const minifloat::Params params = params_of(code, value_arg.as("value"), has_sign);
          (void)stream;
          run_on(
              code.device, [&] { minifloat::encode_cpu(params); },
              DF_CUDA_LAUNCH(minifloat::encode_cuda(params, reinterpret_cast<void*>(stream))));
        });
  m.def("minifloat_decode",
        [](const TensorArg& value_arg, const TensorArg& code_arg, bool has_sign, std::uintptr_t stream) {
          const TensorRef code = code_arg.as("code");
          const minifloat::Params params = params_of(code, value_arg.as("value"), has_sign);
          (void)stream;
          run_on(
              code.device, [&] { minifloat::decode_cpu(params); },
              DF_CUDA_LAUNCH(minifloat::decode_cuda(params, reinterpret_cast<void*>(stream))));
        });

  // csrc/scalar/minifloat.h itself, with any bias, for its tests.
  m.def("minifloat_encode_scalar", [](float x, bool has_sign, int bias) {
    return has_sign ? minifloat_encode<true>(x, bias) : minifloat_encode<false>(x, bias);
  });
  m.def("minifloat_decode_scalar", [](uint16_t code, bool has_sign, int bias) {
    return has_sign ? minifloat_decode<true>(code, bias) : minifloat_decode<false>(code, bias);
  });
}

}  // namespace dalle_fast
