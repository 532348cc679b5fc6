// SPDX-License-Identifier: Apache-2.0
// Division by a number that the host knows: a product and a shift, a tenth of a division's time.
#pragma once

#include <cstdint>

namespace seer::dev {

// Divides numbers from 0 on by `by` >= 1. With 2^bits >= by > 2^(bits - 1) and
// multiplier = ceil(2^(31 + bits) / by), n * multiplier / 2^(31 + bits) exceeds n / by by less than
// 1 / by as long as n < 2^31, so both have the same integer part.
struct Divisor {
  uint32_t multiplier;
  int bits;
  int by;

  static Divisor of(int by) {
    Divisor result{0, 0, by};
    while ((int64_t{1} << result.bits) < by) ++result.bits;
    const uint64_t one = uint64_t{1} << (31 + result.bits);
    result.multiplier = static_cast<uint32_t>((one + by - 1) / by);
    return result;
  }

  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>(__umulhi(2 * static_cast<uint32_t>(n), multiplier) >> bits);
  }
};

}  // namespace seer::dev
