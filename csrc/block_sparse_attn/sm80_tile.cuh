// SPDX-License-Identifier: Apache-2.0
// What a warp does with one KV tile: scores = Q K^T, masking, and out += P V.
#pragma once

#include <cstdint>

#include "block_sparse_attn/sm80_traits.cuh"
#include "common/async_copy.cuh"
#include "common/mma_sm80.cuh"
#include "common/online_softmax.cuh"

namespace seer::dev {

// Accumulators of a warp. [m]: 16-row half; [n]: 8-column tile; [e]: see mma_sm80.cuh.
// The lane's row i = 2 * m + e / 2 of OnlineSoftmax is row 16 * m + lane / 4 + 8 * (e / 2).
template <class Traits>
struct WarpTile {
  using Element = typename Traits::Element;
  static constexpr int kOutTiles = Traits::kHeadDim / 8;
  static constexpr int kScoreTiles = Traits::kTileKv / 8;
  static constexpr int kRows = 4;

  float out[2][kOutTiles][4];
  float scores[2][kScoreTiles][4];
  OnlineSoftmax<kRows> softmax;

  __device__ __forceinline__ WarpTile() {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[m][n][e] = 0.0f;
      }
    }
  }

  // scores = Q K^T. `q` and `k`: shared addresses of the warp's first Q row and of the K tile.
  // Half a k-step (one Q fragment pair, half the K rows: 8 products) is the unit of work; the
  // fragments of the next unit are requested before the products of this one.
  __device__ __forceinline__ void multiply_qk(uint32_t q, uint32_t k, const LaneOffsets& lane) {
    constexpr int kUnits = Traits::kHeadDim / 16 * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
      }
    }
    uint32_t q_frag[2][4], k_frag[2][2][4];
    const uint32_t q_lane = recompute_from(lane.upper_lower);
    const uint32_t k_lane = recompute_from(lane.left_right);
    load_q(q_frag[0], q, 0, q_lane);
    load_q(q_frag[1], q, 1, q_lane);
    load_k(k_frag[0], k, 0, k_lane);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      if (unit + 1 < kUnits) load_k(k_frag[(unit + 1) % 2], k, unit + 1, k_lane);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const uint32_t (&b)[4] = k_frag[unit % 2][pair];
          const int n = unit % 2 * 4 + pair * 2;
          mma_16x8x16<Element>(scores[m][n], q_frag[m], b[0], b[1]);
          mma_16x8x16<Element>(scores[m][n + 1], q_frag[m], b[2], b[3]);
        }
        // The last use of this half of Q in the k-step: its registers take the next k-step's.
        if (unit % 2 == 1 && unit + 1 < kUnits) load_q(q_frag[m], q, unit + 1 + m, q_lane);
      }
    }
  }

  // -inf where column >= min(first_limit + row, end). `col` is the tile's first column.
  __device__ __forceinline__ void mask(int col, float sign, int lane, int first_limit, int end) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int limit = min(first_limit + 16 * m + lane / 4 + 8 * half, end);
        const int visible = limit - col - 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[m][n][e] = 8 * n + e % 2 < visible ? scores[m][n][e] * sign : -INFINITY;
          }
        }
      }
    }
  }

  // Brings the references up to date with the new scores, and the output with the references.
  // Afterwards maxima[i] is the largest score of row i in the tile, in units of log2.
  __device__ __forceinline__ void update_softmax(float scale_log2, float (&maxima)[kRows]) {
    float shrink[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = i / 2, e = i % 2 * 2;
      maxima[i] = fmaxf(scores[m][0][e], scores[m][0][e + 1]);
#pragma unroll
      for (int n = 1; n < kScoreTiles; ++n) {
        maxima[i] = fmaxf(maxima[i], fmaxf(scores[m][n][e], scores[m][n][e + 1]));
      }
    }
    if (!softmax.template raise<Traits::kSlackLog2>(maxima, scale_log2, shrink)) return;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[m][n][e] *= shrink[2 * m + e / 2];
      }
    }
  }

  // P = exp2(scores - reference) of the first 16 columns; multiply_pv makes the others.
  __device__ __forceinline__ void begin_probabilities(float scale_log2) {
#pragma unroll
    for (int piece = 0; piece < 8; ++piece) make_probabilities(piece, scale_log2);
  }

  // out += P V. `v`: shared address of the V tile. One ldmatrix (16 V rows, 16 columns) feeds four
  // products. Between them, two probabilities of the next 16 columns are made, so that the
  // special-function unit and the tensor core of a warp work at the same time (worth 2 %).
  __device__ __forceinline__ void multiply_pv(uint32_t v, const LaneOffsets& lane,
                                              float scale_log2) {
    constexpr int kPairs = kOutTiles / 2;
    constexpr int kUnits = kScoreTiles / 2 * kPairs;
    constexpr int kAhead = 2;
    const uint32_t v_lane = recompute_from(lane.upper_lower);
    uint32_t v_frag[kAhead + 1][4];
#pragma unroll
    for (int unit = 0; unit < kAhead; ++unit) load_v<kPairs>(v_frag[unit], v, unit, v_lane);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const int next = unit + kAhead;
      if (next < kUnits) load_v<kPairs>(v_frag[next % (kAhead + 1)], v, next, v_lane);
      const int step = unit / kPairs, pair = unit % kPairs;
      if (step + 1 < kScoreTiles / 2) {
        constexpr int kPieces = 8 / kPairs;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          make_probabilities(8 * (step + 1) + kPieces * pair + i, scale_log2);
        }
      }
      const uint32_t (&b)[4] = v_frag[unit % (kAhead + 1)];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_16x8x16<Element>(out[m][2 * pair], probs_[m][step], b[0], b[1]);
        mma_16x8x16<Element>(out[m][2 * pair + 1], probs_[m][step], b[2], b[3]);
      }
    }
  }

 private:
  // Fragment r of P (m, step) holds scores tile 2 * step + r / 2, elements 2 * (r % 2) + {0, 1}.
  // Pieces 8 * step + {0 .. 7} are the eight registers of a k-step.
  __device__ __forceinline__ void make_probabilities(int piece, float scale_log2) {
    const int step = piece / 8, m = piece / 4 % 2, r = piece % 4;
    const int row = 2 * m + r % 2;
    float (&pair)[4] = scores[m][2 * step + r / 2];
    const int e = 2 * (r % 2);
    const float low = softmax.weigh(pair[e], scale_log2, row);
    const float high = softmax.weigh(pair[e + 1], scale_log2, row);
    probs_[m][step][r] = pack_pair<Element>(low, high);
  }

  // 16 columns of 16 Q rows: unit = 2 * k-step + which half of the rows.
  __device__ __forceinline__ void load_q(uint32_t (&frag)[4], uint32_t q, int unit,
                                         uint32_t lane_offset) {
    using Tile = typename Traits::TileQ;
    const int step = unit / 2;
    ldmatrix_x4(frag, q + step / 4 * Tile::kPanelBytes + (lane_offset ^ (step % 4 * 32)) +
                          unit % 2 * 16 * Tile::kRowBytes);
  }
  // 16 columns of 32 K rows: unit = 2 * k-step + which half of the rows.
  __device__ __forceinline__ void load_k(uint32_t (&frag)[2][4], uint32_t k, int unit,
                                         uint32_t lane_offset) {
    using Tile = typename Traits::TileKv;
    const int step = unit / 2;
    const uint32_t at = k + step / 4 * Tile::kPanelBytes + (lane_offset ^ (step % 4 * 32)) +
                        unit % 2 * 32 * Tile::kRowBytes;
    ldmatrix_x4(frag[0], at);
    ldmatrix_x4(frag[1], at + 16 * Tile::kRowBytes);
  }
  // 16 V rows, 16 columns: unit = k-step * kPairs + column pair.
  template <int kPairs>
  __device__ __forceinline__ void load_v(uint32_t (&frag)[4], uint32_t v, int unit,
                                         uint32_t lane_offset) {
    using Tile = typename Traits::TileKv;
    const int step = unit / kPairs, pair = unit % kPairs;
    ldmatrix_x4_trans(frag, v + pair / 4 * Tile::kPanelBytes + (lane_offset ^ (pair % 4 * 32)) +
                                step * 16 * Tile::kRowBytes);
  }

  uint32_t probs_[2][kScoreTiles / 2][4];
};

}  // namespace seer::dev
