// SPDX-License-Identifier: MIT
// One block a (sample, key-value head); a warp takes every fourth key, its lanes the head dimension, with a running
// softmax; the warps' parts meet in shared memory in a fixed order. Floor: one read of the keys and values in sight.
#include <stdexcept>

#include "../core/device_math.cuh"
#include "decode_attention.h"

namespace dalle_fast::decode_attention {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxDim = 256;
constexpr int kPer = kMaxDim / 32;  // channels of a lane

template <typename T>
__device__ __forceinline__ T* row3(const Tensor3& t, int64_t b, int64_t h) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h;
}
template <typename T>
__device__ __forceinline__ T* row4(const Tensor4& t, int64_t b, int64_t h, int64_t l) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h + l * t.stride_l;
}

struct Running {
  float largest, sum;
  float out[kPer];
};

template <typename T>
__device__ __forceinline__ void add_key(Running& r, const float* q, const T* key, const T* value, int dim, int lane) {
  float score = 0.0f;
  DF_UNROLL
  for (int j = 0; j < kPer; ++j)
    if (lane + 32 * j < dim) score += q[j] * to_float(key[lane + 32 * j]);
  for (int bits = 16; bits > 0; bits /= 2) score += __shfl_xor_sync(0xffffffffu, score, bits);
  const float largest = score > r.largest ? score : r.largest;  // a NaN score leaves it alone and spoils the sum
  const float keep = r.sum == 0.0f ? 0.0f : expf(r.largest - largest), weight = expf(score - largest);
  r.largest = largest;
  r.sum = r.sum * keep + weight;
  DF_UNROLL
  for (int j = 0; j < kPer; ++j)
    if (lane + 32 * j < dim) r.out[j] = r.out[j] * keep + weight * to_float(value[lane + 32 * j]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) decode(const Params p) {
  DF_SHARED(float, part, kWarps*(kMaxDim + 2));
  const int64_t b = blockIdx.x / p.num_kv_heads, kv = blockIdx.x % p.num_kv_heads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = static_cast<int>(p.head_dim);
  const bool text = p.position < p.pattern.text_len;
  const int64_t text_b = b / (p.batch / p.text_batch);
  const int64_t num_text = text ? p.position + 1 : p.pattern.text_len;
  const int64_t query = p.position - p.pattern.text_len;

  T* new_k = text ? row4<T>(p.text_k, b, kv, p.position) : row4<T>(p.image_k, b, kv, query % p.ring_len);
  T* new_v = text ? row4<T>(p.text_v, b, kv, p.position) : row4<T>(p.image_v, b, kv, query % p.ring_len);
  for (int d = threadIdx.x; d < dim; d += kThreads) {
    new_k[d] = row3<T>(p.k, b, kv)[d];
    new_v[d] = row3<T>(p.v, b, kv)[d];
  }
  __syncthreads();

  const int64_t group = p.num_heads / p.num_kv_heads;
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    float q[kPer];
    Running r{-INFINITY, 0.0f, {}};
    DF_UNROLL
    for (int j = 0; j < kPer; ++j)
      q[j] = lane + 32 * j < dim ? to_float(row3<T>(p.q, b, h)[lane + 32 * j]) * p.scale : 0.0f;
    for (int64_t i = warp; i < num_text; i += kWarps)
      add_key(r, q, row4<T>(p.text_k, text_b, kv, i), row4<T>(p.text_v, text_b, kv, i), dim, lane);
    if (!text)
      for (int64_t key = first_image_key(p.pattern, query) + warp; key <= query; key += kWarps) {
        if (!image_may_attend(p.pattern, query, key)) continue;
        const int64_t slot = key % p.ring_len;
        add_key(r, q, row4<T>(p.image_k, b, kv, slot), row4<T>(p.image_v, b, kv, slot), dim, lane);
      }
    float* mine = &part[warp * (kMaxDim + 2)];
    DF_UNROLL
    for (int j = 0; j < kPer; ++j)
      if (lane + 32 * j < dim) mine[lane + 32 * j] = r.out[j];
    if (lane == 0) {
      mine[kMaxDim] = r.largest;
      mine[kMaxDim + 1] = r.sum;
    }
    __syncthreads();
    float largest = -INFINITY, sum = 0.0f;
    for (int w = 0; w < kWarps; ++w)
      if (part[w * (kMaxDim + 2) + kMaxDim] > largest) largest = part[w * (kMaxDim + 2) + kMaxDim];
    float factor[kWarps];
    DF_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      const float its = part[w * (kMaxDim + 2) + kMaxDim + 1];
      factor[w] = its == 0.0f ? 0.0f : expf(part[w * (kMaxDim + 2) + kMaxDim] - largest);
      sum += its * factor[w];
    }
    for (int d = threadIdx.x; d < dim; d += kThreads) {
      float x = 0.0f;
      DF_UNROLL
      for (int w = 0; w < kWarps; ++w) x += part[w * (kMaxDim + 2) + d] * factor[w];
      from_float(&row3<T>(p.out, b, h)[d], x / sum);
    }
    __syncthreads();  // the next head writes `part`
  }
}

template <typename T>
void run(const Params& p, void* stream) {
  DF_LAUNCH(decode<T>, static_cast<unsigned>(p.batch * p.num_kv_heads), kThreads, 0, stream, p);
}

}  // namespace

void forward_cuda(const Params& p, void* stream) {
  if (p.head_dim > kMaxDim) throw std::invalid_argument("q: the CUDA kernel takes at most 256 channels a head");
  const DeviceGuard guard(p.device.index);
  with_element_type(p.dtype, [&](auto x) { run<decltype(x)>(p, stream); });
}

}  // namespace dalle_fast::decode_attention
