// SPDX-License-Identifier: Apache-2.0
// attn_pool by warp-level matrix products is the portable kernel of block_sparse_attn without a
// mask, and with a number kept of every row and KV tile (row_map.cuh): its traits, parameters and
// Traits::Map. The maxima are those that the softmax finds anyway.
#pragma once

#include <cstdint>

#include "attn_pool/row_map.cuh"
#include "attn_pool/variant.h"
#include "block_sparse_attn/sm80_kernel.cuh"
#include "block_sparse_attn/sm80_traits.cuh"

namespace seer {

struct Sm80PoolParams : Sm80Params {
  RowMapParams map;
  unsigned tiles;  // of the launch
};

namespace dev {

// More of what a CTA does not hold in registers through the loop (Sm80Parked).
template <int kThreads>
struct Sm80PoolParked : Sm80Parked {
  int64_t start;          // packed row of the sequence's first row
  unsigned index;         // of the tile in the launch
  int rows_q;             // of the sequence
  int tiles;              // KV tiles that are visited
  float4 sums[kThreads];  // of each thread's rows, without the present KV tile

  __device__ __forceinline__ void park(int64_t start_, int rows_q_, int tiles_) {
    start = start_;
    rows_q = rows_q_;
    tiles = tiles_;
  }
};

template <int kWarps>
struct Sm80RowMap {
  static constexpr bool kKeeps = true;
  using Softmax = OnlineSoftmax<4>;
  using Parked = Sm80PoolParked<32 * kWarps>;

  // Between the softmax's maxima and its weights. maxima[i]: of all lanes, in units of log2.
  static __device__ __forceinline__ void keep_maxima(const Sm80PoolParams& p, Softmax& softmax,
                                                     Parked& parked, int tile,
                                                     const float (&maxima)[4]) {
    if (!p.map.sum) {
      keep<false>(p, softmax, tile, maxima);
      return;
    }
    // The tile's weights are summed apart: as a difference of the row's sums, small ones would be
    // lost.
    float (&sum)[4] = softmax.sum;
    parked.sums[thread_id()] = make_float4(sum[0], sum[1], sum[2], sum[3]);
#pragma unroll
    for (float& x : sum) x = 0.0f;
  }
  // When the tile's weights have been summed.
  static __device__ __forceinline__ void keep_sums(const Sm80PoolParams& p, Softmax& softmax,
                                                   const Parked& parked, int tile) {
    if (!p.map.sum) return;
    keep<true>(p, softmax, tile, softmax.sum);
    const float4 before = parked.sums[thread_id()];
    softmax.sum[0] += before.x;
    softmax.sum[1] += before.y;
    softmax.sum[2] += before.z;
    softmax.sum[3] += before.w;
  }

  // Writes the warp's part of the map.
  static __device__ __forceinline__ void finish(const Sm80PoolParams& p, const Softmax& softmax,
                                                const Parked& parked) {
    const TilePlace place(p, parked.index);
    const int first = (place.tile * kWarps + int(unsigned(thread_id()) / 32)) * 2 * RowStrip::kRows;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const RowGroup group = {
          place.head_q,  place.batch,
          parked.start,  first + m * RowStrip::kRows,
          parked.rows_q, static_cast<int>(__reduce_max_sync(kFullWarp, parked.tiles))};
      if (!__any_sync(kFullWarp, group.row < group.rows_q)) continue;
      const float reference[2] = {softmax.reference[2 * m], softmax.reference[2 * m + 1]};
      const float sum[2] = {softmax.sum[2 * m], softmax.sum[2 * m + 1]};
      const RowStrip rows(p.map, strip(m));
      if (p.map.sum) {
        rows.finish<true>(group, reference, sum);
      } else {
        rows.finish<false>(group, reference, sum);
      }
    }
  }

 private:
  static __device__ __forceinline__ unsigned strip(int m) {
    return (blockIdx.x * kWarps + unsigned(thread_id()) / 32) * 2 + m;
  }
  template <bool kSum>
  static __device__ __forceinline__ void keep(const Sm80PoolParams& p, const Softmax& softmax,
                                              int tile, const float (&values)[4]) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float reference[2] = {softmax.reference[2 * m], softmax.reference[2 * m + 1]};
      const float pair[2] = {values[2 * m], values[2 * m + 1]};
      float* const at = RowStrip(p.map, strip(m)).lane_place();
      RowStrip::keep<kSum, kSum>(at, tile, RowStrip::pair<kSum>(at, pair), reference);
    }
  }
};

}  // namespace dev

template <AttnPoolKey kKey>
struct Sm80PoolTraits : Sm80Traits<kKey.attention()> {
  using Params = Sm80PoolParams;
  using Map = dev::Sm80RowMap<kKey.rows / 32>;
  using Parked = typename Map::Parked;
  static constexpr int kSmemBytes = Sm80Traits<kKey.attention()>::kSmemParked + sizeof(Parked);
};

}  // namespace seer
