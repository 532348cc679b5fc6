// SPDX-License-Identifier: Apache-2.0
// Selection by a threshold for at most kShortBlocks KV blocks: one pass, the scores in registers.
//
// A CTA has 32 rows, and each of its warps the one tile of 64 columns that its class has: 64 scores
// per lane, which stay where the mma left them until the row's sum is known. A lane copies the keys
// it multiplies, so that shared memory only keeps more of them on their way than registers could.
#pragma once

#include <type_traits>

#include "pool_gate/gate_softmax.cuh"

namespace seer::dev {

constexpr int kShortColumns = 64;  // of a class
constexpr int kShortBlocks = kClasses * kShortColumns;
constexpr int kShortRows = 32;
constexpr int kShortDepth = 2;  // slices of 32 channels on their way

// Queries, then the keys that are on their way: at most 72 KB, which a CTA may have on every GPU.
template <int kDim>
constexpr int short_smem_bytes() {
  return 2 * kDim * kShortRows + kClasses * kShortDepth * 64 * kShortColumns;
}

template <class Element, int kDim, bool kPacked>
__global__ void __launch_bounds__(32 * kClasses, 2)
    select_threshold_short(const __grid_constant__ GateSelectParams p) {
  constexpr int kRows = 4, kWords = kShortColumns / kWordColumns, kTiles = kShortColumns / 8;
  __shared__ float2 sums[kClasses][kShortRows];
  const GateScoresParams& gate = p.gate;
  const GatePlace at = gate_place<kPacked>(gate, kShortRows);
  const int lane = lane_id(), warp = thread_id() / 32, blocks_q = at.blocks_q;
  const int end_row = min(at.first_row + kShortRows, blocks_q);
  const int fewest = visible_blocks(gate, at, at.first_row);
  const int most = most_visible(gate, at, at.first_row, end_row);
  const int first_word = kWords * warp, column = kShortColumns * warp;
  const auto row_of = [&](int i) { return at.first_row + lane_id() / 4 + 8 * i; };
  const auto sees = [&](int i, int word) {
    return visible_blocks(gate, at, row_of(i)) - word * kWordColumns - 2 * (lane_id() % 4);
  };

  // Queries: [slice of 32 channels][row][64 bytes], of all warps.
  extern __shared__ __align__(16) char smem[];
  constexpr int kSlices = kDim / 32, kQuerySlice = 64 * kShortRows, kKeySlice = 64 * kShortColumns;
  constexpr int kChunks = kDim / 8, kStep = 32 * kClasses / kChunks;  // rows at a time
  {
    const int chunk = thread_id() % kChunks, local = thread_id() / kChunks;
    const char* const from = gate_rows(gate.q_gate, at.batch, at.head) + chunk * 16;
    const uint32_t to = smem_address(smem) + chunk / 4 * kQuerySlice + chunk % 4 * 16 + local * 64;
#pragma unroll
    for (int i = 0; i < kShortRows; i += kStep) {
      const int64_t query = min(at.first_row + i + local, static_cast<int>(gate.blocks_q) - 1);
      cp_async_16<0>(to + i * 64, from + 2 * query * gate.q_gate.row_stride, true);
    }
  }
  // Keys: a lane's own, as it will read them; kShortDepth slices on their way.
  const char* const ring =
      smem + kSlices * kQuerySlice + warp * kShortDepth * kKeySlice + lane * 16;
  const int first_key = column + lane / 4;
  const char* const keys =
      key_rows(gate, at) + 2 * first_key * gate.k_gate.row_stride + lane % 4 * 16;
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
    if (s < kSlices && column < most) {
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
  LaneSums<kRows> lane_sums;
  if (column < most) {
    float c[2][kTiles][4] = {};
    // Rolled up, it needs fewer registers: those that the sizes of a packed sequence take.
#pragma unroll(kPacked ? 1 : kSlices)
    for (int s = 0; s < kSlices; ++s) {
      uint4 queries[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        queries[i] = *reinterpret_cast<const uint4*>(smem + s * kQuerySlice + 512 * i + lane * 16);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint4 chunk =
            *reinterpret_cast<const uint4*>(ring + s % kShortDepth * kKeySlice + 512 * t);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_chunk<Element>(c[m][t], queries[2 * m], queries[2 * m + 1], chunk);
        }
      }
      load(s + kShortDepth);
      cp_async_wait_group<kShortDepth - 1>();
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          x[w][i][n] = __fmul_rn(c[i / 2][4 * w + n / 2][i % 2 * 2 + n % 2], gate.scale);
        }
      }
      const int word = first_word + w;
      const auto in_word = [&](int i) { return sees(i, word); };
      if ((word + 1) * kWordColumns > fewest) hide_unseen<kRows>(x[w], in_word);
      lane_sums.add(x[w], in_word);
    }
    lane_sums.finish_class(sums[warp]);
  }
  __syncthreads();

  const int words = (static_cast<int>(gate.blocks_kv) + 31) / 32;
  uint32_t* bits = reinterpret_cast<uint32_t*>(p.block_bits) +
                   (int64_t{at.batch} * gate.heads_q + at.head) * gate.blocks_q * words;
  const int row = row_of(lane_id() % 4);  // whose words the lane stores
  uint32_t mine[kWords] = {};
  if (column < most) {
    const int classes = min((most + kShortColumns - 1) / kShortColumns, kClasses);
    const LaneTests<kRows> tests(sums[0], kShortRows, classes, static_cast<float>(p.value));
    const bool forces = p.sink > 0 || p.local > 0 || end_row > blocks_q - p.dense_last_rows;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int word = first_word + w;
      mine[w] = word_of_row(tests.kept(x[w], [&](int i) { return sees(i, word); }));
      if (forces) mine[w] |= forced_bits(p, blocks_q, row, visible_blocks(gate, at, row), word);
    }
  }
  // Rows past a packed sequence, and words that no row of the tile sees, are 0.
  if (row >= gate.blocks_q) return;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int word = first_word + w;
    if (word < words) bits[int64_t{row} * words + word] = row < blocks_q ? mine[w] : 0;
  }
}

}  // namespace seer::dev
