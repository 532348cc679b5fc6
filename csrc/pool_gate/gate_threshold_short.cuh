// SPDX-License-Identifier: Apache-2.0
// Selection by a threshold for at most kShortBlocks KV blocks: one pass, the scores in registers.
//
// A warp has 32 rows and the one tile of 64 columns that its class has: 64 scores per lane, which
// stay where the mma left them until the row's sum is known. A lane copies the keys it multiplies,
// so shared memory only keeps more of them on their way than registers could: no barrier for them.
//
// A CTA has two tiles of rows, the n-th from the end and the n-th from the start, counted from
// kAlone on. In a causal square they see eight tiles of columns together, whatever n: one for each
// warp. Where they see more, one follows the other.
#pragma once

#include <type_traits>

#include "pool_gate/gate_softmax.cuh"

namespace seer::dev {

constexpr int kShortColumns = 64;  // of a class
constexpr int kShortBlocks = kClasses * kShortColumns;
constexpr int kShortRows = 32;  // of a tile
constexpr int kShortWarps = kClasses;
constexpr int kAlone = kShortColumns / kShortRows;  // last tiles that have a CTA each
constexpr int kShortDepth = 2;                      // slices of 32 channels on their way

// CTAs of a head: tile n from the end and tile n - kAlone from the start, until they meet.
constexpr int64_t short_ctas(int64_t blocks_q) {
  const int64_t tiles = (blocks_q + kShortRows - 1) / kShortRows;
  const int64_t pairs = (tiles + kAlone - 1) / 2 + 1;
  return pairs < tiles ? pairs : tiles;
}

// Queries of both tiles, then the keys that are on their way.
template <int kDim>
constexpr int short_smem_bytes() {
  return 2 * 2 * kDim * kShortRows + kShortWarps * kShortDepth * 64 * kShortColumns;
}

template <class Element, int kDim, bool kPacked>
__global__ void __launch_bounds__(32 * kShortWarps, 2)
    select_threshold_short(const __grid_constant__ GateSelectParams p) {
  extern __shared__ __align__(16) char smem[];
  __shared__ float2 sums[2][kClasses][kShortRows];
  constexpr int kRows = 4;  // of a lane
  constexpr int kWords = kShortColumns / kWordColumns, kTiles = kShortColumns / 8;
  constexpr int kSlices = kDim / 32, kQuerySlice = 64 * kShortRows, kKeySlice = 64 * kShortColumns;
  const GateScoresParams& gate = p.gate;
  const uint32_t heads = static_cast<uint32_t>(gate.batch) * gate.heads_q;
  const int turn = static_cast<int>(blockIdx.x / heads);
  const int last_tile = (static_cast<int>(gate.blocks_q) - 1) / kShortRows;
  // First rows; the near tile is none where it is not before the far one.
  const int far = (last_tile - turn) * kShortRows;
  const int near = turn < kAlone ? far : (turn - kAlone) * kShortRows;
  const GatePlace at = place_of_head<kPacked>(gate, blockIdx.x % heads, far);
  const auto classes_of = [&](int first) {
    return (most_visible(gate, at, first, first + kShortRows) + kShortColumns - 1) / kShortColumns;
  };
  const int far_classes = classes_of(far), near_classes = near < far ? classes_of(near) : 0;
  const bool together = far_classes + near_classes <= kShortWarps;

  // Queries: [tile][slice of 32 channels][row][64 bytes].
  constexpr int kChunks = kDim / 8, kStep = 32 * kShortWarps / kChunks;  // rows at a time
  {
    const int chunk = thread_id() % kChunks, row = thread_id() / kChunks;
    const char* const from = gate_rows(gate.q_gate, at.batch, at.head) + chunk * 16;
    const uint32_t to = smem_address(smem) + chunk / 4 * kQuerySlice + chunk % 4 * 16 + row * 64;
#pragma unroll
    for (int i = 0; i < 2 * kShortRows; i += kStep) {
      const int first = (i < kShortRows ? far : near) + i % kShortRows;
      const int64_t query = min(first + row, static_cast<int>(gate.blocks_q) - 1);
      cp_async_16<0>(to + i / kShortRows * kSlices * kQuerySlice + i % kShortRows * 64,
                     from + 2 * query * gate.q_gate.row_stride, true);
    }
  }
  const int words = (static_cast<int>(gate.blocks_kv) + 31) / 32;
  const auto words_of = [&](int row) {
    const int64_t head = int64_t{at.batch} * gate.heads_q + at.head;
    return reinterpret_cast<uint32_t*>(p.block_bits) + (head * gate.blocks_q + row) * words;
  };

#pragma unroll 1
  for (int round = 0; round < (together ? 1 : 2); ++round) {
    const int warp = thread_id() / 32;
    const bool second = together ? warp >= far_classes : round == 1;
    const int first_row = second ? near : far, classes = second ? near_classes : far_classes;
    const int column = kShortColumns * (together && second ? warp - far_classes : warp);
    const bool works = column < classes * kShortColumns;
    const auto row_of = [&](int i) { return first_row + lane_id() / 4 + 8 * i; };
    const auto sees = [&](int i, int word) {
      return visible_blocks(gate, at, row_of(i)) - word * kWordColumns - 2 * (lane_id() % 4);
    };
    // Keys: a lane's own, as it will read them.
    const char* const ring =
        smem + 2 * kSlices * kQuerySlice + warp * kShortDepth * kKeySlice + lane_id() * 16;
    const int first_key = column + lane_id() / 4;
    const char* const keys =
        key_rows(gate, at) + 2 * first_key * gate.k_gate.row_stride + lane_id() % 4 * 16;
    const auto load_slice = [&](int s, auto all) {
      const uint32_t to = smem_address(ring) + s % kShortDepth * kKeySlice;
      const char* from = keys + 64 * s;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const bool valid = decltype(all)::value || first_key + 8 * t < gate.blocks_kv;
        cp_async_16<0>(to + 512 * t, valid ? from : gate.k_gate.data, valid);
        from += 16 * gate.k_gate.row_stride;
      }
    };
    const auto load = [&](int s) {
      if (s < kSlices && works) {
        if (column + kShortColumns <= gate.blocks_kv) {
          load_slice(s, std::true_type{});
        } else {
          load_slice(s, std::false_type{});
        }
      }
      cp_async_commit();
    };
#pragma unroll
    for (int s = 0; s < kShortDepth; ++s) load(s);
    cp_async_wait_group<kShortDepth - 1>();
    __syncthreads();  // the queries of all threads

    LaneScores<kRows> x[kWords];
    if (works) {
      float c[2][kTiles][4] = {};
      const char* const from = smem + second * kSlices * kQuerySlice + lane_id() * 16;
#pragma unroll 1
      for (int s = 0; s < kSlices; ++s) {
        uint4 queries[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          queries[i] = *reinterpret_cast<const uint4*>(from + s * kQuerySlice + 512 * i);
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint4 keys =
              *reinterpret_cast<const uint4*>(ring + s % kShortDepth * kKeySlice + 512 * t);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply_chunk<Element>(c[m][t], queries[2 * m], queries[2 * m + 1], keys);
          }
        }
        load(s + kShortDepth);
        cp_async_wait_group<kShortDepth - 1>();
      }
      LaneSums<kRows> lane_sums;
      const int fewest = visible_blocks(gate, at, first_row);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            x[w][i][n] = __fmul_rn(c[i / 2][4 * w + n / 2][i % 2 * 2 + n % 2], gate.scale);
          }
        }
        const int word = column / kWordColumns + w;
        const auto in_word = [&](int i) { return sees(i, word); };
        if ((word + 1) * kWordColumns > fewest) hide_unseen<kRows>(x[w], in_word);
        lane_sums.add(x[w], in_word);
      }
      lane_sums.finish_class(sums[second][column / kShortColumns]);
    }
    __syncthreads();

    if (works) {
      const LaneTests<kRows> tests(sums[second][0], kShortRows, classes,
                                   static_cast<float>(p.value));
      const int row = row_of(lane_id() % 4), end_row = min(first_row + kShortRows, at.blocks_q);
      const bool forces = p.sink > 0 || p.local > 0 || end_row > at.blocks_q - p.dense_last_rows;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int word = column / kWordColumns + w;
        uint32_t mine = word_of_row(tests.kept(x[w], [&](int i) { return sees(i, word); }));
        if (forces) mine |= forced_bits(p, at.blocks_q, row, visible_blocks(gate, at, row), word);
        if (row < end_row && word < words) words_of(row)[word] = mine;
      }
    }
  }
  // Rows past a packed sequence, and words that no row of a tile sees.
  for (int local = thread_id() / 32; local < 2 * kShortRows; local += kShortWarps) {
    const bool second = local >= kShortRows;
    const int row = (second ? near - kShortRows : far) + local;
    if (row >= gate.blocks_q || (second && near >= far)) continue;
    const int seen = row < at.blocks_q ? kWords * (second ? near_classes : far_classes) : 0;
    if (seen + lane_id() < words) words_of(row)[seen + lane_id()] = 0;
  }
}

}  // namespace seer::dev
