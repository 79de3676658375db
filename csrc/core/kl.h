// SPDX-License-Identifier: MIT
// KL(q || uniform) of a row's softmax q over V codes: sum q ln q + ln V. With d = l - largest, and log_sum = ln sum
// e^d: ln q = d - log_sum, KL = sum(e^d d) / sum(e^d) - log_sum + ln V, and its gradient is q (ln q + ln V - KL).
#pragma once

namespace dalle_fast {

// Of a probability, at least: the exponential of it is 0, and 0 * kLeastLog is 0, which 0 * -Inf is not.
constexpr float kLeastLog = -88.0f;

}  // namespace dalle_fast
