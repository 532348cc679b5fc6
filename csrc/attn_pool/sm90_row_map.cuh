// SPDX-License-Identifier: Apache-2.0
// attn_pool on Hopper is the kernel of block_sparse_attn without a mask, and with a number kept of
// every row and KV tile (row_map.cuh): its traits, parameters and Traits::Map
// (block_sparse_attn/sm90_no_map.cuh).
//
// Cost per warp and KV tile: 30 maxima, independent of the weights and next to their exp2 (sums are
// there anyway); two shuffles and a store in the shadow of P V. At the end of a unit 5 instructions
// per tile.
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

template <bool kSum>
class Sm90RowMap {
 public:
  static constexpr bool kKeeps = true;

  __device__ __forceinline__ explicit Sm90RowMap(const Sm90PoolParams& params)
      : p(params), at(strip().lane_place()) {}

  // The lane's scores; times `scale` they are in units of log2.
  template <class Softmax>
  __device__ __forceinline__ void note_scores(const Softmax&, const float (&scores)[32],
                                              float scale) {
    if constexpr (!kSum) {
      float top[2];
      Softmax::maxima(scores, top);
      top[0] *= scale;
      top[1] *= scale;
      noted = RowStrip::pair<false>(at, top);
    }
  }
  __device__ __forceinline__ void note_sums(const float (&added)[2]) {
    if constexpr (kSum) noted = RowStrip::pair<true>(at, added);
  }

  // Keeps what was noted, of KV tile `tile`.
  __device__ __forceinline__ void keep(int tile, const float (&reference)[2]) const {
    RowStrip::keep<kSum>(at, tile, noted, reference);
  }

  template <class Softmax>
  __device__ __forceinline__ void finish(const Softmax& softmax, const Sm90Page& page,
                                         const Sm90Unit& unit) const {
    // Reduced so that the compiler knows it to be the same in all lanes (see Consumer::end_unit).
    const RowGroup group = {
        unit.head,    page.batch,
        page.q_start, unit.first_row + thread_id() % 128 / 32 * RowStrip::kRows,
        page.rows_q,  static_cast<int>(__reduce_max_sync(kFullWarp, unit.tiles))};
    const float inverse[2] = {softmax.inverse_sum(0), softmax.inverse_sum(1)};
    strip().finish(group, softmax.references(), inverse);
  }

 private:
  __device__ __forceinline__ RowStrip strip() const {
    constexpr unsigned kWarps = 12, kFirstWarp = 4;
    return RowStrip(p.map, blockIdx.x * kWarps + (unsigned(thread_id()) / 32 - kFirstWarp));
  }

  const Sm90PoolParams& p;
  float* const at;  // where the lane keeps its numbers
  float noted;      // of the tile that was weighed last
};

}  // namespace dev

template <AttnPoolKey kKey, bool kSum>
struct Sm90PoolTraits : Sm90Traits<kKey.attention()> {
  using Params = Sm90PoolParams;
  using Map = dev::Sm90RowMap<kSum>;
};

}  // namespace seer
