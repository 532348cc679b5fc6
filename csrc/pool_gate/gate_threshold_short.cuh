// SPDX-License-Identifier: Apache-2.0
// Selection by a threshold for at most kShortBlocks KV blocks: one pass, the scores in registers.
//
// A warp has a tile of 32 rows and 64 columns: 64 scores per lane, which stay where the mma left
// them until the row's sum is known. A CTA has one tile of rows, a warp to each of its classes; or,
// where a triangle has more of them than run at once, a long and a short one, i and n - 1 - i, whose
// column tiles together are at most 9. A lane copies the keys it multiplies, so that shared memory
// only keeps more of them on their way than registers could.
#pragma once

#include "common/divisor.cuh"
#include "pool_gate/gate_softmax.cuh"

namespace seer::dev {

constexpr int kShortColumns = 64;  // of a class
constexpr int kShortBlocks = kClasses * kShortColumns;
constexpr int kShortRows = 32;
constexpr int kShortDepth = 2;  // slices of 32 channels on their way
constexpr int kPairWarps = kClasses + 1;

// CTA (x, y) has head x of all heads of the batch and the y-th longest of its tiles of rows, of
// pairs the y-th shortest as well.
struct ShortGrid {
  Divisor heads, group;  // by heads_q, by query heads per KV head
};

template <bool kPairs>
constexpr int kShortWarps = kPairs ? kPairWarps : kClasses;

// Queries of a CTA's rows, then the keys that are on their way: at most 88 KB, which a CTA may have
// on every GPU.
template <int kDim, bool kPairs>
constexpr int short_smem_bytes() {
  return (kPairs ? 2 : 1) * 2 * kDim * kShortRows +
         kShortWarps<kPairs> * kShortDepth * 64 * kShortColumns;
}

// What a warp works on: column tile `warp - first_warp` of the tile of rows at at.first_row.
struct ShortPlace {
  GatePlace at;
  int first_warp, classes;  // of the tile of rows
  int long_row, short_row;  // the CTA's tiles of rows; the same if it has one
};

// Column tiles that the rows of a tile see.
__device__ __forceinline__ int short_classes(const GateScoresParams& p, const GatePlace& at,
                                             int first_row) {
  const int most = most_visible(p, at, first_row, first_row + kShortRows);
  return (most + kShortColumns - 1) / kShortColumns;
}

template <bool kPacked, bool kPairs>
__device__ __forceinline__ ShortPlace short_place(const GateScoresParams& p, const ShortGrid& grid,
                                                  int warp) {
  const int x = static_cast<int>(blockIdx.x), y = static_cast<int>(blockIdx.y);
  const int batch = grid.heads.quotient(x);
  const int tiles = static_cast<int>((p.blocks_q + kShortRows - 1) / kShortRows);
  ShortPlace place = {
      place_of_head<kPacked>(p, batch, x - batch * p.heads_q, kShortRows * (tiles - 1 - y))};
  place.long_row = place.at.first_row;
  place.short_row = kPairs ? kShortRows * y : place.long_row;
  place.classes = short_classes(p, place.at, place.long_row);
  if (kPairs && place.short_row < place.long_row && warp >= place.classes) {
    place.at.first_row = place.short_row;
    place.first_warp = place.classes;
    place.classes = short_classes(p, place.at, place.short_row);
  }
  return place;
}

// From the products of a warp's tile to its bits.
__device__ __forceinline__ void finish_short(const GateSelectParams& p, const ShortPlace& place,
                                             int warp, const float (&c)[2][kShortColumns / 8][4],
                                             float2 (*sums)[kShortRows]) {
  constexpr int kRows = 4, kWords = kShortColumns / kWordColumns;
  const GateScoresParams& gate = p.gate;
  const GatePlace& at = place.at;
  const int first_row = at.first_row, first_word = kWords * (warp - place.first_warp);
  const bool works = warp - place.first_warp < place.classes;
  const auto row_of = [&](int i) { return first_row + lane_id() / 4 + 8 * i; };
  const auto sees = [&](int i, int word) {
    return visible_blocks(gate, at, row_of(i)) - word * kWordColumns - 2 * (lane_id() % 4);
  };
  LaneScores<kRows> x[kWords];
  if (works) {
    const int fewest = visible_blocks(gate, at, first_row);
    LaneSums<kRows> lane_sums;
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
  if (!works) return;

  const int row = row_of(lane_id() % 4);  // whose words the lane stores
  const int words = (static_cast<int>(gate.blocks_kv) + 31) / 32;
  uint32_t* const bits = reinterpret_cast<uint32_t*>(p.block_bits) +
                         (int64_t{blockIdx.x} * gate.blocks_q + row) * words;
  const LaneTests<kRows> tests(sums[place.first_warp], kShortRows, place.classes,
                               static_cast<float>(p.value));
  const bool forces =
      p.sink > 0 || p.local > 0 || first_row + kShortRows > at.blocks_q - p.dense_last_rows;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int word = first_word + w;
    uint32_t mine = word_of_row(tests.kept(x[w], [&](int i) { return sees(i, word); }));
    if (forces) mine |= forced_bits(p, at.blocks_q, row, visible_blocks(gate, at, row), word);
    // Rows past a packed sequence are 0.
    if (row < gate.blocks_q && word < words) bits[word] = row < at.blocks_q ? mine : 0;
  }
}

// Two CTAs of 8 warps leave 128 registers to each. Of 9 they leave 96: five of 18 warps share a
// quarter of a multiprocessor.
template <class Element, int kDim, bool kPacked, bool kPairs>
__global__ void __launch_bounds__(32 * kShortWarps<kPairs>, 2)
    select_threshold_short(const __grid_constant__ GateSelectParams p,
                           const __grid_constant__ ShortGrid grid) {
  constexpr int kWords = kShortColumns / kWordColumns, kTiles = kShortColumns / 8;
  constexpr int kSlices = kDim / 32, kQuerySlice = 64 * kShortRows, kKeySlice = 64 * kShortColumns;
  __shared__ float2 sums[kShortWarps<kPairs>][kShortRows];
  const GateScoresParams& gate = p.gate;
  const int lane = lane_id(), warp = __shfl_sync(kFullWarp, thread_id() / 32, 0);

  const ShortPlace place = short_place<kPacked, kPairs>(gate, grid, warp);
  const GatePlace& at = place.at;
  const bool pairs = kPairs && place.short_row < place.long_row;
  const int column = kShortColumns * (warp - place.first_warp);
  const bool works = warp - place.first_warp < place.classes;

  // Queries: [tile][slice of 32 channels][row][64 bytes], of all warps. A thread copies 16 bytes of
  // row r and of row r + 8, then interleaves them: what a mma takes is four registers in a row, which
  // one read then fills without a move.
  extern __shared__ __align__(16) char smem[];
  constexpr int kChunks = kDim / 8, kQueryThreads = kChunks * kShortRows / 2;
  const auto query_at = [&](int tile) {
    const int chunk = thread_id() % kChunks, pair = thread_id() / kChunks;
    return smem + (tile * kSlices + chunk / 4) * kQuerySlice + (pair + pair / 8 * 8) * 64 +
           chunk % 4 * 16;
  };
  const auto load_queries = [&](int tile, int first) {
    const int chunk = thread_id() % kChunks, pair = thread_id() / kChunks;
    const char* const from = gate_rows(gate.q_gate, at.batch, at.head) + chunk * 16;
    const uint32_t to = smem_address(query_at(tile));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + pair + pair / 8 * 8 + 8 * half;
      const int64_t query = min(row, static_cast<int>(gate.blocks_q) - 1);
      cp_async_16<0>(to + 512 * half, from + 2 * query * gate.q_gate.row_stride, true);
    }
  };
  const auto interleave_queries = [&](int tile) {
    uint4* const upper = reinterpret_cast<uint4*>(query_at(tile));
    uint4* const lower = upper + 32;
    const uint4 x = *upper, y = *lower;
    *upper = {x.x, y.x, x.y, y.y};
    *lower = {x.z, y.z, x.w, y.w};
  };
  const bool has_queries = warp < kQueryThreads / 32;
  if (has_queries) {
    load_queries(0, place.long_row);
    if (pairs) load_queries(1, place.short_row);
  }
  // Keys: a lane's own, as it will read them; kShortDepth slices on their way.
  const char* const queries =
      smem + (pairs && at.first_row < place.long_row ? kSlices * kQuerySlice : 0) + lane * 16;
  const char* const ring =
      smem + (kPairs ? 2 : 1) * kSlices * kQuerySlice + warp * kShortDepth * kKeySlice + lane * 16;
  const char* keys = gate_rows(gate.k_gate, at.batch, grid.group.quotient(at.head)) +
                     2 * (column + lane / 4) * gate.k_gate.row_stride + lane % 4 * 16;
  const auto load = [&](int s) {
    if (s < kSlices && works) {
      const uint32_t to = smem_address(ring) + s % kShortDepth * kKeySlice;
      const int left = static_cast<int>(gate.blocks_kv) - column - lane_id() / 4;
      const char* from = keys;
      keys += 64;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        cp_async_16<0>(to + 512 * t, from, 8 * t < left);
        from += 16 * gate.k_gate.row_stride;
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kShortDepth; ++s) load(s);

  // Words that no row of a tile sees are 0, half a warp to a row.
  const int words = (static_cast<int>(gate.blocks_kv) + 31) / 32;
  uint32_t* const bits =
      reinterpret_cast<uint32_t*>(p.block_bits) + int64_t{blockIdx.x} * gate.blocks_q * words;
  const auto clear = [&](int first) {
    const int word = kWords * short_classes(gate, at, first) + lane % 16;
    if (word >= words) return;
    const int end = min(first + kShortRows, static_cast<int>(gate.blocks_q));
#pragma unroll 1
    for (int row = first + thread_id() / 16; row < end; row += 2 * kShortWarps<kPairs>) {
      bits[int64_t{row} * words + word] = 0;
    }
  };
  clear(place.long_row);
  if (pairs) clear(place.short_row);

  cp_async_wait_group<kShortDepth - 1>();
  if (has_queries) {
    interleave_queries(0);
    if (pairs) interleave_queries(1);
  }
  __syncthreads();  // the queries of all threads

  constexpr bool kShort = kPairs || kPacked;                // of registers
  constexpr int kTogether = kShort && kDim != 128 ? 1 : 2;  // m-tiles
  float c[2][kTiles][4] = {};
  if (works) {
    // Unrolled, the loads of several slices take more registers than 96.
#pragma unroll(kShort ? 1 : 2)
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int first = 0; first < 2; first += kTogether) {
        uint4 query[kTogether][2];  // 16 rows and channels each
#pragma unroll
        for (int i = 0; i < 2 * kTogether; ++i) {
          query[i / 2][i % 2] =
              *reinterpret_cast<const uint4*>(queries + s * kQuerySlice + 512 * (2 * first + i));
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint4 chunk =
              *reinterpret_cast<const uint4*>(ring + s % kShortDepth * kKeySlice + 512 * t);
#pragma unroll
          for (int m = 0; m < kTogether; ++m) {
            const uint4 &a = query[m][0], &b = query[m][1];
            mma_16x8x16<Element>(c[first + m][t], {a.x, a.y, a.z, a.w}, chunk.x, chunk.y);
            mma_16x8x16<Element>(c[first + m][t], {b.x, b.y, b.z, b.w}, chunk.z, chunk.w);
          }
        }
      }
      load(s + kShortDepth);
      cp_async_wait_group<kShortDepth - 1>();
    }
  }
  // Anew, so that none of it is held in registers through the products.
  const int again = __shfl_sync(kFullWarp, thread_id() / 32, 0);
  finish_short(p, short_place<kPacked, kPairs>(gate, grid, again), again, c, sums);
}

}  // namespace seer::dev
