// SPDX-License-Identifier: Apache-2.0
// Fixed-width vectors for the CPU micro-kernels (GCC/Clang vector extensions: one source for
// every instruction set) and the vector exp2.
//
// Everything here is always_inline and takes vectors by reference: the instruction set is that of
// the function it lands in (see kernels_cpu.cpp), and no vector crosses a call boundary, where
// its ABI would depend on the compiler flags.
#pragma once

#include <bit>
#include <cstdint>

namespace seer::cpu {

template <int kLanes>
struct Lanes {
  typedef float Float __attribute__((vector_size(kLanes * 4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kLanes * 4), may_alias));
};

// x = 2^x for x <= 127, lane by lane. NaN stays NaN; below -126 the result is 0 (no subnormals,
// which are slow on many cores). Error below 1.5 ulp, and exact for integers.
//
// 2^x = 2^n * 2^f, n = round(x), |f| <= 1/2. The polynomial 1 + f * p(f) is a relative minimax fit
// of degree 6 (error 2.0e-9) with the constant term held at 1.
template <int kLanes>
[[gnu::always_inline]] inline void exp2_in_place(typename Lanes<kLanes>::Float& x) {
  using Float = typename Lanes<kLanes>::Float;
  using Int = typename Lanes<kLanes>::Int;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low fraction bits.
  constexpr float kRound = 12582912.0f;
  const Float shifted = x + kRound;
  const Float f = x - (shifted - kRound);
  Float p = f * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  // 2^n as a float; the multiplication (not an add to p's exponent) is what keeps NaN a NaN.
  const Int n = (Int)shifted - std::bit_cast<int32_t>(kRound);
  const Float power = (Float)((n + 127) << 23);
  x = x < -126.0f ? Float{} : p * power;
}

}  // namespace seer::cpu
