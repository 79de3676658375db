// SPDX-License-Identifier: MIT
// A warp owns a row of up to 1024 codes, a block a longer one; a thread takes groups of four codes: one 16-byte load,
// one Philox call. Up to 16384 codes wait in registers between the sums and the results, so that an element is read
// once, written once, and costs one exponential a distribution: a thread's are taken against its own largest value, and
// one factor a thread makes up for it. Longer rows are read twice and draw their noise twice.
//
// Floor: a chunk stays in the second-level cache, so instructions count. On sm_90 an element is about 38 of them
// forward (Philox 9, noise 13, two exponentials and their sums) and 44 backward: for 8 x 32 x 32 rows of 8192 codes 87
// us and 100 us of issue slots, beside 5 ms for each of the four products with C = 2048 at the rate of float32.
#include "../core/gumbel.cuh"
#include "../core/rows.cuh"
#include "vq_bottleneck.h"

namespace dalle_fast::vq_bottleneck {
namespace {

// Four elements of a row, packed or not; rows are aligned and padded.
__device__ __forceinline__ void load_four(float (&v)[4], const float* from) {
  unpack_piece<float>(v, *reinterpret_cast<const Piece*>(from));
}
template <typename T>
__device__ __forceinline__ void store_four(T* to, const float (&v)[4]) {
  const auto raw = pack<T>(v);
  *reinterpret_cast<std::remove_const_t<decltype(raw)>*>(to) = raw;
}

// The logits of a row.
struct Row {
  const float* logits;
  const float* bias;
  int num_codes;
  bool bias_in_pieces;

  template <typename P>
  __device__ __forceinline__ Row(const P& p, int64_t row)
      : logits(p.logits + row * p.stride),
        bias(p.bias),
        num_codes(static_cast<int>(p.num_codes)),
        bias_in_pieces(reinterpret_cast<std::uintptr_t>(p.bias) % 16 == 0) {}

  // logits + bias of codes [c, c + 4), some of which exist; the others get -Inf, and so no weight.
  __device__ __forceinline__ void load(float (&x)[4], int c) const {
    load_four(x, logits + c);
    if (c + 4 <= num_codes && bias_in_pieces) {  // as a null pointer is
      float b[4] = {};
      if (bias) load_four(b, bias + c);
      DF_UNROLL
      for (int k = 0; k < 4; ++k) x[k] += b[k];
      return;
    }
    DF_UNROLL
    for (int k = 0; k < 4; ++k) x[k] = c + k < num_codes ? x[k] + (bias ? bias[c + k] : 0.0f) : -INFINITY;
  }
};

// f(i, first code) of this thread's groups in the tile that begins at code `first`
template <int kGroups, typename F>
__device__ __forceinline__ void for_each_group(int first, int num_codes, F f) {
  DF_UNROLL
  for (int i = 0; i < kGroups; ++i) {
    const int c = first + 4 * (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x));
    if (c < num_codes) f(i, c);
  }
}
template <int kGroups>
__device__ __forceinline__ int tile_codes() {
  return 4 * kGroups * static_cast<int>(blockDim.x);
}

// ---- forward

// Of both distributions the largest value and the sum of exponentials against it; of q also that times
// (logit - largest_logit). NaN or Inf spoil the sums, as in torch.softmax.
struct Sums {
  float largest, sum, largest_logit, sum_q, sum_qx;

  __device__ __forceinline__ void raise(float top, float top_logit, float factor) {
    if (top > largest) {
      sum *= fast_exp2((largest - top) * factor);
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
constexpr Sums kNoSums{-FLT_MAX, 0.0f, -FLT_MAX, 0.0f, 0.0f};  // -Inf - largest is -Inf, not NaN

// What over_row() adds up.
struct RowSums : Sums {
  float factor;
};
__device__ __forceinline__ RowSums over_lanes(RowSums s) {
  using dalle_fast::over_lanes;
  s.raise(over_lanes(s.largest, Larger{}), over_lanes(s.largest_logit, Larger{}), s.factor);
  s.sum = over_lanes(s.sum);
  s.sum_q = over_lanes(s.sum_q);
  s.sum_qx = over_lanes(s.sum_qx);
  return s;
}

template <typename T, int kGroups>
__global__ void __launch_bounds__(kMaxRowThreads) relax(const RelaxParams p, const NoiseSource noise) {
  DF_SHARED(RowSums, part, kMaxRowThreads / 32);
  const int64_t row = row_of_thread();
  const int tile = tile_codes<kGroups>(), num_codes = static_cast<int>(p.num_codes);
  if (row >= p.num_rows) return;  // a warp of its own
  const Row logits(p, row);
  T* const y = static_cast<T*>(p.y) + row * p.stride;
  const uint32_t number = p.noise.first_row + static_cast<uint32_t>(row);
  const float factor = p.noise.inverse_tau * kLog2e;

  float z[kGroups][4];  // perturbed logits, then exponentials
  Sums mine = kNoSums;
  for (int first = 0; first < num_codes; first += tile) {
    float x[kGroups][4], top = -FLT_MAX, top_logit = -FLT_MAX;
    for_each_group<kGroups>(first, num_codes, [&](int i, int c) {
      logits.load(x[i], c);
      const Philox4 words = noise.words(static_cast<uint32_t>(c / 4), number);
      DF_UNROLL
      for (int k = 0; k < 4; ++k) {
        z[i][k] = add_gumbel(x[i][k], words.word[k]);
        top = fmaxf(top, z[i][k]);
        top_logit = fmaxf(top_logit, x[i][k]);
      }
    });
    mine.raise(top, top_logit, factor);
    for_each_group<kGroups>(first, num_codes, [&](int i, int) {
      DF_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float d = x[i][k] - mine.largest_logit, q = fast_exp(d);
        mine.sum_q += q;
        mine.sum_qx += q * fmaxf(d, kLeastLog);
        z[i][k] = fast_exp2((z[i][k] - mine.largest) * factor);
        mine.sum += z[i][k];
      }
    });
  }
  const RowSums sums = over_row(RowSums{mine, factor}, part, RowSums{kNoSums, factor});

  const float inverse_sum = 1.0f / sums.sum;
  if (threadIdx.x == 0) {
    const float log_sum = logf(sums.sum_q);
    p.stats[row] = {sums.largest, inverse_sum, sums.largest_logit, log_sum};
    p.kl[row] = sums.sum_qx / sums.sum_q - log_sum + logf(static_cast<float>(p.num_codes));
  }
  if (num_codes <= tile) {
    const float scale = fast_exp2((mine.largest - sums.largest) * factor) * inverse_sum;
    for_each_group<kGroups>(0, num_codes, [&](int i, int c) {
      DF_UNROLL
      for (int k = 0; k < 4; ++k) z[i][k] *= scale;
      store_four(y + c, z[i]);
    });
    return;
  }
  for (int first = 0; first < num_codes; first += tile)
    for_each_group<kGroups>(first, num_codes, [&](int i, int c) {
      logits.load(z[i], c);
      const Philox4 words = noise.words(static_cast<uint32_t>(c / 4), number);
      DF_UNROLL
      for (int k = 0; k < 4; ++k)
        z[i][k] = fast_exp2((add_gumbel(z[i][k], words.word[k]) - sums.largest) * factor) * inverse_sum;
      store_four(y + c, z[i]);
    });
}

// ---- backward

template <typename T, int kGroups>
__global__ void __launch_bounds__(kMaxRowThreads) gradient(const GradientParams p, const NoiseSource noise) {
  DF_SHARED(float, part, kMaxRowThreads / 32);
  const int64_t row = row_of_thread();
  const int tile = tile_codes<kGroups>(), num_codes = static_cast<int>(p.num_codes);
  if (row >= p.num_rows) return;  // a warp of its own
  const Row logits(p, row);
  const float* const dy = p.dy + row * p.stride;
  T* const y = static_cast<T*>(p.y) + row * p.stride;
  T* const dlogits = static_cast<T*>(p.dlogits) + row * p.stride;
  const uint32_t number = p.noise.first_row + static_cast<uint32_t>(row);
  const float inverse_tau = p.noise.inverse_tau, factor = inverse_tau * kLog2e, dkl = p.dkl[row];
  const float entropy = logf(static_cast<float>(p.num_codes)) - p.kl[row];
  const RowStats stats = p.stats[row];

  // y of four codes, and dlogits without the mean of dy; returns the sum of y * dy
  const auto compute = [&](float (&relaxed)[4], float (&dl)[4], int c) {
    float x[4], upstream[4], sum = 0.0f;
    logits.load(x, c);
    load_four(upstream, dy + c);
    const Philox4 words = noise.words(static_cast<uint32_t>(c / 4), number);
    DF_UNROLL
    for (int k = 0; k < 4; ++k) {
      relaxed[k] = fast_exp2((add_gumbel(x[k], words.word[k]) - stats.largest) * factor) * stats.inverse_sum;
      const float log_q = fmaxf(x[k] - stats.largest_logit - stats.log_sum, kLeastLog);
      const float product = c + k < num_codes ? relaxed[k] * upstream[k] : 0.0f;
      dl[k] = product * inverse_tau + dkl * fast_exp(log_q) * (log_q + entropy);
      sum += product;
    }
    return sum;
  };
  float relaxed[kGroups][4], dl[kGroups][4], sum = 0.0f;
  for (int first = 0; first < num_codes; first += tile)
    for_each_group<kGroups>(first, num_codes, [&](int i, int c) { sum += compute(relaxed[i], dl[i], c); });
  const float mean = over_row(sum, part, 0.0f) * inverse_tau;
  for (int first = 0; first < num_codes; first += tile)
    for_each_group<kGroups>(first, num_codes, [&](int i, int c) {
      if (num_codes > tile) compute(relaxed[i], dl[i], c);
      DF_UNROLL
      for (int k = 0; k < 4; ++k) dl[i][k] -= mean * relaxed[i][k];
      store_four(dlogits + c, dl[i]);
      store_four(y + c, relaxed[i]);
    });
}

// ---- launches

// f(T{}, integral_constant<int, groups of four codes a thread holds>)
template <typename F>
void with_kernel(DType dtype, int64_t num_codes, F f) {
  const auto with_groups = [&](auto x) {
    if (num_codes <= 256) return f(x, std::integral_constant<int, 2>{});
    f(x, std::integral_constant<int, kHeld / 4>{});
  };
  dtype == DType::kFloat32 ? with_groups(float{}) : with_groups(bf16_t{});
}

}  // namespace

void relax_cuda(const RelaxParams& p, void* stream) {
  if (p.num_rows == 0 || p.num_codes == 0) return;
  const DeviceGuard guard(p.device.index);
  const NoiseSource noise(p.noise.seed, p.noise.offset);
  const RowLaunch launch(p.num_rows, p.num_codes);
  with_kernel(p.dtype, p.num_codes, [&](auto x, auto groups) {
    DF_LAUNCH((relax<decltype(x), decltype(groups)::value>), launch.blocks, launch.block, 0, stream, p, noise);
  });
}

void gradient_cuda(const GradientParams& p, void* stream) {
  if (p.num_rows == 0 || p.num_codes == 0) return;
  const DeviceGuard guard(p.device.index);
  const NoiseSource noise(p.noise.seed, p.noise.offset);
  const RowLaunch launch(p.num_rows, p.num_codes);
  with_kernel(p.dtype, p.num_codes, [&](auto x, auto groups) {
    DF_LAUNCH((gradient<decltype(x), decltype(groups)::value>), launch.blocks, launch.block, 0, stream, p, noise);
  });
}

}  // namespace dalle_fast::vq_bottleneck
