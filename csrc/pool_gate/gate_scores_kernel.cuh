// SPDX-License-Identifier: Apache-2.0
// fp32 gate scores, written once. Bound by writing them: 32 heads of 2048 x 2048 blocks are 537 MB.
#pragma once

#include <cstdint>

#include "pool_gate/gate_tile.cuh"

namespace seer::dev {

constexpr int kScoreWarps = 4;

template <class Element, int kDim, bool kPacked>
__global__ void __launch_bounds__(32 * kScoreWarps, 4)
    gate_scores(const __grid_constant__ GateScoresParams p) {
  extern __shared__ __align__(16) char smem[];
  using Stream = KeyStream<Element, kDim, 1, kScoreWarps>;
  constexpr int kTileRows = 16 * kScoreWarps;
  const GatePlace at = gate_place<kPacked>(p, kTileRows);
  const int lane = lane_id(), blocks_q = static_cast<int>(p.blocks_q);
  const int blocks_kv = static_cast<int>(p.blocks_kv);
  const int warp_row = at.first_row + thread_id() / 32 * 16;
  const int last_row = min(at.first_row + kTileRows, blocks_q) - 1;
  const int columns = most_visible(p, at, at.first_row, last_row + 1);
  const QueryRows<Element, kDim, 1> queries(p, at, warp_row);
  float* scores =
      p.scores + (int64_t{at.batch} * p.heads_q + at.head) * blocks_q * int64_t{blocks_kv};
  Stream stream(p, key_rows(p, at), smem);
  const auto store = [&](int word, const typename Stream::Scores& c) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + lane / 4 + 8 * half;
      if (row >= blocks_q) continue;
      const int visible = kPacked && row >= at.blocks_q ? 0 : visible_blocks(p, at, row);
      float* to = scores + int64_t{row} * blocks_kv;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int column = word * kWordColumns + 8 * t + 2 * (lane % 4);
        const float x = column < visible ? c[0][t][2 * half] * p.scale : -INFINITY;
        const float y = column + 1 < visible ? c[0][t][2 * half + 1] * p.scale : -INFINITY;
        if (column + 1 < blocks_kv && blocks_kv % 2 == 0) {
          __stcs(reinterpret_cast<float2*>(to + column), float2{x, y});
        } else {
          if (column < blocks_kv) to[column] = x;
          if (column + 1 < blocks_kv) to[column + 1] = y;
        }
      }
    }
  };
  stream.template visit<1>(queries, columns, columns, store, [](int) {});
  // Columns that no row of the tile sees.
  const int seen = (columns + kWordColumns - 1) / kWordColumns * kWordColumns;
  for (int row = at.first_row + thread_id() / 32; row <= last_row; row += kScoreWarps) {
    float* to = scores + int64_t{row} * blocks_kv;
    for (int column = seen + lane; column < blocks_kv; column += 32) to[column] = -INFINITY;
  }
}

}  // namespace seer::dev
