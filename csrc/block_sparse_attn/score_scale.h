// SPDX-License-Identifier: Apache-2.0
// The softmax scale as the kernels take it.
#pragma once

#include <algorithm>
#include <cmath>

namespace seer {

struct ScoreScale {
  float log2;  // of positive scores, to units of log2
  float sign;
};

// Scale 0 gives equal weights; a tiny factor does too, and keeps masked scores at -inf * factor
// = -inf where 0 would make them NaN.
inline ScoreScale score_scale(double scale) {
  constexpr double kLog2E = 1.4426950408889634;
  return {std::max(static_cast<float>(std::abs(scale) * kLog2E), 1e-30f), scale < 0 ? -1.0f : 1.0f};
}

}  // namespace seer
