// SPDX-License-Identifier: Apache-2.0
// Pooling of one block by one warp: maximum, minimum and mean over its rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/mma_sm80.cuh"
#include "common/warp.cuh"
#include "seer/pool_gate.h"

namespace seer::dev {

template <class Element>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

// Both propagate NaN.
template <class Element>
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) {
  uint32_t y;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  }
  return y;
}
template <class Element>
__device__ __forceinline__ uint32_t min_pair(uint32_t a, uint32_t b) {
  uint32_t y;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  } else {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  }
  return y;
}

// 8 elements. x is read once: past L1, first out of L2.
__device__ __forceinline__ uint4 load_chunk(const char* x) {
  uint4 chunk;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
               : "l"(x));
  return chunk;
}

// One lane's 8 channels of a block, pooled over the rows the lane reads, then over the warp.
template <class Element, int kHeadDim, int kPools>
struct BlockPool {
  static constexpr int kLanesPerRow = kHeadDim / 8;
  static constexpr int kRowsPerLoad = 32 / kLanesPerRow;
  static constexpr int kBatch = kHeadDim / 8;  // loads in flight per lane: 32 rows
  static constexpr uint32_t kInfinity = std::is_same_v<Element, __nv_bfloat16> ? 0x7f80u : 0x7c00u;

  uint32_t highest[4], lowest[4];
  float sum[8];

  __device__ __forceinline__ BlockPool() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      highest[i] = (kInfinity | 0x8000u) * 0x10001u;
      lowest[i] = kInfinity * 0x10001u;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = 0.0f;
  }

  __device__ __forceinline__ void add(const uint4& chunk) {
    const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr ((kPools & kPoolMax) != 0) highest[i] = max_pair<Element>(highest[i], pairs[i]);
      if constexpr ((kPools & kPoolMin) != 0) lowest[i] = min_pair<Element>(lowest[i], pairs[i]);
      if constexpr ((kPools & kPoolAvg) != 0) {
        const float2 values = unpack_pair<Element>(pairs[i]);
        sum[2 * i] += values.x;
        sum[2 * i + 1] += values.y;
      }
    }
  }

  // x: the lane's chunk of the block's row lane / kLanesPerRow; `step`: bytes to the next load.
  // Whole batches have no test per load: seven predicates would not cover them, and loads would
  // wait for the first ones' data.
  __device__ __forceinline__ void read(const char* x, int64_t step, int rows) {
    int row = 0;
#pragma unroll 1
    for (; row + kBatch * kRowsPerLoad <= rows; row += kBatch * kRowsPerLoad) {
      read_batch<kBatch>(x, step);
    }
    if (row + kBatch / 2 * kRowsPerLoad <= rows) {  // blocks of 16 rows
      read_batch<kBatch / 2>(x, step);
      row += kBatch / 2 * kRowsPerLoad;
    }
#pragma unroll 1
    for (row += lane_id() / kLanesPerRow; row < rows; row += kRowsPerLoad) {
      read_batch<1>(x, step);
    }
  }

  __device__ __forceinline__ void reduce(int rows) {
    __syncwarp();
#pragma unroll
    for (int mask = kLanesPerRow; mask < 32; mask *= 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr ((kPools & kPoolMax) != 0)
          highest[i] = max_pair<Element>(highest[i], __shfl_xor_sync(kFullWarp, highest[i], mask));
        if constexpr ((kPools & kPoolMin) != 0)
          lowest[i] = min_pair<Element>(lowest[i], __shfl_xor_sync(kFullWarp, lowest[i], mask));
      }
      if constexpr ((kPools & kPoolAvg) != 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], mask);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = __fdiv_rn(sum[i], static_cast<float>(rows));
  }

  // Writes max | min | avg, 16-bit.
  __device__ __forceinline__ void store_rounded(char* row, int lane) const {
    char* at = row + lane % kLanesPerRow * 16;
    if (lane >= kLanesPerRow) return;
    if constexpr ((kPools & kPoolMax) != 0) {
      *reinterpret_cast<uint4*>(at) = {highest[0], highest[1], highest[2], highest[3]};
      at += 2 * kHeadDim;
    }
    if constexpr ((kPools & kPoolMin) != 0) {
      *reinterpret_cast<uint4*>(at) = {lowest[0], lowest[1], lowest[2], lowest[3]};
      at += 2 * kHeadDim;
    }
    if constexpr ((kPools & kPoolAvg) != 0) {
      *reinterpret_cast<uint4*>(at) = {
          pack_pair<Element>(sum[0], sum[1]), pack_pair<Element>(sum[2], sum[3]),
          pack_pair<Element>(sum[4], sum[5]), pack_pair<Element>(sum[6], sum[7])};
    }
  }

  // The same in fp32.
  __device__ __forceinline__ void store_exact(float* row, int lane) const {
    float* at = row + lane % kLanesPerRow * 8;
    if (lane >= kLanesPerRow) return;
    const auto unpack_to = [&](const uint32_t (&pairs)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<float2*>(at + 2 * i) = unpack_pair<Element>(pairs[i]);
      }
      at += kHeadDim;
    };
    if constexpr ((kPools & kPoolMax) != 0) unpack_to(highest);
    if constexpr ((kPools & kPoolMin) != 0) unpack_to(lowest);
    if constexpr ((kPools & kPoolAvg) != 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) at[i] = sum[i];
    }
  }

 private:
  template <int kLoads>
  __device__ __forceinline__ void read_batch(const char*& x, int64_t step) {
    uint4 chunks[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      chunks[i] = load_chunk(x);
      x += step;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) add(chunks[i]);
  }
};

}  // namespace seer::dev
