// SPDX-License-Identifier: MIT
#include <vector>

#include "../core/bind.h"
#include "householder.h"

namespace dalle_fast {

void bind_householder(pybind11::module_& m) {
  m.def("householder_orthonormalize", [](const std::vector<TensorArg>& q_args, const std::vector<TensorArg>& p_args,
                                         const std::vector<TensorArg>& work_args, double eps, std::uintptr_t stream) {
    require(q_args.size() == p_args.size(), "q, p: expected equally many tensors");
    require(work_args.empty() || work_args.size() == p_args.size(), "work: expected none or one tensor for each p");
    std::vector<householder::Batch> batches;
    householder::Params params{};
    for (std::size_t i = 0; i < p_args.size(); ++i) {
      const TensorRef p = p_args[i].as("p");  // [count, rows, columns]
      const TensorRef q = q_args[i].as("q");
      require_dtype(p, "p", {DType::kFloat32, DType::kUInt16});
      require_rank(p, "p", 3);
      require_same_dtype(q, "q", p, "p");
      require_same_device(q, "q", p, "p");
      require_shape(q, "q", {p.shape[0], p.shape[1], p.shape[2]});
      require_contiguous(q, "q");
      require(p.shape[1] >= p.shape[2], "p: expected at least as many rows as columns");
      if (i == 0) {
        params.device = p.device;
        params.codes = p.dtype == DType::kUInt16;
      }
      require(p.device == params.device, "p: expected all on one device");
      require((p.dtype == DType::kUInt16) == params.codes, "p: expected one dtype");
      householder::Batch batch{p.data,     q.data,      nullptr,     p.shape[0], p.shape[1],
                               p.shape[2], p.stride[0], p.stride[1], p.stride[2]};
      if (!work_args.empty()) {
        const TensorRef work = work_args[i].as("work");
        require_dtype(work, "work", {DType::kFloat32});
        require_shape(work, "work", {p.shape[0], p.shape[1], p.shape[2]});
        require_contiguous(work, "work");
        require_same_device(work, "work", p, "p");
        batch.work = work.as<float>();
      }
      if (p.numel() > 0) batches.push_back(batch);
    }
    params.batches = batches.data();
    params.num_batches = static_cast<int64_t>(batches.size());
    params.eps = static_cast<float>(eps);
    (void)stream;
    run_on(
        params.device, [&] { householder::orthonormalize_cpu(params); },
        DF_CUDA_LAUNCH(householder::orthonormalize_cuda(params, reinterpret_cast<void*>(stream))));
  });
}

}  // namespace dalle_fast
