// SPDX-License-Identifier: Apache-2.0
// Warpgroup matrix products of compute capability 9.0 (wgmma) on tiles in shared memory.
//
// C[64, n] (+)= A[64, 16] * B[16, n], computed by the 128 threads of a warpgroup, asynchronously:
// registers of an operand belong to the tensor core from the call until a wait. Of the 16 rows of a
// warp, a lane holds rows lane / 4 and lane / 4 + 8: element 4 * j + 2 * half + c of an
// accumulator is row lane / 4 + 8 * half, column 8 * j + 2 * (lane % 4) + c. Two neighbouring
// column groups j, rounded to 16 bits, are one A operand, so probabilities never leave registers.
//
// Tiles lie in shared memory as TMA's 128-byte swizzle writes them: panels of 64 columns (128-byte
// rows), groups of 8 rows (1024 bytes), 16-byte chunk c of row r at place c ^ (r % 8).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <type_traits>
#include <utility>

namespace seer::dev {

// Descriptor of an operand in shared memory: address / 16, leading stride / 16 << 16, stride
// between 8-row groups / 16 << 32, 128-byte swizzle.
constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr uint64_t kGroupStride = uint64_t{1024 / 16} << 32;

__device__ __forceinline__ uint64_t smem_descriptor(uint64_t layout, uint32_t address) {
  return layout | ((address & 0x3ffff) >> 4);
}
// The reduction runs along the 128-byte rows (Q and K in Q K^T).
constexpr uint64_t kAlongRows = kSwizzle128 | kGroupStride | (uint64_t{1} << 16);
// The reduction runs down the rows (V in P V); the next 64 columns are `panel_bytes` further.
constexpr uint64_t down_rows(int panel_bytes) {
  return kSwizzle128 | kGroupStride | (static_cast<uint64_t>(panel_bytes / 16) << 16);
}

namespace detail {
namespace gmma = cute::SM90::GMMA;
using gmma::Major;

template <class Element, int kColumns>
struct Atoms;
template <>
struct Atoms<__nv_bfloat16, 64> {
  using ScoresSmem = gmma::MMA_64x64x16_F32BF16BF16_SS<Major::K, Major::K>;
  using ScoresRegs = gmma::MMA_64x64x16_F32BF16BF16_RS<Major::K, Major::K>;
  using Values = gmma::MMA_64x64x16_F32BF16BF16_RS<Major::K, Major::MN>;
};
template <>
struct Atoms<__half, 64> {
  using ScoresSmem = gmma::MMA_64x64x16_F32F16F16_SS<Major::K, Major::K>;
  using ScoresRegs = gmma::MMA_64x64x16_F32F16F16_RS<Major::K, Major::K>;
  using Values = gmma::MMA_64x64x16_F32F16F16_RS<Major::K, Major::MN>;
};
template <>
struct Atoms<__nv_bfloat16, 128> {
  using Values = gmma::MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>;
};
template <>
struct Atoms<__half, 128> {
  using Values = gmma::MMA_64x128x16_F32F16F16_RS<Major::K, Major::MN>;
};

template <class Atom, size_t... kIndex>
__device__ __forceinline__ void fma(float* c, uint64_t a, uint64_t b, bool accumulate,
                                    std::index_sequence<kIndex...>) {
  Atom::fma(a, b, c[kIndex]..., accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}
template <class Atom, size_t... kIndex>
__device__ __forceinline__ void fma(float* c, const uint32_t* a, uint64_t b, bool accumulate,
                                    std::index_sequence<kIndex...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, c[kIndex]...,
            accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}
}  // namespace detail

// One k-step of 16 of scores (64 x 64) = Q K^T, with Q in shared memory (a descriptor) or in four
// registers. The first k-step overwrites the accumulator.
template <class Element, class Operand>
__device__ __forceinline__ void wgmma_scores(float (&c)[32], const Operand& a, uint64_t b,
                                             bool accumulate) {
  using Atoms = detail::Atoms<Element, 64>;
  using Atom = std::conditional_t<std::is_same_v<Operand, uint64_t>, typename Atoms::ScoresSmem,
                                  typename Atoms::ScoresRegs>;
  detail::fma<Atom>(c, a, b, accumulate, std::make_index_sequence<32>{});
}

// One k-step of 16 of out (64 x head_dim) += P V, with P in four registers.
template <class Element, int kRegisters>
__device__ __forceinline__ void wgmma_values(float (&c)[kRegisters], const uint32_t* p,
                                             uint64_t v) {
  using Atom = typename detail::Atoms<Element, 2 * kRegisters>::Values;
  detail::fma<Atom>(c, p, v, true, std::make_index_sequence<kRegisters>{});
}

// The compiler must not move uses of these registers across this point.
template <class Register, int kCount>
__device__ __forceinline__ void pin(Register (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(registers[i]);
}

}  // namespace seer::dev
