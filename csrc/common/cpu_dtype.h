// SPDX-License-Identifier: Apache-2.0
// Element conversions of the CPU kernels: exact to fp32, round-to-nearest-even from it. Written
// without branches, tables or fp32 subnormals, so that loops over them vectorise and a process
// that flushes subnormals still converts every float16 exactly.
#pragma once

#include <bit>
#include <cstdint>

namespace seer {

inline float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// A NaN stays a NaN: the quiet bit is set, because the kept half of its payload may be zero.
inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>((nan ? bits | 0x00400000u : rounded) >> 16);
}

inline float float16_to_float(uint16_t bits) {
  constexpr uint32_t kRebias = (127u - 15u) << 23;
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t body = (bits & 0x7fffu) << 13;
  // Subnormal: put the fraction behind the exponent of 2^-14, then take the implicit one away.
  constexpr uint32_t kSmallestNormal = 0x38800000u;  // 2^-14
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(kSmallestNormal + body) -
                                                 std::bit_cast<float>(kSmallestNormal));
  const bool special = body >= 0x0f800000u;  // exponent 31: infinity or NaN
  const uint32_t large = body + (special ? 2u * kRebias : kRebias);
  return std::bit_cast<float>(sign | (body < 0x00800000u ? small : large));
}

inline uint16_t float_to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t body = bits & 0x7fffffffu;
  // Normal: drop 13 fraction bits. A carry out of the largest finite number gives infinity.
  const uint32_t normal = (body - 0x38000000u + 0xfffu + ((body >> 13) & 1u)) >> 13;
  // Subnormal: 0.5 has the ulp 2^-24 of the float16 subnormals, so this addition rounds to them.
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(body) + 0.5f) - 0x3f000000u;
  const uint32_t special = body > 0x7f800000u ? 0x7e00u | ((body >> 13) & 0x1ffu) : 0x7c00u;
  const uint32_t finite = body < 0x38800000u ? small : normal;
  return static_cast<uint16_t>(sign | (body >= 0x47800000u ? special : finite));
}

}  // namespace seer
