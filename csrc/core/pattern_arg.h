// SPDX-License-Identifier: MIT
// AttentionPattern as it crosses from Python: seven integers, checked once more because kernels index by them.
#pragma once

#include <array>

#include "../scalar/pattern.h"
#include "check.h"

namespace dalle_fast {

using PatternArg = std::array<int64_t, 7>;  // kind, text_len, height, width, extent, kernel, wraparound

inline Pattern pattern_of(const PatternArg& a) {
  require(a[0] >= 0 && a[0] <= 3, "pattern: unknown kind");
  require(a[1] >= 0 && a[2] >= 1 && a[3] >= 1 && a[4] >= 1 && a[5] >= 1 && a[5] % 2 == 1, "pattern: impossible sizes");
  return {static_cast<PatternKind>(a[0]), a[1], a[2], a[3], a[4], a[5], a[6] != 0};
}

}  // namespace dalle_fast
