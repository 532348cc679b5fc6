// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace seer::dev {

// The maximum; NaN if one of them is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

}  // namespace seer::dev
