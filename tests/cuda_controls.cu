// SPDX-License-Identifier: MIT
// A planted bug for each tool of compute-sanitizer: one that never found anything proves nothing.
//   controls <tool> <0|1>      0: the same kernel without its bug
#include <cstdio>
#include <cstring>

constexpr int kThreads = 64;

__global__ void overrun(float* out, int planted) { out[threadIdx.x + (planted && threadIdx.x == kThreads - 1)] = 1.0f; }

__global__ void race(float* out, int planted) {
  __shared__ float part[kThreads];
  part[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!planted) __syncthreads();
  out[threadIdx.x] = part[kThreads - 1 - threadIdx.x];
}

__global__ void unwritten(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void divergent(float* out, int planted) {
  if (planted) {
    if (threadIdx.x % 32 < 16) __syncwarp();  // half of the warp, with the mask of all of it
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = 1.0f;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int planted = argv[2][0] == '1';
  float *out = nullptr, *in = nullptr;
  if (cudaMalloc(&out, kThreads * sizeof(float)) != cudaSuccess) return 3;
  if (cudaMalloc(&in, kThreads * sizeof(float)) != cudaSuccess) return 3;
  if (!planted) cudaMemset(in, 0, kThreads * sizeof(float));
  const char* tool = argv[1];
  if (!std::strcmp(tool, "memcheck")) overrun<<<1, kThreads>>>(out, planted);
  if (!std::strcmp(tool, "racecheck")) race<<<1, kThreads>>>(out, planted);
  if (!std::strcmp(tool, "initcheck")) unwritten<<<1, kThreads>>>(out, in);
  if (!std::strcmp(tool, "synccheck")) divergent<<<1, kThreads>>>(out, planted);
  const cudaError_t status = cudaDeviceSynchronize();
  std::printf("%s %s: %s\n", tool, argv[2], cudaGetErrorString(status));
  cudaFree(out);
  cudaFree(in);
  return 0;
}
