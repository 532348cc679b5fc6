// SPDX-License-Identifier: Apache-2.0
// Selection by a threshold on the softmax: two passes over the scores, recomputed, never stored.
//
//   1. maximum and sum of exponentials of each row, class by class of its columns
//   2. p > value, that is score - highest > log(value * total): no exponential, no division
//
// A warp works on the scores of all its rows at once, without a branch between rows: the chains of
// dependent instructions of a row (maximum, exponentials, sum) are longer than what the other warps
// of an SM can hide, those of four rows run side by side. Infinite and NaN scores take a slower path.
#pragma once

#include "pool_gate/gate_softmax.cuh"

namespace seer::dev {

constexpr int kThresholdWarps = 4;

// Two tiles of keys, then the sums of the classes.
template <class Element, int kDim, int kMTiles>
constexpr int threshold_smem_bytes() {
  return KeyStream<Element, kDim, kMTiles, kThresholdWarps>::kSmemBytes +
         kClasses * 16 * kMTiles * kThresholdWarps * int{sizeof(float2)};
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

  const auto scores_of = [&](LaneScores<kRows>& x, const Products& c, int word) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        x[i][n] = __fmul_rn(c[i / 2][n / 2][i % 2 * 2 + n % 2], gate.scale);
      }
    }
    if ((word + 1) * kWordColumns <= fewest) return;  // every row of the warp sees it
    hide_unseen<kRows>(x, [&](int i) { return sees(i, word); });
  };

  float2* const sums =
      reinterpret_cast<float2*>(smem + Stream::kSmemBytes) + thread_id() / 32 * kWarpRows;
  LaneSums<kRows> lane_sums;
  stream.template visit<kClasses>(
      queries, columns, most,
      [&](int word, const Products& c) {
        LaneScores<kRows> x;
        scores_of(x, c, word);
        lane_sums.add(x, [&](int i) { return sees(i, word); });
      },
      [&](int done) { lane_sums.finish_class(sums + done * kTileRows); });
  __syncwarp();
  const int classes = min((columns + Stream::kKeys - 1) / Stream::kKeys, kClasses);
  const LaneTests<kRows> tests(sums, kTileRows, classes, static_cast<float>(p.value));

  const int words = (static_cast<int>(gate.blocks_kv) + 31) / 32;
  uint32_t* bits = reinterpret_cast<uint32_t*>(p.block_bits) +
                   (int64_t{at.batch} * gate.heads_q + at.head) * gate.blocks_q * words;
  // Lane i of a quad stores row i of it.
  const int row = row_of(lane % 4);
  const bool stores = lane % 4 < kRows && row < blocks_q;
  uint32_t* const to = bits + int64_t{row} * words;
  const bool forces = p.sink > 0 || p.local > 0 || end_row > blocks_q - p.dense_last_rows;
  stream.template visit<1>(
      queries, columns, most,
      [&](int word, const Products& c) {
        LaneScores<kRows> x;
        scores_of(x, c, word);
        uint32_t mine = word_of_row(tests.kept(x, [&](int i) { return sees(i, word); }));
        if (forces) mine |= forced_bits(p, blocks_q, row, visible_blocks(gate, at, row), word);
        if (stores) to[word] = mine;
      },
      [](int) {});
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
