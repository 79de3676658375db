// SPDX-License-Identifier: MIT
// A warp or a block of 256 threads owns a row; a thread takes groups of four codes: one 16-byte load, one Philox call.
// A row of up to 8192 codes waits in registers between its two halves (sums; results), so that each element is read
// once, written once, and costs one exponential a distribution; wider rows are read twice and draw their noise twice.
// Floor: the chunk fits the second-level cache, so it is arithmetic, some 45 instructions an element.
#include <type_traits>

#include "../core/gumbel.cuh"
#include "vq_bottleneck.h"

namespace dalle_fast::vq_bottleneck {
namespace {

constexpr unsigned kThreads = 256;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.4028235e38f;  // where maxima begin: -Inf - kLowest is -Inf, not NaN
constexpr float kLeastLog = -88.0f;        // of a probability: its exponential is 0, and 0 * kLeastLog is 0

__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * kLog2e); }
__device__ __forceinline__ float fast_log(float x) { return fast_log2(x) * kLn2; }

struct alignas(16) Four {
  float value[4];
};
struct alignas(8) FourHalves {
  uint32_t pair[2];
};

__device__ __forceinline__ void store_four(float* to, const float (&v)[4]) {
  *reinterpret_cast<Four*>(to) = {{v[0], v[1], v[2], v[3]}};
}
__device__ __forceinline__ void store_four(bf16_t* to, const float (&v)[4]) {
  *reinterpret_cast<FourHalves*>(to) = {{pack2<bf16_t>(v[0], v[1]), pack2<bf16_t>(v[2], v[3])}};
}
__device__ __forceinline__ void load_four(float (&v)[4], const float* from) {
  const Four four = *reinterpret_cast<const Four*>(from);
  DF_UNROLL
  for (int k = 0; k < 4; ++k) v[k] = four.value[k];
}

// logits + bias of codes [c, c + 4), some of which exist; the others get -Inf, and so no weight.
__device__ __forceinline__ void load_logits(float (&x)[4], const float* logits, const float* bias, int64_t c,
                                            int64_t num_codes) {
  load_four(x, logits + c);
  DF_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (c + k >= num_codes)
      x[k] = -INFINITY;
    else if (bias)
      x[k] += bias[c + k];
  }
}

// ---- threads of a row

template <typename F>
__device__ __forceinline__ float warp_reduce(float x, F combine) {
  DF_UNROLL
  for (int bits = 16; bits > 0; bits /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, bits));
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  return warp_reduce(x, [](float a, float b) { return fmaxf(a, b); });  // passes NaN over: sums keep it
}
__device__ __forceinline__ float warp_sum(float x) {
  return warp_reduce(x, [](float a, float b) { return a + b; });
}

// kTeam threads of one row, kGroups groups of four codes a thread at a time.
template <unsigned kTeam, int kGroups>
struct Team {
  static constexpr int64_t kTile = int64_t{4} * kTeam * kGroups;  // codes at a time
  static constexpr unsigned kRows = kThreads / kTeam;             // of a block

  static __device__ __forceinline__ int64_t row() {
    return static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kTeam;
  }
  // f(i, first code) of this thread's groups in the tile that begins at code `first`
  template <typename F>
  static __device__ __forceinline__ void for_each_group(int64_t first, int64_t num_codes, F f) {
    DF_UNROLL
    for (int i = 0; i < kGroups; ++i) {
      const int64_t c = first + int64_t{4} * (i * kTeam + threadIdx.x % kTeam);
      if (c < num_codes) f(i, c);
    }
  }
};

// ---- forward

// Largest value and sums of exponentials of both distributions, of q also the sum of q * (logit - largest_logit).
struct Sums {
  float largest, sum, largest_logit, sum_q, sum_qx;

  __device__ __forceinline__ void raise(float top, float top_logit, float inverse_tau) {
    if (top > largest) {
      sum *= fast_exp((largest - top) * inverse_tau);
      largest = top;
    }
    if (top_logit > largest_logit) {
      const float step = fmaxf(largest_logit - top_logit, kLeastLog), scale = fast_exp(step);
      sum_qx = (sum_qx + sum_q * step) * scale;
      sum_q *= scale;
      largest_logit = top_logit;
    }
  }
};

// The sums of a row from those of its warps; `sums` of a warp agrees in all lanes.
template <unsigned kTeam>
__device__ __forceinline__ Sums merge_warps(Sums sums, float inverse_tau) {
  if constexpr (kTeam == 32) return sums;
  constexpr unsigned kWarps = kTeam / 32;
  DF_SHARED(Sums, part, kWarps);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sums;
  __syncthreads();
  Sums mine = part[threadIdx.x % kWarps];
  mine.raise(warp_max(mine.largest), warp_max(mine.largest_logit), inverse_tau);
  constexpr float kShare = 1.0f / (32 / kWarps);  // each warp counts four times
  return {mine.largest, warp_sum(mine.sum) * kShare, mine.largest_logit, warp_sum(mine.sum_q) * kShare,
          warp_sum(mine.sum_qx) * kShare};
}

template <typename T, unsigned kTeam, int kGroups>
__global__ void __launch_bounds__(kThreads) relax(const RelaxParams p) {
  using Work = Team<kTeam, kGroups>;
  const int64_t row = Work::row();
  if (row >= p.num_rows) return;  // whole warps
  const float* const logits = p.logits + row * p.stride;
  const uint32_t number = p.noise.first_row + static_cast<uint32_t>(row);
  const NoiseSource noise(p.noise.seed, p.noise.offset);

  float z[kGroups][4];  // perturbed logits, then exponentials
  Sums sums{kLowest, 0.0f, kLowest, 0.0f, 0.0f};
  for (int64_t first = 0; first < p.num_codes; first += Work::kTile) {
    float x[kGroups][4], top = kLowest, top_logit = kLowest;
    Work::for_each_group(first, p.num_codes, [&](int i, int64_t c) {
      load_logits(x[i], logits, p.bias, c, p.num_codes);
      const Philox4 words = noise.words(static_cast<uint32_t>(c / 4), number);
      DF_UNROLL
      for (int k = 0; k < 4; ++k) {
        z[i][k] = add_gumbel(x[i][k], words.word[k]);
        top = fmaxf(top, z[i][k]);
        top_logit = fmaxf(top_logit, x[i][k]);
      }
    });
    sums.raise(warp_max(top), warp_max(top_logit), p.noise.inverse_tau);
    Work::for_each_group(first, p.num_codes, [&](int i, int64_t) {
      DF_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float d = x[i][k] - sums.largest_logit, q = fast_exp(d);
        sums.sum_q += q;
        sums.sum_qx += q * fmaxf(d, kLeastLog);  // 0 * -Inf would not be 0
        z[i][k] = fast_exp((z[i][k] - sums.largest) * p.noise.inverse_tau);
        sums.sum += z[i][k];
      }
    });
  }
  const float shift = sums.largest;  // of the exponentials in z
  sums.sum = warp_sum(sums.sum);
  sums.sum_q = warp_sum(sums.sum_q);
  sums.sum_qx = warp_sum(sums.sum_qx);
  sums = merge_warps<kTeam>(sums, p.noise.inverse_tau);

  const float inverse_sum = 1.0f / sums.sum;
  if (threadIdx.x % kTeam == 0) {
    const float log_sum = logf(sums.sum_q);
    p.stats[row] = {sums.largest, inverse_sum, sums.largest_logit, log_sum};
    p.kl[row] = sums.sum_qx / sums.sum_q - log_sum + logf(static_cast<float>(p.num_codes));
  }
  T* const y = static_cast<T*>(p.y) + row * p.stride;
  if (p.num_codes <= Work::kTile) {
    const float scale = fast_exp((shift - sums.largest) * p.noise.inverse_tau) * inverse_sum;
    Work::for_each_group(0, p.num_codes, [&](int i, int64_t c) {
      DF_UNROLL
      for (int k = 0; k < 4; ++k) z[i][k] *= scale;
      store_four(y + c, z[i]);
    });
    return;
  }
  for (int64_t first = 0; first < p.num_codes; first += Work::kTile)
    Work::for_each_group(first, p.num_codes, [&](int i, int64_t c) {
      load_logits(z[i], logits, p.bias, c, p.num_codes);
      const Philox4 words = noise.words(static_cast<uint32_t>(c / 4), number);
      DF_UNROLL
      for (int k = 0; k < 4; ++k)
        z[i][k] = fast_exp((add_gumbel(z[i][k], words.word[k]) - sums.largest) * p.noise.inverse_tau) * inverse_sum;
      store_four(y + c, z[i]);
    });
}

// ---- backward

template <unsigned kTeam>
__device__ __forceinline__ float team_sum(float x) {
  x = warp_sum(x);
  if constexpr (kTeam == 32) return x;
  constexpr unsigned kWarps = kTeam / 32;
  DF_SHARED(float, part, kWarps);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  DF_UNROLL
  for (unsigned i = 0; i < kWarps; ++i) sum += part[i];
  return sum;
}

template <typename T, unsigned kTeam, int kGroups>
__global__ void __launch_bounds__(kThreads) gradient(const GradientParams p) {
  using Work = Team<kTeam, kGroups>;
  const int64_t row = Work::row();
  if (row >= p.num_rows) return;  // whole warps
  const float* const logits = p.logits + row * p.stride;
  const float* const dy = p.dy + row * p.stride;
  T* const y = static_cast<T*>(p.y) + row * p.stride;
  T* const dlogits = static_cast<T*>(p.dlogits) + row * p.stride;
  const uint32_t number = p.noise.first_row + static_cast<uint32_t>(row);
  const NoiseSource noise(p.noise.seed, p.noise.offset);
  const RowStats stats = p.stats[row];
  const float dkl = p.dkl[row], entropy = logf(static_cast<float>(p.num_codes)) - p.kl[row];

  // y of four codes, and dlogits without the mean of dy; returns the sum of y * dy
  const auto compute = [&](float (&relaxed)[4], float (&dl)[4], int64_t c) {
    float x[4], upstream[4], sum = 0.0f;
    load_logits(x, logits, p.bias, c, p.num_codes);
    load_four(upstream, dy + c);
    const Philox4 words = noise.words(static_cast<uint32_t>(c / 4), number);
    DF_UNROLL
    for (int k = 0; k < 4; ++k) {
      relaxed[k] = fast_exp((add_gumbel(x[k], words.word[k]) - stats.largest) * p.noise.inverse_tau) * stats.inverse_sum;
      const float log_q = fmaxf(x[k] - stats.largest_logit - stats.log_sum, kLeastLog);
      const float product = c + k < p.num_codes ? relaxed[k] * upstream[k] : 0.0f;
      dl[k] = product * p.noise.inverse_tau + dkl * fast_exp(log_q) * (log_q + entropy);
      sum += product;
    }
    return sum;
  };
  float relaxed[kGroups][4], dl[kGroups][4], sum = 0.0f;
  for (int64_t first = 0; first < p.num_codes; first += Work::kTile)
    Work::for_each_group(first, p.num_codes, [&](int i, int64_t c) { sum += compute(relaxed[i], dl[i], c); });
  const float mean = team_sum<kTeam>(sum) * p.noise.inverse_tau;
  for (int64_t first = 0; first < p.num_codes; first += Work::kTile)
    Work::for_each_group(first, p.num_codes, [&](int i, int64_t c) {
      if (p.num_codes > Work::kTile) compute(relaxed[i], dl[i], c);
      DF_UNROLL
      for (int k = 0; k < 4; ++k) dl[i][k] -= mean * relaxed[i][k];
      store_four(dlogits + c, dl[i]);
      store_four(y + c, relaxed[i]);
    });
}

// ---- launches

// f(team size, groups a thread), the fewest that hold a row.
template <typename F>
void with_team(int64_t num_codes, F f) {
  using std::integral_constant;
  if (num_codes <= 256) return f(integral_constant<unsigned, 32>(), integral_constant<int, 2>());
  if (num_codes <= 1024) return f(integral_constant<unsigned, 32>(), integral_constant<int, 8>());
  if (num_codes <= 4096) return f(integral_constant<unsigned, kThreads>(), integral_constant<int, 4>());
  f(integral_constant<unsigned, kThreads>(), integral_constant<int, 8>());
}

template <typename T, unsigned kTeam, int kGroups>
void launch(const RelaxParams& p, unsigned blocks, void* stream) {
  DF_LAUNCH((relax<T, kTeam, kGroups>), blocks, kThreads, 0, stream, p);
}
template <typename T, unsigned kTeam, int kGroups>
void launch(const GradientParams& p, unsigned blocks, void* stream) {
  DF_LAUNCH((gradient<T, kTeam, kGroups>), blocks, kThreads, 0, stream, p);
}

template <typename P>
void run(const P& p, void* stream) {
  if (p.num_rows == 0 || p.num_codes == 0) return;
  const DeviceGuard guard(p.device.index);
  with_team(p.num_codes, [&](auto team, auto groups) {
    constexpr unsigned kTeam = decltype(team)::value;
    constexpr int kGroups = decltype(groups)::value;
    constexpr int64_t kRows = kThreads / kTeam;
    const auto blocks = static_cast<unsigned>((p.num_rows + kRows - 1) / kRows);
    if (p.dtype == DType::kFloat32)
      launch<float, kTeam, kGroups>(p, blocks, stream);
    else
      launch<bf16_t, kTeam, kGroups>(p, blocks, stream);
  });
}

}  // namespace

void relax_cuda(const RelaxParams& p, void* stream) { run(p, stream); }
void gradient_cuda(const GradientParams& p, void* stream) { run(p, stream); }

}  // namespace dalle_fast::vq_bottleneck
