// SPDX-License-Identifier: Apache-2.0
// attn_pool on Hopper is the kernel of block_sparse_attn without a mask, and with a number kept of
// every row and KV tile (row_map.cuh): its traits, parameters and Traits::Map
// (block_sparse_attn/sm90_no_map.cuh).
//
// Cost per warp and KV tile: 16 maxima of three (sums are there anyway); two shuffles, a logarithm
// and a store while the tensor cores work on P V. At the end of a unit 4 instructions per tile.
#pragma once

#include <cstdint>

#include "attn_pool/row_map.cuh"
#include "attn_pool/variant.h"
#include "block_sparse_attn/sm90_traits.cuh"

namespace seer {

struct Sm90PoolParams : Sm90Params {
  RowMapParams map;
};

namespace dev {

template <bool kSum, int kConsumers>
class Sm90RowMap {
 public:
  static constexpr bool kKeeps = true;

  __device__ __forceinline__ explicit Sm90RowMap(const Sm90PoolParams& params)
      : p(params), at(strip().lane_place()) {
    // One address for the compiler, and not a sum to be worked out at every KV tile.
    asm volatile("" : "+l"(at));
  }

  // The lane's weights of a KV tile and their sums, under the present references.
  __device__ __forceinline__ void note(const float (&weights)[32], const float (&added)[2]) {
    if constexpr (kSum) {
      noted = RowStrip::pair<true>(at, added);
    } else {
      const float top[2] = {largest(weights, 0), largest(weights, 1)};
      noted = RowStrip::pair<false>(at, top);
    }
  }

  // Keeps what was noted, of KV tile `tile`.
  __device__ __forceinline__ void keep(int tile, const float (&reference)[2]) const {
    RowStrip::keep<kSum, true>(at, tile, noted, reference);
  }

  template <class Softmax>
  __device__ __forceinline__ void finish(const Softmax& softmax, const Sm90Page& page,
                                         const Sm90Unit& unit) const {
    // Reduced so that the compiler knows it to be the same in all lanes (see Consumer::end_unit).
    const RowGroup group = {
        unit.head,    page.batch,
        page.q_start, unit.first_row + thread_id() % 128 / 32 * RowStrip::kRows,
        page.rows_q,  static_cast<int>(__reduce_max_sync(kFullWarp, unit.tiles))};
    strip().template finish<kSum>(group, softmax.references(), softmax.sums());
  }

 private:
  // The largest weight of the lane's row `half`. From 0 on, numbers compare as their bits do, and
  // of integers one instruction finds the largest of three.
  static __device__ __forceinline__ float largest(const float (&weights)[32], int half) {
    const auto bits = [&](int j, int c) { return __float_as_int(weights[4 * j + 2 * half + c]); };
    int top = __vimax3_s32(bits(0, 0), bits(0, 1), 0);
#pragma unroll
    for (int j = 1; j < 8; ++j) top = __vimax3_s32(bits(j, 0), bits(j, 1), top);
    return __int_as_float(top);
  }
  __device__ __forceinline__ RowStrip strip() const {
    constexpr unsigned kWarps = 4 * kConsumers, kFirstWarp = 4;
    return RowStrip(p.map, blockIdx.x * kWarps + (unsigned(thread_id()) / 32 - kFirstWarp));
  }

  const Sm90PoolParams& p;
  float* at;    // where the lane keeps its numbers
  float noted;  // of the tile that was weighed last
};

}  // namespace dev

template <AttnPoolKey kKey, bool kSum>
struct Sm90PoolTraits : Sm90Traits<kKey.attention()> {
  using Params = Sm90PoolParams;
  using Map = dev::Sm90RowMap<kSum, Sm90Traits<kKey.attention()>::kConsumers>;
};

}  // namespace seer
