// SPDX-License-Identifier: Apache-2.0
// The attention map of rows whose softmax is still being computed.
//
// Of every row and KV tile of 64 columns one number is kept until the row's sum is final: the log2
// of the tile's largest weight (its largest score) or of its sum of weights. Then it turns into a
// probability: exp2(number - reference) / sum. As a logarithm it stays right whatever happens to
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

#include <cstdint>

#include "common/online_softmax.cuh"
#include "common/warp.cuh"

namespace seer {

struct RowMapParams {
  float* strips;  // [CTA][warp][16-row group][strip_tiles][16 rows]
  float* map;     // zero-filled; shape as in seer/attn_pool.h
  int strip_tiles;
  int block_q;
  int64_t map_cols;  // KV blocks
  int64_t map_rows;  // of a head: query blocks, or rows if per_token
  int heads_q;
  bool packed;   // varlen
  bool wide_kv;  // a KV block is two tiles
  bool per_token;
  bool sum;  // else maxima
};

namespace dev {

// log2(x) to 2^-22, subnormal x taken as 0.
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
  // share, a maximum in units of log2, or a sum of weights. Odd lanes go on with the second row.
  template <bool kSum>
  static __device__ __forceinline__ float pair(const float* at, const float (&values)[2]) {
    const bool odd = is_odd(at);
    const float given = __shfl_xor_sync(kFullWarp, odd ? values[0] : values[1], 1);
    const float own = odd ? values[1] : values[0];
    return kSum ? own + given : fmaxf(own, given);
  }
  // Second half: keeps what pair() gave as that of KV tile `tile`. Sums are under `reference`.
  template <bool kSum>
  static __device__ __forceinline__ void keep(float* at, int tile, float x,
                                              const float (&reference)[2]) {
    const bool odd = is_odd(at);
    const float other = __shfl_xor_sync(kFullWarp, x, 2);
    x = kSum ? x + other : fmaxf(x, other);
    if constexpr (kSum) x = (odd ? reference[1] : reference[0]) + log2_fast(x);
    // Two lanes of the quad write the same: cheaper than a branch around the store.
    __stcg(at + tile * int64_t{kRows}, x);
  }

  // Writes the group's part of the map. inverse[half] is 1 / sum.
  __device__ __forceinline__ void finish(const RowGroup& group, const float (&reference)[2],
                                         const float (&inverse)[2]) const {
    __syncwarp();  // orders the lanes' stores to the strip before the loads
    const int rows = group.rows_q - group.row;
    if (p.per_token) {
      const int64_t head = p.packed ? group.head : group.batch * p.heads_q + group.head;
      float* const map = p.map + (head * p.map_rows + group.start + group.row) * p.map_cols;
      write_rows(map, rows, group.tiles, reference, inverse);
    } else {
      const int64_t head = group.batch * p.heads_q + group.head;
      const int block = group.row / p.block_q;
      float* const map = p.map + (head * p.map_rows + block) * p.map_cols;
      const int in_block = min(group.rows_q - block * p.block_q, p.block_q);
      write_blocks(map, rows, group.tiles, __fdividef(1.0f, static_cast<float>(in_block)),
                   reference, inverse);
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

  static constexpr int kSteps = 8;           // KV tiles of a lane in a batch, neighbours
  static constexpr int kBatch = 4 * kSteps;  // those of a quad
  static constexpr int kAhead = 4;

  // The lane's numbers of a batch: of its two rows and KV tiles first + 8 * (lane's place in its
  // quad) and the seven behind it.
  struct Numbers {
    float2 of[kSteps];
  };
  __device__ __forceinline__ void fetch(int first, Numbers& numbers) const {
    const int lane = lane_id();
    const auto* const at =
        reinterpret_cast<const float2*>(line(first + lane % 4 * kSteps)) + lane / 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) numbers.of[step] = __ldcg(at + step * (kRows / 2));
  }

  // Calls use(first, numbers) for every batch. All loads of kAhead batches are on their way
  // together: the three consumers of a Hopper CTA end together, so that nothing else hides the time
  // that a load takes.
  template <class Use>
  __device__ __forceinline__ void for_batches(int tiles, const Use& use) const {
    const int last = (tiles - 1) / kBatch * kBatch;
#pragma unroll 1
    for (int first = 0; first < tiles; first += kAhead * kBatch) {
      Numbers numbers[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        // Without a condition, which would have the registers keep what they held before.
        fetch(min(first + i * kBatch, last), numbers[i]);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i * kBatch < tiles) use(first + i * kBatch, numbers[i]);
      }
    }
  }

  // Probabilities: x[half][step] of the numbers' rows and tiles. 0 in rows that do not exist and
  // beyond `tiles`: strips are padded to whole batches, so what is read there means nothing.
  __device__ __forceinline__ void probabilities(const Numbers& numbers, int first, int rows,
                                                int tiles, const float (&reference)[2],
                                                const float (&inverse)[2],
                                                float (&x)[2][kSteps]) const {
    const int lane = lane_id();
    const int tile = first + lane % 4 * kSteps;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = lane / 4 + 8 * half < rows;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const float number = half == 0 ? numbers.of[step].x : numbers.of[step].y;
        const float weight = exp2_fast(number - reference[half]);
        x[half][step] = exists && tile + step < tiles ? weight * inverse[half] : 0.0f;
      }
    }
  }

  // The maximum or the sum of a lane's two rows: NaN if one of them is, as on the CPU.
  // Probabilities compare as integers do, and NaN is above all of them.
  __device__ __forceinline__ float pool(float a, float b) const {
    return p.sum ? a + b : __int_as_float(max(__float_as_int(a), __float_as_int(b)));
  }

  __device__ __forceinline__ void write_blocks(float* map, int rows, int tiles, float share,
                                               const float (&reference)[2],
                                               const float (&inverse)[2]) const {
    const int lane = lane_id();
    for_batches(tiles, [&](int first, const Numbers& numbers) {
      float x[2][kSteps];
      probabilities(numbers, first, rows, tiles, reference, inverse, x);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) x[0][step] = pool(x[0][step], x[1][step]);
      // Lanes with the same place in their quads have the same tiles of different rows. A lane
      // keeps half of its tiles in each step, at the end tile number lane / 4 of its 8.
#pragma unroll
      for (int count = kSteps / 2; count > 0; count /= 2) {
        const bool upper = lane & 4 * count;
#pragma unroll
        for (int i = 0; i < count; ++i) {
          const float given = upper ? x[0][i] : x[0][i + count];
          const float kept = upper ? x[0][i + count] : x[0][i];
          x[0][i] = pool(kept, __shfl_xor_sync(kFullWarp, given, 4 * count));
        }
      }
      const int tile = first + lane % 4 * kSteps + lane / 4;
      float* const at = map + (p.wide_kv ? tile / 2 : tile);
      if (p.sum) {
        // To a multiple of 2^-23: then every order of additions gives the same sum.
        const float value = (x[0][0] * share + 1.0f) - 1.0f;
        if (tile < tiles && value != 0.0f) atomicAdd(at, value);
      } else {
        const int value = __float_as_int(x[0][0]);
        if (tile < tiles && value != 0) atomicMax(reinterpret_cast<int*>(at), value);
      }
    });
  }

  // Every row by itself: 32 bytes of it (16 if KV blocks are wide) are a lane's.
  __device__ __forceinline__ void write_rows(float* map, int rows, int tiles,
                                             const float (&reference)[2],
                                             const float (&inverse)[2]) const {
    const int lane = lane_id();
    for_batches(tiles, [&](int first, const Numbers& numbers) {
      float x[2][kSteps];
      probabilities(numbers, first, rows, tiles, reference, inverse, x);
      const int tile = first + lane % 4 * kSteps;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        if (row >= rows) continue;
        float* const map_row = map + row * p.map_cols;
        if (p.wide_kv) {
#pragma unroll
          for (int i = 0; i < kSteps / 2; ++i) {
            x[half][i] = pool(x[half][2 * i], x[half][2 * i + 1]);
          }
          store<kSteps / 2>(map_row, tile / 2, (tiles + 1) / 2, x[half]);
        } else {
          store<kSteps>(map_row, tile, tiles, x[half]);
        }
      }
    });
  }

  // Blocks first .. first + kCount - 1 of a row, of which those from `blocks` on are not touched.
  template <int kCount>
  __device__ __forceinline__ void store(float* map_row, int first, int blocks,
                                        const float (&x)[kSteps]) const {
    float* const at = map_row + first;
    if (p.map_cols % 4 == 0 && first + kCount <= blocks) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        __stcs(reinterpret_cast<float4*>(at + i), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i < blocks) __stcs(at + i, x[i]);
    }
  }

  const RowMapParams& p;
  const unsigned first_line;
};

}  // namespace dev
}  // namespace seer
