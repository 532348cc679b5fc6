// SPDX-License-Identifier: Apache-2.0
// Gate scores on tensor cores, the same bits in every kernel that needs them.
//
// A mma wants two registers per lane and column: channels 2 q, 2 q + 1 and 2 q + 8, 2 q + 9 of a
// step of 16, q = lane % 4. Which channels those are does not matter as long as both operands
// agree. So a lane takes 16 bytes, channels 8 q .. 8 q + 7 of a slice of 32, and feeds two steps
// with them: no transposition, no ldmatrix, and the operands can come straight from global memory.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/mma_sm80.cuh"
#include "common/warp.cuh"
#include "seer/pool_gate.h"

namespace seer::dev {

constexpr int kWordColumns = 32;  // KV blocks per word of block bits: four n-tiles

// What a CTA works on, and how many blocks that sequence has: those of the tensors, or fewer where
// longer ones are packed with it.
struct GatePlace {
  int batch, head, first_row;
  int blocks_q, blocks_kv;
};

// Blocks of sequence b, at most `most` whatever cu_seqlens holds.
__device__ __forceinline__ int packed_blocks(const int32_t* cu_seqlens, int b, int block,
                                             int64_t most) {
  const int64_t rows = max(int64_t{cu_seqlens[b + 1]} - cu_seqlens[b], int64_t{0});
  return static_cast<int>(min((rows + block - 1) / block, most));
}

// Query head `head` of sequence `batch`.
template <bool kPacked>
__device__ __forceinline__ GatePlace place_of_head(const GateScoresParams& p, int batch, int head,
                                                   int first_row) {
  GatePlace at = {batch, head, first_row, static_cast<int>(p.blocks_q),
                  static_cast<int>(p.blocks_kv)};
  if constexpr (kPacked) {
    at.blocks_q = packed_blocks(p.cu_seqlens_q, at.batch, p.block_q, p.blocks_q);
    at.blocks_kv = packed_blocks(p.cu_seqlens_kv, at.batch, p.block_kv, p.blocks_kv);
  }
  return at;
}
template <bool kPacked>
__device__ __forceinline__ GatePlace place_of_head(const GateScoresParams& p, uint32_t head,
                                                   int first_row) {
  return place_of_head<kPacked>(p, static_cast<int>(head / p.heads_q),
                                static_cast<int>(head % p.heads_q), first_row);
}

// The longest rows of a causal triangle come first, so that the last CTAs are short ones.
template <bool kPacked>
__device__ __forceinline__ GatePlace gate_place(const GateScoresParams& p, int tile_rows) {
  const uint32_t heads = static_cast<uint32_t>(p.batch) * p.heads_q, cta = blockIdx.x;
  const uint32_t tiles = static_cast<uint32_t>((p.blocks_q + tile_rows - 1) / tile_rows);
  const int first_row = static_cast<int>(tiles - 1 - cta / heads) * tile_rows;
  return place_of_head<kPacked>(p, cta % heads, first_row);
}

// Blocks [0, visible) of a row of the sequence can be seen.
__device__ __forceinline__ int visible_blocks(const GateScoresParams& p, const GatePlace& at,
                                              int row) {
  if (!p.causal) return at.blocks_kv;
  return min(max(row + 1 + at.blocks_kv - at.blocks_q, 0), at.blocks_kv);
}
// The most that rows [first, end) see; rows past the sequence see nothing.
__device__ __forceinline__ int most_visible(const GateScoresParams& p, const GatePlace& at,
                                            int first, int end) {
  end = min(end, at.blocks_q);
  return first < end ? visible_blocks(p, at, end - 1) : 0;
}

__device__ __forceinline__ const char* gate_rows(const ConstView& view, int batch, int head) {
  return static_cast<const char*>(view.data) +
         2 * (batch * view.batch_stride + head * view.head_stride);
}
__device__ __forceinline__ const char* key_rows(const GateScoresParams& p, const GatePlace& at) {
  return gate_rows(p.k_gate, at.batch, at.head / (p.heads_q / p.heads_k));
}

// c += the products of 32 channels: queries lane / 4 and lane / 4 + 8, keys of one n-tile.
template <class Element>
__device__ __forceinline__ void multiply_chunk(float (&c)[4], const uint4& upper,
                                               const uint4& lower, const uint4& keys) {
  mma_16x8x16<Element>(c, {upper.x, lower.x, upper.y, lower.y}, keys.x, keys.y);
  mma_16x8x16<Element>(c, {upper.z, lower.z, upper.w, lower.w}, keys.z, keys.w);
}

// Query rows of a warp: kMTiles times 16, from global memory. Rows past the end repeat the last.
template <class Element, int kDim, int kMTiles>
struct QueryRows {
  static constexpr int kSlices = kDim / 32;
  uint4 chunk[kMTiles][2][kSlices];  // rows lane / 4 and lane / 4 + 8

  __device__ __forceinline__ QueryRows(const GateScoresParams& p, const GatePlace& at, int first) {
    const int lane = lane_id(), last = static_cast<int>(p.blocks_q) - 1;
    const char* q = gate_rows(p.q_gate, at.batch, at.head) + lane % 4 * 16;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = min(first + 16 * m + 8 * half + lane / 4, last);
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          chunk[m][half][s] =
              __ldg(reinterpret_cast<const uint4*>(q + 2 * row * p.q_gate.row_stride + 64 * s));
        }
      }
    }
  }

  // c += the products with one n-tile's keys, slice s.
  __device__ __forceinline__ void multiply(float (&c)[4], int m, int s, const uint4& keys) const {
    multiply_chunk<Element>(c, chunk[m][0][s], chunk[m][1][s], keys);
  }
};

// Streams the key tiles of one head through shared memory and hands the raw products of each word's
// 32 columns to the visitor: accumulators of columns 8 t + accumulator_col.
template <class Element, int kDim, int kMTiles, int kWarps>
class KeyStream {
 public:
  static constexpr int kKeys = 64;
  // 64 bytes of padding: the two rows that a quarter-warp reads 64 bytes of use all banks.
  static constexpr int kRowBytes = 2 * kDim + 64;
  static constexpr int kSmemBytes = 2 * kKeys * kRowBytes;
  using Scores = float[kMTiles][4][4];

  __device__ __forceinline__ KeyStream(const GateScoresParams& p, const char* keys, char* smem)
      : keys_(keys),
        row_bytes_(2 * p.k_gate.row_stride),
        blocks_kv_(static_cast<int>(p.blocks_kv)),
        smem_(smem) {}

  // Words [0, ceil(most / 32)): tiles 0, kStride, 2 kStride .., then 1, 1 + kStride .., and so on,
  // and after each of these classes a call of `class_done` with its number. `columns`: as far as a
  // warp of the CTA goes; `most`: as far as this one does.
  template <int kStride, class Visit, class ClassDone>
  __device__ __forceinline__ void visit(const QueryRows<Element, kDim, kMTiles>& queries,
                                        int columns, int most, Visit&& visitor,
                                        ClassDone&& class_done) {
    const int tiles = (columns + kKeys - 1) / kKeys;
    if (tiles == 0) return;
    load(0, 0);
    for (int tile = 0, turn = 0, then; tile < tiles; tile = then, turn ^= 1) {
      then = tile + kStride;
      if (kStride > 1 && then >= tiles) {
        then = tile % kStride + 1;
        if (then == kStride) then = tiles;
      }
      cp_async_wait_all();
      __syncthreads();
      if (then < tiles) load(then, turn ^ 1);
      const int lane = lane_id();
      const char* from = buffer(turn) + lane / 4 * kRowBytes + lane % 4 * 16;
#pragma unroll 1
      for (int word = 2 * tile; word < 2 * tile + 2; ++word, from += 32 * kRowBytes) {
        if (word * kWordColumns >= most) break;
        Scores c = {};
#pragma unroll
        for (int s = 0; s < kDim / 32; ++s) {
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            const uint4 keys = *reinterpret_cast<const uint4*>(from + 8 * t * kRowBytes + 64 * s);
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) queries.multiply(c[m][t], m, s, keys);
          }
        }
        visitor(word, c);
      }
      if (kStride > 1 && tile + kStride >= tiles) class_done(tile % kStride);
    }
    __syncthreads();  // the buffers are free again
  }

 private:
  __device__ __forceinline__ char* buffer(int turn) const {
    return smem_ + turn * kKeys * kRowBytes;
  }
  __device__ __forceinline__ void load(int tile, int turn) const {
    constexpr int kChunks = kDim / 8, kStep = 32 * kWarps / kChunks;
    const int thread = thread_id(), chunk = thread % kChunks, row = thread / kChunks;
    const uint32_t to = smem_address(buffer(turn)) + row * kRowBytes + chunk * 16;
    const int key = tile * kKeys + row;
    const char* from = keys_ + key * row_bytes_ + chunk * 16;
#pragma unroll
    for (int i = 0; i < kKeys; i += kStep) {
      const bool valid = key + i < blocks_kv_;
      cp_async_16<0>(to + i * kRowBytes, valid ? from : keys_, valid);
      from += kStep * row_bytes_;
    }
  }

  const char* keys_;
  int64_t row_bytes_;
  int blocks_kv_;
  char* smem_;
};

// Bits of [begin, end) inside a word.
__device__ __forceinline__ uint32_t bits_of_range(int word, int begin, int end) {
  const int from = max(begin - 32 * word, 0), to = min(end - 32 * word, 32);
  if (from >= to) return 0;
  return (0xffffffffu >> (32 - (to - from))) << from;
}

// Blocks that a rule keeps whatever their score, of a row of a sequence of blocks_q.
__device__ __forceinline__ uint32_t forced_bits(const GateSelectParams& p, int blocks_q, int row,
                                                int visible, int word) {
  if (row >= blocks_q - p.dense_last_rows) return bits_of_range(word, 0, visible);
  const int sink = static_cast<int>(min(p.sink, int64_t{visible}));
  const int local = static_cast<int>(min(p.local, int64_t{visible}));
  return bits_of_range(word, 0, sink) | bits_of_range(word, visible - local, visible);
}

// Zeroes the words of the rows [first, end) of `bits`, a warp to a row.
__device__ __forceinline__ void clear_rows(uint32_t* bits, int words, int first, int end,
                                           int warps) {
  for (int row = first + thread_id() / 32; row < end; row += warps) {
    for (int word = lane_id(); word < words; word += 32) bits[int64_t{row} * words + word] = 0;
  }
}

__device__ __forceinline__ float exp_of(float x) {
  constexpr float kLog2e = 1.4426950408889634f;
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(__fmul_rn(x, kLog2e)));
  return y;
}

// exp(score - highest), and 1 at the maximum even if it is infinite: an overflow of the gate shares
// the mass instead of spreading NaN. No score may be NaN.
__device__ __forceinline__ float softmax_weight(float score, float highest) {
  return score == highest ? 1.0f : exp_of(score - highest);
}

}  // namespace seer::dev
