// SPDX-License-Identifier: Apache-2.0
// Selection by a threshold on the softmax: two passes over the scores, recomputed, never stored.
//
//   1. maximum and sum of exponentials of each row, per lane, merged at the end
//   2. p > value, that is score - highest > log(value * total): no exponential, no division
//
// A warp works on the scores of all its rows at once, without a branch between rows: the chains of
// dependent instructions of a row (maximum, exponentials, sum) are longer than what the other warps
// of an SM can hide, those of four rows run side by side. Infinite and NaN scores take a slower path.
#pragma once

#include "pool_gate/gate_tile.cuh"

namespace seer::dev {

constexpr int kThresholdWarps = 4;

// Maximum and sum of weights of the candidates that a lane, then a row, has seen.
struct SoftmaxSum {
  float highest = -INFINITY;
  float total = 0.0f;

  // The maximum with 8 scores more, NaN if one is.
  __device__ __forceinline__ float top_with(const float (&x)[8]) const {
    const float low = max_or_nan(max_or_nan(x[0], x[1]), max_or_nan(x[2], x[3]));
    const float high = max_or_nan(max_or_nan(x[4], x[5]), max_or_nan(x[6], x[7]));
    return max_or_nan(highest, max_or_nan(low, high));
  }

  // 8 scores, hidden ones -inf, with a finite maximum. Every rounding is written out, so that a
  // row's sum is the same in every kernel that computes it, however the compiler fuses.
  __device__ __forceinline__ void add(const float (&x)[8], float top) {
    float weight[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) weight[i] = exp_of(x[i] - top);
    const float low = __fadd_rn(__fadd_rn(weight[0], weight[1]), __fadd_rn(weight[2], weight[3]));
    const float high = __fadd_rn(__fadd_rn(weight[4], weight[5]), __fadd_rn(weight[6], weight[7]));
    total = __fmaf_rn(total, exp_of(highest - top), __fadd_rn(low, high));
    highest = top;
  }

  // 8 scores, whatever they are: candidates are those that are numbers, elements 2 t + e with
  // 8 t + e < visible.
  __device__ __forceinline__ void add_any(const float (&x)[8], float top, int visible) {
    if (fabsf(top) < INFINITY) return add(x, top);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i / 2 * 8 + i % 2 < visible && x[i] == x[i]) merge({x[i], 1.0f});
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
    // Below 2^-150 a weight rounds to 0 in fp32, which exceeds no threshold.
    constexpr float kLogOfTiny = -103.97208f;
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
    const float shared = ordinary() || margin_ == INFINITY ? NAN : highest_;
    return keeps(score) | (score == shared);
  }

 private:
  float highest_, margin_;  // kept: score - highest above the margin
};

// From the lanes of a quad to the word of a row. A lane has 8 bits of each of 4 rows: bit 2 t + e of
// byte i is column 8 t + 2 (lane % 4) + e of row i. It gets the 32 columns of row lane % 4.
__device__ __forceinline__ uint32_t word_of_row(uint32_t rows) {
  const int lane = lane_id();
  // Bytes: a 4 x 4 transposition between the lanes, in two exchanges.
  rows = __byte_perm(rows, __shfl_xor_sync(kFullWarp, rows, 1), lane % 2 == 0 ? 0x6240 : 0x3715);
  rows = __byte_perm(rows, __shfl_xor_sync(kFullWarp, rows, 2), lane % 4 < 2 ? 0x5410 : 0x3276);
  // Pairs of bits: byte q has columns 2 q of t = 0 .. 3, the same transposition inside the word.
  uint32_t swap = (rows >> 6 ^ rows) & 0x00cc00ccu;
  rows ^= swap ^ swap << 6;
  swap = (rows >> 12 ^ rows) & 0x0000f0f0u;
  return rows ^ swap ^ swap << 12;
}

template <class Element, int kDim, int kMTiles, bool kPacked>
__global__ void __launch_bounds__(32 * kThresholdWarps, kMTiles == 1 ? 4 : 3)
    select_threshold(const __grid_constant__ GateSelectParams p) {
  extern __shared__ __align__(16) char smem[];
  using Stream = KeyStream<Element, kDim, kMTiles, kThresholdWarps>;
  using Products = typename Stream::Scores;
  constexpr int kWarpRows = 16 * kMTiles, kTileRows = kWarpRows * kThresholdWarps;
  constexpr int kRows = 2 * kMTiles;  // of a lane
  const GateScoresParams& gate = p.gate;
  const GatePlace at = gate_place<kPacked>(gate, kTileRows);
  const int lane = lane_id(), blocks_q = at.blocks_q;
  const int warp_row = at.first_row + thread_id() / 32 * kWarpRows;
  const int end_row = min(warp_row + kWarpRows, blocks_q);  // may be before warp_row: no rows
  const int columns = most_visible(gate, at, at.first_row, at.first_row + kTileRows);
  const int fewest = visible_blocks(gate, at, warp_row);
  const int most = most_visible(gate, at, warp_row, end_row);
  const QueryRows<Element, kDim, kMTiles> queries(gate, at, warp_row);
  Stream stream(gate, key_rows(gate, at), smem);
  const auto row_of = [&](int i) { return warp_row + lane / 4 + 8 * i; };
  // How far the lane's row i sees inside a word, in terms of 8 t + e.
  const auto sees = [&](int i, int word) {
    return visible_blocks(gate, at, row_of(i)) - word * kWordColumns - 2 * (lane % 4);
  };

  // The lane's 8 scores of each of its rows: element 2 t + e is column 8 t + 2 (lane % 4) + e. What
  // a row does not see is -inf.
  const auto scores_of = [&](float (&x)[kRows][8], const Products& c, int word) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        x[i][n] = __fmul_rn(c[i / 2][n / 2][i % 2 * 2 + n % 2], gate.scale);
      }
    }
    if ((word + 1) * kWordColumns <= fewest) return;  // every row of the warp sees it
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int visible = sees(i, word);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (n / 2 * 8 + n % 2 >= visible) x[i][n] = -INFINITY;
      }
    }
  };

  SoftmaxSum sum[kRows];
  stream.visit(queries, columns, most, [&](int word, const Products& c) {
    float x[kRows][8], top[kRows];
    scores_of(x, c, word);
    bool ordinary = true;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      top[i] = sum[i].top_with(x[i]);
      ordinary = ordinary && fabsf(top[i]) < INFINITY;
    }
    if (ordinary) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i].add(x[i], top[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i].add_any(x[i], top[i], sees(i, word));
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
                   (int64_t{at.batch} * gate.heads_q + at.head) * gate.blocks_q * words;
  // Lane i of a quad stores row i of it.
  const int row = row_of(lane % 4);
  const bool stores = lane % 4 < kRows && row < blocks_q;
  uint32_t* const to = bits + int64_t{row} * words;
  const bool forces = p.sink > 0 || p.local > 0 || end_row > blocks_q - p.dense_last_rows;
  stream.visit(queries, columns, most, [&](int word, const Products& c) {
    float x[kRows][8];
    scores_of(x, c, word);
    uint32_t kept[kRows] = {};
    if (ordinary) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          if (test[i].keeps(x[i][n])) kept[i] |= 1u << (8 * i + n);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int visible = sees(i, word);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const bool seen = n / 2 * 8 + n % 2 < visible;
          if (seen & test[i].keeps_any(x[i][n])) kept[i] |= 1u << (8 * i + n);
        }
      }
    }
    uint32_t rows = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) rows |= kept[i];
    uint32_t mine = word_of_row(rows);
    if (forces) mine |= forced_bits(p, blocks_q, row, visible_blocks(gate, at, row), word);
    if (stores) to[word] = mine;
  });
  // Words that no row of the warp sees.
  for (int i = warp_row; i < end_row; ++i) {
    for (int word = (most + 31) / 32 + lane; word < words; word += 32) {
      bits[int64_t{i} * words + word] = 0;
    }
  }
  if constexpr (kPacked) {
    clear_rows(bits, words, max(at.first_row, blocks_q),
               min(at.first_row + kTileRows, static_cast<int>(gate.blocks_q)), kThresholdWarps);
  }
}

}  // namespace seer::dev
