// SPDX-License-Identifier: Apache-2.0
// Selection by a threshold on the softmax: two passes over the scores, recomputed, never stored.
//
//   1. maximum and sum of exponentials of each row, per lane, merged at the end
//   2. p > value, that is score - highest > log(value * total): no exponential, no division
//
// Infinite and NaN scores take a slower path of the same loops, so that the ordinary one has no
// test per score but a comparison of what it computes anyway.
#pragma once

#include "pool_gate/gate_tile.cuh"

namespace seer::dev {

constexpr int kThresholdWarps = 4;

// Maximum and sum of weights of the candidates that a lane, then a row, has seen.
struct SoftmaxSum {
  float highest = -INFINITY;
  float total = 0.0f;

  // 8 scores: candidates are those that are numbers, elements 2 t + e with 8 t + e < visible. The
  // others are NaN or -inf. Every multiplication and addition is its own, so that a row's sum is the
  // same in every kernel that computes it, however the compiler fuses.
  __device__ __forceinline__ void add(const float (&x)[8], int visible) {
    float top = highest;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = max_or_nan(top, x[i]);
    if (fabsf(top) < INFINITY) {
      total = __fmul_rn(total, exp_of(highest - top));
#pragma unroll
      for (int i = 0; i < 8; ++i) total = __fadd_rn(total, exp_of(x[i] - top));
      highest = top;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i / 2 * 8 + i % 2 < visible && x[i] == x[i]) merge({x[i], 1.0f});
      }
    }
  }

  __device__ __forceinline__ void merge(const SoftmaxSum& other) {
    const float top = fmaxf(highest, other.highest);
    total = __fadd_rn(__fmul_rn(total, softmax_weight(highest, top)),
                      __fmul_rn(other.total, softmax_weight(other.highest, top)));
    highest = top;
  }

 private:
  static __device__ __forceinline__ float max_or_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
  }
};

// A row's test, made once from its sum.
class ThresholdTest {
 public:
  __device__ __forceinline__ void set(const SoftmaxSum& sum, float value) {
    // Weights below the normal numbers are 0, so nothing under exp(-87.3) passes.
    constexpr float kLogOfTiny = -87.33654f;
    const float total = fmaxf(sum.total, 1.0f);
    highest_ = sum.highest;
    margin_ = fmaxf(logf(__fmul_rn(value, total)), kLogOfTiny);
    // Blocks that share an infinite maximum: all or none.
    if (!ordinary() && !(__fdiv_rn(1.0f, total) > value)) margin_ = INFINITY;
  }
  __device__ __forceinline__ bool ordinary() const { return fabsf(highest_) < INFINITY; }
  __device__ __forceinline__ bool keeps(float score) const { return score - highest_ > margin_; }
  // The same for a maximum that may be infinite, where a difference says nothing.
  __device__ __forceinline__ bool keeps_any(float score) const {
    return ordinary() ? keeps(score) : score == highest_ && margin_ < INFINITY;
  }

 private:
  float highest_, margin_;  // kept: score - highest above the margin
};

template <class Element, int kDim, int kMTiles>
__global__ void __launch_bounds__(32 * kThresholdWarps, kMTiles == 1 ? 4 : 3)
    select_threshold(const __grid_constant__ GateSelectParams p) {
  extern __shared__ __align__(16) char smem[];
  using Stream = KeyStream<Element, kDim, kMTiles, kThresholdWarps>;
  constexpr int kTileRows = 16 * kMTiles * kThresholdWarps, kRows = 2 * kMTiles;
  const GateScoresParams& gate = p.gate;
  const GatePlace at = gate_place(gate, kTileRows);
  const int lane = lane_id(), blocks_q = static_cast<int>(gate.blocks_q);
  const int warp_row = at.first_row + thread_id() / 32 * 16 * kMTiles;
  const int last_row = min(at.first_row + kTileRows, blocks_q) - 1;
  const int columns = visible_blocks(gate, last_row);
  const int fewest = visible_blocks(gate, warp_row);
  const QueryRows<Element, kDim, kMTiles> queries(gate, at, warp_row);
  Stream stream(gate, key_rows(gate, at), smem);
  const auto row_of = [&](int i) { return warp_row + lane / 4 + 8 * i; };

  // The lane's 8 scores of its row i in a word: element 2 t + e is column 8 t + 2 (lane % 4) + e.
  // What the row does not see is -inf; returned: how far it sees, in terms of 8 t + e.
  const auto scores_of = [&](float (&x)[8], const typename Stream::Scores& c, int i, int word) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      x[n] = __fmul_rn(c[i / 2][n / 2][i % 2 * 2 + n % 2], gate.scale);
    }
    if ((word + 1) * kWordColumns <= fewest) return kWordColumns;  // every row of the warp sees it
    const int visible = visible_blocks(gate, row_of(i)) - word * kWordColumns - 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (n / 2 * 8 + n % 2 >= visible) x[n] = -INFINITY;
    }
    return visible;
  };

  SoftmaxSum sum[kRows];
  stream.visit(queries, columns, [&](int word, const typename Stream::Scores& c) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float x[8];
      const int visible = scores_of(x, c, i, word);
      sum[i].add(x, visible);
    }
  });
  ThresholdTest test[kRows];
  bool ordinary = true;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      SoftmaxSum other;
      other.highest = __shfl_xor_sync(kFullWarp, sum[i].highest, mask);
      other.total = __shfl_xor_sync(kFullWarp, sum[i].total, mask);
      sum[i].merge(other);  // commutative, so all lanes of the quad get the same bits
    }
    test[i].set(sum[i], static_cast<float>(p.value));
    ordinary = ordinary && test[i].ordinary();
  }
  ordinary = __all_sync(kFullWarp, ordinary);

  const int words = (static_cast<int>(gate.blocks_kv) + 31) / 32;
  uint32_t* bits = reinterpret_cast<uint32_t*>(p.block_bits) +
                   (int64_t{at.batch} * gate.heads_q + at.head) * blocks_q * words;
  stream.visit(queries, columns, [&](int word, const typename Stream::Scores& c) {
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float x[8];
      const int visible = scores_of(x, c, i, word);
      uint32_t kept = 0;
      if (ordinary) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          if (test[i].keeps(x[n])) kept |= 1u << (n / 2 * 8 + n % 2);
        }
      } else {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const int at_bit = n / 2 * 8 + n % 2;
          if (at_bit < visible && test[i].keeps_any(x[n])) kept |= 1u << at_bit;
        }
      }
      kept <<= 2 * (lane % 4);
      kept |= __shfl_xor_sync(kFullWarp, kept, 1);
      kept |= __shfl_xor_sync(kFullWarp, kept, 2);
      if (lane % 4 == i) mine = kept;
    }
    // Lane i of a quad stores row i of it.
    const int row = row_of(lane % 4);
    if (lane % 4 < kRows && row < blocks_q) {
      bits[int64_t{row} * words + word] =
          mine | forced_bits(p, row, visible_blocks(gate, row), word);
    }
  });
  // Words that no row of the tile sees.
  const int seen = (columns + 31) / 32;
  for (int row = at.first_row + thread_id() / 32; row <= last_row; row += kThresholdWarps) {
    for (int word = seen + lane; word < words; word += 32) bits[int64_t{row} * words + word] = 0;
  }
}

}  // namespace seer::dev
