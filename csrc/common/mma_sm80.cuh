// SPDX-License-Identifier: Apache-2.0
// The warp-level matrix product of compute capability 8.0 and the loads that feed it.
//
// One mma computes C[16, 8] += A[16, 16] * B[16, 8] over the 32 lanes of a warp:
//   C, four floats: element e is row lane / 4 + 8 * (e / 2), column 2 * (lane % 4) + e % 2
//   A, four registers of two elements: rows lane / 4 (+ 8 for a[1], a[3]), columns
//      2 * (lane % 4) + {0, 1} (+ 8 for a[2], a[3])
//   B, two registers: column lane / 4, rows 2 * (lane % 4) + {0, 1} (+ 8 for the second)
// So two neighbouring C tiles, rounded to 16 bits, are exactly one A operand: that is how the
// probabilities of attention go from the first product into the second without leaving registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm80.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <type_traits>

namespace seer::dev {

// Row and column of element `e` of the accumulator of `lane`.
__host__ __device__ constexpr int accumulator_row(int lane, int e) {
  return lane / 4 + 8 * (e / 2);
}
__host__ __device__ constexpr int accumulator_col(int lane, int e) {
  return 2 * (lane % 4) + e % 2;
}

// CuTe's layout of the same accumulator maps (lane, element) to row + 16 * column.
constexpr bool accumulator_matches_cute() {
  using Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int expected = accumulator_row(lane, e) + 16 * accumulator_col(lane, e);
      if (int(typename Traits::CLayout{}(lane, e)) != expected) return false;
    }
  }
  return true;
}
static_assert(accumulator_matches_cute(), "accumulator coordinates disagree with CuTe's");

template <class Element>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  using Atom =
      std::conditional_t<std::is_same_v<Element, __nv_bfloat16>,
                         cute::SM80_16x8x16_F32BF16BF16F32_TN, cute::SM80_16x8x16_F32F16F16F32_TN>;
  Atom::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]);
}

// Loads four 8x8 matrices of 16-bit elements. Lane l gives the address of one 16-byte row: of
// matrix l / 8, row l % 8. Register i of a lane then holds row lane / 4, columns
// 2 * (lane % 4) + {0, 1} of matrix i; with _trans, of its transpose.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem));
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem));
}

// Two floats rounded to nearest even and packed, `low` in the low half.
template <class Element>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

}  // namespace seer::dev
