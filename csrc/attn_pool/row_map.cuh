// SPDX-License-Identifier: Apache-2.0
// The attention map of rows whose softmax is still being computed.
//
// Of every row and KV tile of 64 columns one number is kept until the row's sum is final: the log2
// of the tile's largest weight (its largest score) or of its sum of weights. Then it turns into a
// probability: exp2(number - reference - log2(sum)). As a logarithm it stays right whatever happens to
// the row's reference meanwhile. Its rounding, 2^-24 of itself, is 3e-4 of a probability at scores
// of 10^4; that of log2_fast is 2e-5 at the smallest weights.
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

#include "common/max_or_nan.cuh"
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

// log2(x) to 2^-22, of itself outside (1/2, 2); subnormal x taken as 0.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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
  template <bool kSum>
  __device__ __forceinline__ void finish(const RowGroup& group, const float (&reference)[2],
                                         const float (&sum)[2]) const {
    __syncwarp();  // orders the lanes' stores to the strip before the loads
    const int rows = group.rows_q - group.row;
    const Known known = known_of(rows, reference, sum);
    if (p.per_token) {
      const int64_t head = p.packed ? group.head : group.batch * p.heads_q + group.head;
      float* const map = p.map + (head * p.map_rows + group.start + group.row) * p.map_cols;
      write_rows<kSum>(map, rows, group.tiles, known);
    } else {
      const int64_t head = group.batch * p.heads_q + group.head;
      const int block = group.row / p.block_q;
      float* const map = p.map + (head * p.map_rows + block) * p.map_cols;
      const int in_block = min(group.rows_q - block * p.block_q, p.block_q);
      const float share = __fdividef(1.0f, static_cast<float>(in_block));
      write_blocks<kSum>(map, group.tiles, share, known);
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

  // Finite for a row that sees nothing: its numbers are -inf.
  static __device__ __forceinline__ float log_of(float sum) {
    return sum == 0.0f ? 0.0f : log2f(sum);
  }

  // At the end a lane reads a quarter of every eighth line: four rows' numbers.
  static constexpr int kRead = 4;
  static constexpr int kLines = 8;
  static constexpr int kBatch = kLines * 32 / kRead;  // KV tiles
  // Number j of quarter `quarter` of a line is that of this row of the group.
  static __device__ __forceinline__ int row_of(int quarter, int j) {
    return 2 * quarter + j / 2 + j % 2 * 8;
  }
  // What is known of those rows. The logarithm of the sum is infinite if there is no such row.
  struct Known {
    float reference[kRead], log_sum[kRead];
    bool exists[kRead];
  };
  static __device__ __forceinline__ Known known_of(int rows, const float (&reference)[2],
                                                   const float (&sum)[2]) {
    const float log_sum[2] = {log_of(sum[0]), log_of(sum[1])};
    const int quarter = lane_id() % 4;
    Known known;
#pragma unroll
    for (int j = 0; j < kRead; ++j) {
      const int from = row_of(quarter, j) % 8 * 4;  // a lane of the row's quad
      known.exists[j] = row_of(quarter, j) < rows;
      known.reference[j] = __shfl_sync(kFullWarp, reference[j % 2], from);
      const float log = __shfl_sync(kFullWarp, log_sum[j % 2], from);
      known.log_sum[j] = known.exists[j] ? log : INFINITY;
    }
    return known;
  }

  // A lane's numbers of a batch of KV tiles from `first` on: of KV tile first + 8 * i + lane / 4.
  struct Numbers {
    float4 of[kLines];
  };
  __device__ __forceinline__ void read(int first, int tiles, Numbers& numbers) const {
    const int tile = first + lane_id() / 4;
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      // Beyond `tiles` the last one, and without a condition, which would have the registers keep
      // what they held before.
      const float* const at = line(min(tile + 8 * i, tiles - 1)) + lane_id() % 4 * kRead;
      numbers.of[i] = __ldcg(reinterpret_cast<const float4*>(at));
    }
  }
  // Calls use(first, numbers) for all batches. While one is used the next is on its way: the three
  // consumers of a Hopper CTA end together, so that nothing else hides the time that loads take.
  template <class Use>
  __device__ __forceinline__ void for_batches(int tiles, const Use& use) const {
    if (tiles == 0) return;
    Numbers even, odd;
    read(0, tiles, even);
    read(kBatch, tiles, odd);
#pragma unroll 1
    for (int first = 0; first < tiles; first += 2 * kBatch) {
      use(first, even);
      read(first + 2 * kBatch, tiles, even);
      use(first + kBatch, odd);
      read(first + 3 * kBatch, tiles, odd);
    }
  }
  // The logarithm of the probability of number j of line i; of rows that do not exist, -inf or NaN.
  static __device__ __forceinline__ float log_at(const Numbers& numbers, int i, int j,
                                                 const Known& known) {
    const float4& four = numbers.of[i];
    const float of[kRead] = {four.x, four.y, four.z, four.w};
    return of[j] - known.reference[j] - known.log_sum[j];
  }

  template <bool kSum>
  static __device__ __forceinline__ float join(float a, float b) {
    return kSum ? a + b : max_or_nan(a, b);
  }

  template <bool kSum>
  __device__ __forceinline__ void write_blocks(float* map, int tiles, float share,
                                               const Known& known) const {
    const int lane = lane_id();
    // A row with a NaN has it in its sum, so that maxima need not look for it in the numbers.
    float poison = 0.0f;
#pragma unroll
    for (int j = 0; j < kRead; ++j) {
      if (known.exists[j]) poison += known.log_sum[j] * 0.0f;
    }
    for_batches(tiles, [&](int first, const Numbers& numbers) {
      float pooled[kLines];
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        pooled[i] = kSum ? 0.0f : -INFINITY;
#pragma unroll
        for (int j = 0; j < kRead; ++j) {
          const float log = log_at(numbers, i, j, known);
          if constexpr (kSum) {
            pooled[i] += known.exists[j] ? exp2_fast(log) : 0.0f;
          } else {
            pooled[i] = fmaxf(pooled[i], log);
          }
        }
        if constexpr (!kSum) pooled[i] += poison;
      }
      // The quad's quarters meet; of lines 4 * i to 4 * i + 3, lane l of it goes on with line l.
      meet_halves<kSum, kLines / 2>(pooled, 1);
      meet_halves<kSum, kLines / 4>(pooled, 2);
#pragma unroll
      for (int i = 0; i < kLines / 4; ++i) {
        add<kSum>(map, first + 32 * i + lane % 4 * 8 + lane / 4, tiles, pooled[i], share);
      }
    });
  }
  // Of numbers 2 * i and 2 * i + 1, the lane goes on with the first, or with the second if bit
  // `bit` of its number is set.
  template <bool kSum, int kCount>
  static __device__ __forceinline__ void meet_halves(float (&x)[kLines], int bit) {
    const bool second = lane_id() & bit;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float given = __shfl_xor_sync(kFullWarp, second ? x[2 * i] : x[2 * i + 1], bit);
      x[i] = join<kSum>(second ? x[2 * i + 1] : x[2 * i], given);
    }
  }

  // Adds to their block what 16 rows give in the lane's KV tile. A tile's neighbour is four lanes
  // away.
  template <bool kSum>
  __device__ __forceinline__ void add(float* map, int tile, int tiles, float x, float share) const {
    bool exists = tile < tiles;
    if (p.wide_kv) {
      if (!exists) x = kSum ? 0.0f : -INFINITY;
      x = join<kSum>(x, __shfl_xor_sync(kFullWarp, x, 4));
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
  template <bool kSum>
  __device__ __forceinline__ void write_rows(float* map, int rows, int tiles,
                                             const Known& known) const {
    const int in_block = p.wide_kv ? 2 : 1;
    const int cols = (tiles + in_block - 1) / in_block;
    const int lane = lane_id();
    for_batches(tiles, [&](int first, const Numbers& numbers) {
      const int tile = first + lane / 4;
      float* const at = map + lane % 4 * 2 * p.map_cols + tile / in_block;
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        const bool exists = tile + 8 * i < tiles;
#pragma unroll
        for (int j = 0; j < kRead; ++j) {
          float x = exp2_fast(log_at(numbers, i, j, known));
          if (p.wide_kv) x = join<kSum>(x, __shfl_xor_sync(kFullWarp, exists ? x : 0.0f, 4));
          if (exists && known.exists[j] && tile % in_block == 0) {
            __stcs(at + row_of(0, j) * p.map_cols + 8 * i / in_block, x);
          }
        }
      }
    });
    if (p.zeroed) return;
#pragma unroll 1
    for (int row = 0; row < min(rows, kRows); ++row) {
#pragma unroll 4
      for (int64_t col = cols + lane; col < p.map_cols; col += 32) {
        __stcs(map + row * p.map_cols + col, 0.0f);
      }
    }
  }

  const RowMapParams& p;
  const unsigned first_line;
};

}  // namespace dev
}  // namespace seer
