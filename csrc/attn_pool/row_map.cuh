// SPDX-License-Identifier: Apache-2.0
// The attention map of rows whose softmax is still being computed.
//
// Of every row and KV tile of 64 columns one number is kept until the row's sum is final: the log2
// of the tile's largest weight (its largest score) or of its sum of weights. Then it turns into a
// probability: exp2(number - reference - log2(sum)). As a logarithm it stays right whatever happens to
// the row's reference meanwhile. Its rounding, 2^-24 of itself, is 3e-4 of a probability at scores
// of 10^4.
//
// The numbers lie in strips, one per 16 rows that a warp works on: 64 bytes per KV tile. A strip is
// written and read by its own warp alone and used again for the warp's next rows, so all of them
// together are O(SMs * rows_kv), and the L2 cache holds most of them.
//
// Rows of one query block are computed by several warps, in any order. Their shares meet in the map
// by atomics that give the same bits in any order: integer maxima, and sums of multiples of 2^-23
// below 2, which fp32 adds exactly.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "common/online_softmax.cuh"
#include "common/warp.cuh"

namespace seer {

struct RowMapParams {
  float* strips;  // [CTA][warp][16-row group][strip_tiles][16 rows]
  float* map;     // shape as in seer/attn_pool.h
  int strip_tiles;
  int block_q;
  int64_t map_cols;  // KV blocks
  int64_t map_rows;  // of a head: query blocks, or rows if per_token
  int heads_q;
  bool packed;   // varlen
  bool wide_kv;  // a KV block is two tiles
  bool per_token;
  bool sum;     // else maxima
  bool zeroed;  // the map is zeros; else per_token, and rows are to be written to their ends
};

namespace dev {

// log2(x) to 2^-22, subnormal x taken as 0.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN if one of them is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Where a group of 16 rows lies.
struct RowGroup {
  int head;
  int64_t batch;
  int64_t start;  // packed row of the sequence's first row (0 if not packed)
  int row;        // first row of the group in its sequence
  int rows_q;     // rows of the sequence
  int tiles;      // KV tiles that were kept: all that some row of the group sees
};

// A lane's part of a strip: rows lane / 4 and lane / 4 + 8 of the group.
class RowStrip {
 public:
  static constexpr int kRows = 16;

  __device__ __forceinline__ RowStrip(const RowMapParams& params, unsigned strip)
      : p(params), first_line(strip * unsigned(params.strip_tiles)) {}

  // Where the lane keeps its number of KV tile 0: that of the second one of its two rows if it is an
  // odd lane, else of the first.
  __device__ __forceinline__ float* lane_place() const {
    const unsigned lane = lane_id();
    return line(0) + (lane / 4 * 2 + (lane & 1));
  }
  // First half of keeping the numbers of a KV tile; `at` is lane_place(). values[half]: the lane's
  // share, a maximum (of weights, or in units of log2) or a sum of weights. Odd lanes go on with the
  // second row.
  template <bool kSum>
  static __device__ __forceinline__ float pair(const float* at, const float (&values)[2]) {
    const bool odd = is_odd(at);
    const float given = __shfl_xor_sync(kFullWarp, odd ? values[0] : values[1], 1);
    const float own = odd ? values[1] : values[0];
    return kSum ? own + given : fmaxf(own, given);
  }
  // Second half: keeps what pair() gave as that of KV tile `tile`. Weights (kWeights) are under
  // `reference`.
  template <bool kSum, bool kWeights>
  static __device__ __forceinline__ void keep(float* at, int tile, float x,
                                              const float (&reference)[2]) {
    const bool odd = is_odd(at);
    const float other = __shfl_xor_sync(kFullWarp, x, 2);
    x = kSum ? x + other : fmaxf(x, other);
    if constexpr (kWeights) x = (odd ? reference[1] : reference[0]) + log2_fast(x);
    // Two lanes of the quad write the same: cheaper than a branch around the store.
    __stcg(at + tile * int64_t{kRows}, x);
  }

  // Writes the group's part of the map. sum[half]: of the lane's rows, all of it.
  __device__ __forceinline__ void finish(const RowGroup& group, const float (&reference)[2],
                                         const float (&sum)[2]) const {
    __syncwarp();  // orders the lanes' stores to the strip before the loads
    const Known known = {{reference[0], reference[1]}, {log_of(sum[0]), log_of(sum[1])}};
    const int rows = group.rows_q - group.row;
    if (p.per_token) {
      const int64_t head = p.packed ? group.head : group.batch * p.heads_q + group.head;
      float* const map = p.map + (head * p.map_rows + group.start + group.row) * p.map_cols;
      write_rows(map, rows, group.tiles, known);
    } else {
      const int64_t head = group.batch * p.heads_q + group.head;
      const int block = group.row / p.block_q;
      float* const map = p.map + (head * p.map_rows + block) * p.map_cols;
      const int in_block = min(group.rows_q - block * p.block_q, p.block_q);
      const float share = __fdividef(1.0f, static_cast<float>(in_block));
      if (p.sum) {
        write_blocks<true>(map, rows, group.tiles, share, known);
      } else {
        write_blocks<false>(map, rows, group.tiles, share, known);
      }
    }
  }

 private:
  static __device__ __forceinline__ bool is_odd(const float* at) {
    return reinterpret_cast<uintptr_t>(at) & sizeof(float);
  }
  // The 16 numbers of KV tile `tile`: of rows 0, 8, 1, 9, .. 7, 15. 2^32 lines would be 256 GiB.
  __device__ __forceinline__ float* line(int tile) const {
    return p.strips + uint64_t{first_line + unsigned(tile)} * kRows;
  }

  // Of the lane's two rows.
  struct Known {
    float reference[2], log_sum[2];
  };
  // Finite for a row that sees nothing: its numbers are -inf.
  static __device__ __forceinline__ float log_of(float sum) {
    return sum == 0.0f ? 0.0f : log2f(sum);
  }

  static constexpr int kBatch = 32;  // KV tiles, one per lane: no lane needs another's numbers
  static constexpr int kAhead = 4;   // batches

  // Calls use(batch, row, x) for kAhead batches of KV tiles from `first` on and each of the 16 rows,
  // x being the logarithm of the lane's probability: -inf beyond `tiles` and in rows that do not
  // exist. All loads are on their way together: the three consumers of a Hopper CTA end together,
  // so that nothing else hides the time that a load takes.
  template <class Use>
  __device__ __forceinline__ void for_rows(int first, int rows, int tiles, const Known& known,
                                           const Use& use) const {
    const int tile = first + lane_id();
    float4 numbers[kAhead][4];
#pragma unroll
    for (int batch = 0; batch < kAhead; ++batch) {
      // Beyond `tiles` the last one is read: without a condition, which would have the registers
      // keep what they held before, and nothing that was never written.
      const auto* const at =
          reinterpret_cast<const float4*>(line(min(tile + batch * kBatch, tiles - 1)));
#pragma unroll
      for (int i = 0; i < 4; ++i) numbers[batch][i] = __ldcg(at + i);
    }
#pragma unroll
    for (int at = 0; at < kRows; ++at) {
      const int row = at / 2 + at % 2 * 8;
      const float reference = __shfl_sync(kFullWarp, known.reference[at % 2], at / 2 * 4);
      const float log_sum = __shfl_sync(kFullWarp, known.log_sum[at % 2], at / 2 * 4);
#pragma unroll
      for (int batch = 0; batch < kAhead; ++batch) {
        const float4& four = numbers[batch][at / 4];
        const float number = at % 4 == 0   ? four.x
                             : at % 4 == 1 ? four.y
                             : at % 4 == 2 ? four.z
                                           : four.w;
        const bool exists = row < rows && tile + batch * kBatch < tiles;
        use(batch, row, exists ? number - reference - log_sum : -INFINITY);
      }
    }
  }

  template <bool kSum>
  __device__ __forceinline__ void write_blocks(float* map, int rows, int tiles, float share,
                                               const Known& known) const {
#pragma unroll 1
    for (int first = 0; first < tiles; first += kAhead * kBatch) {
      float pooled[kAhead];
#pragma unroll
      for (float& x : pooled) x = kSum ? 0.0f : -INFINITY;
      for_rows(first, rows, tiles, known, [&](int batch, int, float log) {
        float& x = pooled[batch];
        x = kSum ? x + exp2_fast(log) : max_or_nan(x, log);
      });
#pragma unroll
      for (int batch = 0; batch < kAhead; ++batch) {
        const int tile = first + batch * kBatch + lane_id();
        add<kSum>(map, tile, tile < tiles, pooled[batch], share);
      }
    }
  }

  // Adds to their block what 16 rows give in the lane's KV tile.
  template <bool kSum>
  __device__ __forceinline__ void add(float* map, int tile, bool exists, float x,
                                      float share) const {
    if (p.wide_kv) {
      const float other = __shfl_xor_sync(kFullWarp, x, 1);
      x = kSum ? x + other : max_or_nan(x, other);
      exists &= tile % 2 == 0;
    }
    float* const at = map + (p.wide_kv ? tile / 2 : tile);
    if constexpr (kSum) {
      // To a multiple of 2^-23: then every order of additions gives the same sum.
      const float value = (x * share + 1.0f) - 1.0f;
      if (exists && value != 0.0f) atomicAdd(at, value);
    } else {
      // Probabilities compare as integers do, and NaN is above all of them.
      const int value = __float_as_int(exp2_fast(x));
      if (exists && value != 0) atomicMax(reinterpret_cast<int*>(at), value);
    }
  }

  // Every row by itself.
  __device__ __forceinline__ void write_rows(float* map, int rows, int tiles,
                                             const Known& known) const {
    const int in_block = p.wide_kv ? 2 : 1;
    const int cols = (tiles + in_block - 1) / in_block;
#pragma unroll 1
    for (int first = 0; first < tiles; first += kAhead * kBatch) {
      const int tile = first + lane_id();
      float* const at = map + tile / in_block;
      for_rows(first, rows, tiles, known, [&](int batch, int row, float log) {
        float x = exp2_fast(log);
        if (p.wide_kv) {
          const float other = __shfl_xor_sync(kFullWarp, x, 1);
          x = p.sum ? x + other : max_or_nan(x, other);
        }
        const bool exists = row < rows && tile + batch * kBatch < tiles;
        if (exists && tile % in_block == 0) {
          __stcs(at + row * p.map_cols + batch * kBatch / in_block, x);
        }
      });
    }
    if (p.zeroed) return;
#pragma unroll 1
    for (int row = 0; row < min(rows, kRows); ++row) {
#pragma unroll 4
      for (int64_t col = cols + lane_id(); col < p.map_cols; col += 32) {
        __stcs(map + row * p.map_cols + col, 0.0f);
      }
    }
  }

  const RowMapParams& p;
  const unsigned first_line;
};

}  // namespace dev
}  // namespace seer
