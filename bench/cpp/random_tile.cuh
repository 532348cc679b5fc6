// SPDX-License-Identifier: Apache-2.0
// Random operands for the loops that measure the tensor cores.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace seer::bench {

// Two bfloat16 numbers of random sign and fraction between 0.5 and 2: as many bits switch as do with
// normal values. The generator is Marsaglia's xorshift (2003) behind a multiplication.
__device__ inline uint32_t random_pair(uint32_t* state) {
  uint32_t x = *state * 2654435761u + 1u;
  x ^= x << 13;
  x ^= x >> 17;
  x ^= x << 5;
  *state = x;
  return (x & 0x80ff80ffu) | 0x3f003f00u;
}

// Compared with to keep results alive: sums of such numbers are not this one.
constexpr float kNeverASum = 1.2345678e30f;

}  // namespace seer::bench
