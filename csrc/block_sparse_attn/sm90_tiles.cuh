// SPDX-License-Identifier: Apache-2.0
// What the tiles of the Hopper kernel are, and in which order they are handed out.
//
// A tile is a unit of one KV head per consumer; a unit is 64 query rows of one query
// head. Where the heads of a group keep the same blocks (a mask per KV head, or none), the units
// of a tile are heads of the group first, so that they share every K/V load; otherwise they are
// neighbouring rows of one head.
//
// Order: sequences; in a sequence, sections of KV heads whose K and V stay in L2; in a section,
// longest rows first (causal: the last), so that it ends with short tiles.
#pragma once

#include <cstdint>

#include "block_sparse_attn/sm90_traits.cuh"
#include "common/divisor.cuh"
#include "common/mbarrier.cuh"
#include "common/varlen.cuh"

namespace seer::dev {

template <class Traits>
struct TileOrder {
  static __host__ __device__ __forceinline__ int row_blocks(int rows_q) {
    return (rows_q + Traits::kRows - 1) / Traits::kRows;
  }

  static __host__ __device__ __forceinline__ int tiles_of_head(const Sm90Params& p, int rows_q) {
    constexpr int kUnits = Traits::kConsumers;
    const int blocks = row_blocks(rows_q);
    return p.share_group ? (blocks * p.group + kUnits - 1) / kUnits
                         : (blocks + kUnits - 1) / kUnits * p.group;
  }

  // KV heads whose tiles are handed out together: all, if the cache holds their K and V; otherwise
  // half of what it holds, in sections of equal size (a small last one would end with long tiles).
  static __host__ __device__ __forceinline__ int heads_together(const Sm90Params& p, int rows_kv) {
    const int fitting = p.rows_in_cache / (rows_kv > 1 ? rows_kv : 1);
    if (fitting >= p.heads_kv) return p.heads_kv;
    const int most = fitting > 2 ? fitting / 2 : 1;
    const int sections = (p.heads_kv + most - 1) / most;
    return (p.heads_kv + sections - 1) / sections;
  }

  // What locate() and unit() divide by. Of packed sequences only the last two are used.
  static Sm90Divisors divisors(const Sm90Params& p) {
    const int tiles = tiles_of_head(p, p.rows_q);
    const int together = heads_together(p, p.rows_kv);
    const int rest = p.heads_kv % together;
    const auto of = [](int by) { return Divisor::of(by > 1 ? by : 1); };
    return {of(tiles * p.heads_kv),         of(tiles * together), of(together),
            of(rest > 0 ? rest : together), of(p.group),          of(p.heads_per_bits)};
  }

  // The unit of `consumer` in tile `tile` of a KV head.
  static __device__ __forceinline__ Sm90Unit unit(const Sm90Params& p, const Sm90Page& place,
                                                  int tile, int consumer) {
    const int index = p.share_group ? tile * Traits::kConsumers + consumer : tile;
    const int quotient = p.by.group.quotient(index);
    const int member = index - quotient * p.group;
    const int block = p.share_group ? quotient : quotient * Traits::kConsumers + consumer;
    Sm90Unit unit;
    unit.head = place.head_kv * p.group + member;
    unit.first_row = (row_blocks(place.rows_q) - 1 - block) * Traits::kRows;
    // Row r of the unit sees columns [0, min(limit + r, rows_kv)); without causality, all.
    const int limit = first_limit(p, place, unit.first_row);
    const int last_row = min(place.rows_q - unit.first_row, Traits::kRows) - 1;
    const int columns = max(min(limit + (p.causal ? last_row : 0), place.rows_kv), 0);
    unit.tiles = unit.first_row < 0 ? 0 : (columns + Traits::kTileKv - 1) / Traits::kTileKv;
    // A negative scale takes the masked path everywhere: it also negates the scores.
    unit.first_masked = p.score_sign < 0 ? 0 : max(min(limit, place.rows_kv), 0) / Traits::kTileKv;
    return unit;
  }

  // Columns that a unit's first row sees, if the sequence is long enough.
  static __device__ __forceinline__ int first_limit(const Sm90Params& p, const Sm90Page& place,
                                                    int first_row) {
    return p.causal ? first_row + place.rows_kv - place.rows_q + 1 : place.rows_kv;
  }

  // Fills the place of tile `index` of the launch, and its number among those of its KV head;
  // false if there is none. By a whole warp.
  static __device__ __forceinline__ bool locate(const Sm90Params& p, int index, Sm90Page& place,
                                                int& tile_of_head) {
    place.tile = index;
    place.q_start = place.kv_start = 0;
    place.rows_q = p.rows_q;
    place.rows_kv = p.rows_kv;
    if (p.cu_seqlens_q == nullptr) {
      place.batch = p.by.sequence_tiles.quotient(index);
      if (place.batch >= p.batch) return false;
      index -= place.batch * p.by.sequence_tiles.by;
      const int section = p.by.section_tiles.quotient(index);
      const int in_section = index - section * p.by.section_tiles.by;
      const int first_head = section * p.by.heads.by;
      const bool last = first_head + p.by.heads.by >= p.heads_kv;
      const Divisor heads = last ? p.by.last_heads : p.by.heads;
      tile_of_head = heads.quotient(in_section);
      place.head_kv = first_head + in_section - tile_of_head * heads.by;
      return true;
    }
    if (!find_sequence(p, index, place)) return false;
    const int per_head = tiles_of_head(p, place.rows_q);
    const int together = heads_together(p, place.rows_kv);
    const int section = index / (per_head * together);
    const int in_section = index - section * per_head * together;
    const int first_head = section * together;
    const int heads = min(together, p.heads_kv - first_head);
    tile_of_head = in_section / heads;
    place.head_kv = first_head + in_section % heads;
    return true;
  }

 private:
  // The sequence whose tiles hold `index`, which becomes the index among them. Each lane looks at
  // one sequence of 32. A CTA's tiles come in rising order (but for those done again), so the
  // search goes on from where the last one ended.
  static __device__ __forceinline__ bool find_sequence(const Sm90Params& p, int& index,
                                                       Sm90Page& place) {
    const int lane = threadIdx.x % 32;
    Sm90Search& search = shared_object<Sm90Search>(Traits::kSmemSearch);
    Sm90Search from = search;
    __syncwarp();
    if (index < from.tiles_before) from = {};
    index -= from.tiles_before;
    for (int first = from.first_sequence; first < p.batch; first += 32) {
      int tiles = 0;
      if (first + lane < p.batch) {
        const int rows = sequence_rows(p.cu_seqlens_q, first + lane, p.total_q, p.rows_q).rows;
        tiles = tiles_of_head(p, rows) * p.heads_kv;
      }
      int before = tiles;  // becomes the tiles of this and earlier lanes
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, before, step);
        if (lane >= step) before += other;
      }
      const unsigned behind = __ballot_sync(0xffffffffu, before > index);
      if (behind == 0) {
        const int all = __shfl_sync(0xffffffffu, before, 31);
        index -= all;
        from.tiles_before += all;
        continue;
      }
      if (lane == 0) search = {first, from.tiles_before};
      const int found = __ffs(behind) - 1;
      index -= __shfl_sync(0xffffffffu, before - tiles, found);
      place.batch = first + found;
      const RowRange q = sequence_rows(p.cu_seqlens_q, place.batch, p.total_q, p.rows_q);
      const RowRange kv = sequence_rows(p.cu_seqlens_kv, place.batch, p.total_kv, p.rows_kv);
      place.rows_q = q.rows;
      place.q_start = static_cast<int>(q.start);
      place.rows_kv = kv.rows;
      place.kv_start = static_cast<int>(kv.start);
      return true;
    }
    return false;
  }
};

}  // namespace seer::dev
