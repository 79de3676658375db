// SPDX-License-Identifier: MIT
// y = softmax((x + g) / tau) and argmax(x + g), noise drawn where it is used.
//
// Floor, for 8 x 32 x 32 rows of 8192 codes: one read and one write at 4.3 TB/s, 125 us in float32, 62 us in 16 bits.
// Codes dense, an element is 38 instructions on sm_90 (Philox 9, noise 13, the rest conversions, softmax and sums): 86
// us of issue slots. So float32 is bound by memory, 16 bits by instructions. Rows dense with that many codes draw the
// noise twice: 58 instructions (131 us) and three passes over memory. The KL is 7 instructions more
// forward and 8 backward, where the logits are read once more.
#include "codes_dense.cuh"
#include "rows_dense.cuh"

namespace dalle_fast::gumbel_softmax {
namespace {

// Dynamic shared memory of a block of rows, two of which are resident with what they have besides
constexpr std::size_t kPartBytes = sizeof(SoftmaxState) * kWarps * kMaxTile,
                      kKlBytes = sizeof(KlSums) * kWarps * kMaxTile;
static_assert(kPartBytes <= 4096, "what every kernel of rows has");
constexpr std::size_t most_kept(std::size_t limit, std::size_t besides) { return limit / 2 - 4096 - besides; }
static_assert(fits_every_device([](std::size_t limit) constexpr {
                return 2 * (most_kept(limit, kKlBytes) + kPartBytes + kKlBytes) + kReservedShared;
              }),
              "shared memory of a device");

struct TileLaunch {
  unsigned rows, blocks;
  std::size_t shared = 0;  // bytes

  // `code_bytes`: what would have to be kept of a code; `besides`: more shared memory of a block than 4 KiB
  template <typename P>
  TileLaunch(const P& p, std::size_t code_bytes, std::size_t besides = 0)
      : rows(p.num_codes <= 512 ? kMaxTile : kMaxTile / 2) {
    blocks = static_cast<unsigned>((p.outer * p.inner + rows - 1) / rows);
    const std::size_t bytes = rows * code_bytes * ((static_cast<std::size_t>(p.num_codes) + 3) / 4 * 4);
    if (bytes <= most_kept(shared_limit(p.device.index), besides)) shared = bytes;
  }
};

// Whether all these tensors are made of aligned pieces, along the codes or along the rows.
template <typename T, typename P>
bool in_pieces(const P& p, std::initializer_list<const void*> tensors) {
  const int64_t dense = p.inner == 1 ? p.num_codes : p.inner;
  bool all = true;
  for (const void* t : tensors) all = all && rows_are_pieces<T>(t, dense, dense);
  return all;
}

// f(std::bool_constant)
template <typename F>
void with_bool(bool value, F&& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

// f(std::integral_constant<int, rows of a thread>)
template <typename T, typename F>
void with_rows_of_thread(bool pieces, F&& f) {
  pieces ? f(std::integral_constant<int, kPiece<T>>{}) : f(std::integral_constant<int, 1>{});
}

template <typename P>
bool nothing(const P& p) {
  return p.outer * p.inner == 0 || p.num_codes == 0;
}

template <typename T>
void forward(const Params& p, void* stream) {
  const NoiseSource noise(p.seed, p.offset);
  const float factor = p.inverse_tau * kLog2e;
  const bool pieces = in_pieces<T>(p, {p.logits, p.y});
  if (p.inner == 1) {
    const RowLaunch launch(p.outer, p.num_codes);
    with_rows(pieces, launch.full, [&](auto rows) {
      constexpr Rows kRows = decltype(rows)::value;
      constexpr Rows kLong = kRows == Rows::kFull ? Rows::kPieces : kRows;
      with_bool(p.kl, [&](auto kl) {
        constexpr bool kKl = decltype(kl)::value;
        const auto kernel = p.num_codes <= kMaxHeld ? soft_codes<T, kRows, kKl> : soft_long_codes<T, kLong, kKl>;
        DF_LAUNCH(kernel, launch.blocks, launch.block, 0, stream, p, noise, factor);
      });
    });
    return;
  }
  const TileLaunch launch(p, sizeof(float), p.kl ? kKlBytes : 0);
  with_rows_of_thread<T>(pieces, [&](auto rows) {
    with_bool(p.kl, [&](auto kl) {
      const auto kernel = soft_rows<T, decltype(rows)::value, decltype(kl)::value>;
      const bool keep = launch.shared > 0;
      allow_dynamic_shared(kernel, launch.shared);
      DF_LAUNCH(kernel, launch.blocks, kThreads, launch.shared, stream, p, noise, factor, launch.rows, keep);
    });
  });
}

template <typename T>
void argmax(const Params& p, void* stream) {
  const NoiseSource noise(p.seed, p.offset);
  const bool pieces = in_pieces<T>(p, {p.logits});
  if (p.inner == 1) {
    const RowLaunch launch(p.outer, p.num_codes);
    with_pieces(pieces, [&](auto rows) {
      with_bool(p.kl, [&](auto kl) {
        const auto kernel = hard_codes<T, decltype(rows)::value, decltype(kl)::value>;
        DF_LAUNCH(kernel, launch.blocks, launch.block, 0, stream, p, noise);
      });
    });
    return;
  }
  const TileLaunch launch(p, 0);
  with_rows_of_thread<T>(pieces, [&](auto rows) {
    with_bool(p.kl, [&](auto kl) {
      const auto kernel = hard_rows<T, decltype(rows)::value, decltype(kl)::value>;
      DF_LAUNCH(kernel, launch.blocks, kThreads, 0, stream, p, noise, launch.rows);
    });
  });
}

template <typename T, bool kRelaxed, bool kKl>
void backward(const BackwardParams& p, void* stream) {
  const bool pieces = in_pieces<T>(p, {p.y, p.dy, p.logits, p.dlogits});
  if (p.inner == 1) {
    const RowLaunch launch(p.outer, p.num_codes);
    if constexpr (kRelaxed) {
      with_rows(pieces, launch.full, [&](auto rows) {
        DF_LAUNCH((backward_codes<T, decltype(rows)::value, kKl>), launch.blocks, launch.block, 0, stream, p);
      });
    } else {
      with_pieces(pieces, [&](auto rows) {
        DF_LAUNCH((kl_backward_codes<T, decltype(rows)::value>), launch.blocks, launch.block, 0, stream, p);
      });
    }
    return;
  }
  const TileLaunch launch(p, kRelaxed ? 2 * sizeof(T) : 0);
  with_rows_of_thread<T>(pieces, [&](auto rows) {
    const auto kernel = backward_rows<T, decltype(rows)::value, kRelaxed, kKl>;
    allow_dynamic_shared(kernel, launch.shared);
    DF_LAUNCH(kernel, launch.blocks, kThreads, launch.shared, stream, p, launch.rows, launch.shared > 0);
  });
}

}  // namespace

void forward_cuda(const Params& p, void* stream) {
  if (nothing(p)) return;
  const DeviceGuard guard(p.device.index);
  with_element_type(p.dtype, [&](auto x) { forward<decltype(x)>(p, stream); });
}

void argmax_cuda(const Params& p, void* stream) {
  if (nothing(p)) return;
  const DeviceGuard guard(p.device.index);
  with_element_type(p.dtype, [&](auto x) { argmax<decltype(x)>(p, stream); });
}

void backward_cuda(const BackwardParams& p, void* stream) {
  if (nothing(p)) return;
  const DeviceGuard guard(p.device.index);
  with_element_type(p.dtype, [&](auto x) {
    using T = decltype(x);
    if (!p.dkl) return backward<T, true, false>(p, stream);
    p.dy ? backward<T, true, true>(p, stream) : backward<T, false, true>(p, stream);
  });
}

}  // namespace dalle_fast::gumbel_softmax
