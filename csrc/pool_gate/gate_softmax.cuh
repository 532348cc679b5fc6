// SPDX-License-Identifier: Apache-2.0
// What the kernels of the threshold have in common: the sum of a row, its test, its bits.
//
// A row's sum has one order whatever kernel adds it up. Tiles of 64 columns fall into kClasses
// classes, tile t into class t % kClasses. In a class each lane of a quad adds its columns up, in
// their order, then the four merge; the row's sum is that of its classes, in theirs. So a warp may
// do all classes of a row or one of them.
#pragma once

#include "common/max_or_nan.cuh"
#include "pool_gate/gate_tile.cuh"

namespace seer::dev {

constexpr int kClasses = 8;

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

  // 8 scores, hidden ones -inf, with a finite maximum, or all of them and of those before hidden.
  // Every rounding is written out, so that a row's sum is the same in every kernel that computes
  // it, however the compiler fuses.
  __device__ __forceinline__ void add(const float (&x)[8], float top) {
    const float from = top == -INFINITY ? 0.0f : top;
    float weight[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) weight[i] = exp_of(x[i] - from);
    const float low = __fadd_rn(__fadd_rn(weight[0], weight[1]), __fadd_rn(weight[2], weight[3]));
    const float high = __fadd_rn(__fadd_rn(weight[4], weight[5]), __fadd_rn(weight[6], weight[7]));
    total = __fmaf_rn(total, exp_of(highest - from), __fadd_rn(low, high));
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
  // That of another lane.
  __device__ __forceinline__ ThresholdTest of_lane(int lane) const {
    ThresholdTest other;
    other.highest_ = __shfl_sync(kFullWarp, highest_, lane);
    other.margin_ = __shfl_sync(kFullWarp, margin_, lane);
    return other;
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

// The lane's scores of a word's 32 columns: element [i][2 t + e] is column 8 t + 2 (lane % 4) + e of
// its row i.
template <int kRows>
using LaneScores = float[kRows][8];

// What a row does not see is -inf. sees(i): how far row i sees inside the word, in terms of 8 t + e.
template <int kRows, class Sees>
__device__ __forceinline__ void hide_unseen(LaneScores<kRows>& x, const Sees& sees) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int visible = sees(i);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (n / 2 * 8 + n % 2 >= visible) x[i][n] = -INFINITY;
    }
  }
}

// Sums of a lane's rows, side by side: one branch for all of them.
template <int kRows>
struct LaneSums {
  SoftmaxSum sum[kRows];

  template <class Sees>
  __device__ __forceinline__ void add(const LaneScores<kRows>& x, const Sees& sees) {
    float top[kRows];
    bool ordinary = true;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      top[i] = sum[i].top_with(x[i]);
      ordinary = ordinary & (fabsf(top[i]) < INFINITY);
    }
    if (!ordinary) {  // still so, if the other rows have seen nothing yet
      ordinary = true;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        ordinary = ordinary & ((fabsf(top[i]) < INFINITY) | ((sees(i) <= 0) & (top[i] < 0.0f)));
      }
    }
    if (ordinary) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i].add(x[i], top[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i].add_any(x[i], top[i], sees(i));
    }
  }

  // The end of a class: the quad's sum of row i to to[8 i + lane / 4].
  __device__ __forceinline__ void finish_class(float2* to) {
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        SoftmaxSum other;
        other.highest = __shfl_xor_sync(kFullWarp, sum[i].highest, mask);
        other.total = __shfl_xor_sync(kFullWarp, sum[i].total, mask);
        sum[i].merge(other);  // commutative, so all lanes of the quad get the same bits
      }
      if (lane % 4 == 0) to[8 * i + lane / 4] = {sum[i].highest, sum[i].total};
      sum[i] = {};
    }
  }
};

// The tests of a lane's rows.
template <int kRows>
struct LaneTests {
  ThresholdTest test[kRows];
  bool ordinary;  // no row of the warp has an infinite maximum

  // From the sums of the first `classes` classes, `stride` rows each: those of row i at
  // sums[8 i + lane / 4]. Classes after them are empty.
  __device__ __forceinline__ LaneTests(const float2* sums, int stride, int classes, float value) {
    const int lane = lane_id();
    const float2* mine = sums + 8 * (lane % 4 % kRows) + lane / 4;  // lane i of a quad: row i
    SoftmaxSum row;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      if (c < classes) row.highest = fmaxf(row.highest, mine[c * stride].x);
    }
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      const float2 part = c < classes ? mine[c * stride] : float2{-INFINITY, 0.0f};
      row.total = __fmaf_rn(part.y, softmax_weight(part.x, row.highest), row.total);
    }
    ThresholdTest own;
    own.set(row, value);
#pragma unroll
    for (int i = 0; i < kRows; ++i) test[i] = own.of_lane(lane / 4 * 4 + i);
    ordinary = __all_sync(kFullWarp, own.ordinary());
  }

  // Byte i: the bits of row i, as word_of_row takes them.
  template <class Sees>
  __device__ __forceinline__ uint32_t kept(const LaneScores<kRows>& x, const Sees& sees) const {
    uint32_t rows[kRows] = {};
    if (ordinary) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          if (test[i].keeps(x[i][n])) rows[i] |= 1u << (8 * i + n);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int visible = sees(i);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const bool seen = n / 2 * 8 + n % 2 < visible;
          if (seen & test[i].keeps_any(x[i][n])) rows[i] |= 1u << (8 * i + n);
        }
      }
    }
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) all |= rows[i];
    return all;
  }
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

}  // namespace seer::dev
