// SPDX-License-Identifier: MIT
// CUDA twin of the template room: one block per row (grid-stride over rows), threads along the row. Bits are copied, so
// the kernel is instantiated per element size, not per dtype. Floor: one read and one write of the tensor.
#include "null.h"

#include "../core/device.cuh"

namespace dalle_fast::null {
namespace {

constexpr int kThreads = 256;

template <typename Bits>
__global__ void copy_rows(Bits* out, const Bits* input, int64_t num_rows, int64_t row_len, int64_t row_stride) {
  for (int64_t i = blockIdx.x; i < num_rows; i += gridDim.x)
    for (int64_t j = threadIdx.x; j < row_len; j += kThreads) out[i * row_len + j] = input[i * row_stride + j];
}

template <typename Bits>
void launch(const Params& p, void* stream) {
  if (p.num_rows == 0 || p.row_len == 0) return;  // an empty grid is a launch error
  const unsigned grid = static_cast<unsigned>(p.num_rows < 65536 ? p.num_rows : 65536);
  DF_LAUNCH(copy_rows<Bits>, grid, kThreads, 0, stream, static_cast<Bits*>(p.out), static_cast<const Bits*>(p.input),
            p.num_rows, p.row_len, p.row_stride);
}

}  // namespace

void copy_cuda(const Params& p, void* stream) {
  const DeviceGuard guard(p.device.index);
  if (p.dtype == DType::kFloat32)
    launch<uint32_t>(p, stream);
  else
    launch<uint16_t>(p, stream);
}

}  // namespace dalle_fast::null
