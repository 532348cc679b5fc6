// SPDX-License-Identifier: Apache-2.0
// Block-sparse attention forward with warp-level matrix products: runs from compute capability 8.0.
//
// What   out = softmax(scale * Q K^T, over visible columns) V, and the log-sum-exp of each row.
// Shape  A CTA owns one query block (kTileQ = 64 or 128 rows) of one head; each of its warps owns
//        32 of the rows. It visits the kept KV tiles of 64 rows, last to first, so that the tiles
//        that need masking (causal diagonal, ragged end) come first.
// Loop   (K and V have one buffer each, and each loads while the other is in use)
//          tile = walk.next();  load Q, K[tile]
//          while tile:
//            wait K[tile]; barrier          # everybody is done with the previous V
//            load V[tile]
//            S = Q K^T; mask if needed; reference = max(...); rescale out if it rose
//            wait V[tile]; barrier          # everybody is done with K
//            tile = walk.next();  load K[tile]
//            out += exp2(S - reference) V   # exp2 interleaved with the products
//          out / sum -> shared memory -> 16-byte stores; lse
//        Two buffers each would save a barrier per tile, but cost the 64-row tile two of its four
//        CTAs per SM and measured 2 to 3 % slower on 128-row tiles (docs/perf_notes.md).
//
// Never read: K/V rows past the end of the sequence (filled with zeros), tiles that are not kept or
// lie beyond the causal diagonal. Inside a kept tile a masked column has P = 0, but 0 * V is NaN if
// V is Inf or NaN there: as in dense attention, V rows of a visited tile must be finite.
#pragma once

#include <cstdint>

#include "block_sparse_attn/sm80_tile.cuh"
#include "block_sparse_attn/sm80_traits.cuh"
#include "common/async_copy.cuh"
#include "common/block_bit_walk.cuh"
#include "common/varlen.cuh"

namespace seer::dev {

// Where a CTA works. Heads of a KV group are neighbours, then query tiles with the longest rows
// (causal: the last) first, then KV heads, then the batch: neighbours in time share K and V in L2,
// and a KV head ends with its short tiles while the next one's long tiles start.
struct TilePlace {
  int tile, head_q, head_kv, batch;

  __device__ __forceinline__ TilePlace(const Sm80Params& p, unsigned index) {
    const unsigned member = index % p.group;
    index /= p.group;
    tile = p.tiles_q - 1 - static_cast<int>(index % p.tiles_q);
    index /= p.tiles_q;
    head_kv = static_cast<int>(index % p.heads_kv);
    batch = static_cast<int>(index / p.heads_kv);
    head_q = head_kv * p.group + static_cast<int>(member);
  }
};

// The part of a tile that a thread copies: one 16-byte chunk of each panel in every
// (kThreads / 8)th row. Eight lanes cover 128 contiguous bytes.
template <class Traits, class Tile, int kRows>
struct ThreadCopy {
  static constexpr int kRowStep = Traits::kThreads / 8;
  static constexpr int kSteps = kRows / kRowStep;
  static_assert(kRowStep % 8 == 0, "the swizzle of a thread's rows must not change");

  // Starts copying rows [first, first + kRows) of the matrix at `global` that has `rows` rows; rows
  // past its end become zeros.
  __device__ __forceinline__ void load(uint32_t smem, const uint16_t* global, int row_stride,
                                       int first, int rows) const {
    const int thread = recompute_from(static_cast<int>(threadIdx.x));
    const int row = thread / 8, col = thread % 8 * 8;
    const uint32_t offset = Tile::offset(row, col);
    const int thread_row = first + row;
    const int64_t start = static_cast<int64_t>(thread_row) * row_stride + col;
    const uint16_t* source = global + start;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const bool valid = thread_row + i * kRowStep < rows;
      const uint32_t target = smem + offset + i * kRowStep * Tile::kRowBytes;
      cp_async_16<0>(target, source, valid);
      if constexpr (Tile::kPanels == 2) {
        cp_async_16<Tile::kRowBytes>(target + Tile::kPanelBytes, source, valid);
      }
      source += int64_t{kRowStep} * row_stride;
    }
  }
};

// Normalises a warp's output, passes it through the warp's own Q rows in shared memory (no other
// warp reads those) to whole 128-byte lines, and stores the log-sum-exp.
template <class Traits>
__device__ __forceinline__ void store_output(WarpTile<Traits>& warp_tile, const Sm80Parked& parked,
                                             int64_t row_stride, char* smem_rows, int warp,
                                             int lane) {
  using Tile = typename Traits::TileQ;
  uint16_t* out = parked.out + warp * Traits::kWarpRows * row_stride;
  float* lse = parked.lse + warp * Traits::kWarpRows;
  const int rows = parked.rows - warp * Traits::kWarpRows;
  warp_tile.softmax.finish();
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + lane / 4 + 8 * half;
      const float inverse = warp_tile.softmax.inverse_sum(2 * m + half);
      if (lane % 4 == 0 && row < rows) lse[row] = warp_tile.softmax.lse(2 * m + half);
#pragma unroll
      for (int n = 0; n < WarpTile<Traits>::kOutTiles; ++n) {
        const float* pair = &warp_tile.out[m][n][2 * half];
        *reinterpret_cast<uint32_t*>(smem_rows + Tile::offset(row, 8 * n + 2 * (lane % 4))) =
            pack_pair<typename Traits::Element>(pair[0] * inverse, pair[1] * inverse);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Traits::kWarpRows / 4; ++i) {
    const int row = 4 * i + lane / 8;
    if (row >= rows) break;
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int col = 64 * panel + lane % 8 * 8;
      *reinterpret_cast<uint4*>(out + row * row_stride + col) =
          *reinterpret_cast<const uint4*>(smem_rows + Tile::offset(row, col));
    }
  }
}

template <class Traits>
__device__ __forceinline__ void compute_tile(const typename Traits::Params& p, char* smem,
                                             unsigned index) {
  const TilePlace place(p, index);

  // The sequence: row counts, and pointers to its first row in this head.
  int rows_q = p.rows_q, rows_kv = p.rows_kv;
  int64_t q_start = 0, kv_start = 0;
  if (p.cu_seqlens_q != nullptr) {
    const RowRange q = sequence_rows(p.cu_seqlens_q, place.batch, p.total_q, p.rows_q);
    const RowRange kv = sequence_rows(p.cu_seqlens_kv, place.batch, p.total_kv, p.rows_kv);
    rows_q = q.rows, q_start = q.start;
    rows_kv = kv.rows, kv_start = kv.start;
  }
  const int first_row = place.tile * Traits::kTileQ;
  if (first_row >= rows_q) return;
  const uint16_t* q = p.q + place.batch * p.q_batch_stride + place.head_q * p.q_head_stride +
                      q_start * p.q_row_stride;
  const uint16_t* k = p.k + place.batch * p.k_batch_stride + place.head_kv * p.k_head_stride +
                      kv_start * p.k_row_stride;
  const uint16_t* v = p.v + place.batch * p.v_batch_stride + place.head_kv * p.v_head_stride +
                      kv_start * p.v_row_stride;

  // Row r of the tile sees columns [0, min(first_limit + r, rows_kv)). Tiles from first_masked on
  // hold columns that some row does not see. A negative scale makes every tile take the masked
  // path, which also negates the scores.
  const int first_limit = p.causal ? first_row + rows_kv - rows_q + 1 : rows_kv;
  const int tile_rows = min(rows_q - first_row, Traits::kTileQ);
  const int visible = max(min(first_limit + tile_rows - 1, rows_kv), 0);
  const int tiles_kv = (visible + Traits::kTileKv - 1) / Traits::kTileKv;

  const uint32_t* bits = nullptr;
  if (p.bits != nullptr) {
    bits = p.bits + place.batch * p.bits_batch_stride +
           place.head_q / p.heads_per_bits * p.bits_head_stride + place.tile * p.bits_row_stride;
  }
  BlockBitWalk walk(bits, p.two_tiles_per_block, tiles_kv);

  auto* parked = reinterpret_cast<typename Traits::Parked*>(smem + Traits::kSmemParked);
  if (threadIdx.x == 0) {
    parked->bits = bits;
    parked->k = k;
    parked->v = v;
    parked->out = p.out + place.batch * p.out_batch_stride + place.head_q * p.out_head_stride +
                  (q_start + first_row) * p.out_row_stride;
    parked->lse = p.lse + place.batch * p.lse_batch_stride + place.head_q * p.lse_head_stride +
                  q_start + first_row;
    parked->rows_kv = rows_kv;
    parked->rows = tile_rows;
    parked->first_limit = first_limit;
    parked->first_masked =
        p.score_sign < 0 ? 0 : max(min(first_limit, rows_kv), 0) / Traits::kTileKv;
    if constexpr (Traits::Map::kKeeps) parked->park(q_start, rows_q, tiles_kv);
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const LaneOffsets lane_offsets(lane);
  constexpr int kWarpBytes = Traits::kWarpRows * Traits::TileQ::kRowBytes;
  const uint32_t smem_q = smem_address(smem), smem_warp_q = smem_q + warp * kWarpBytes;
  const uint32_t smem_k = smem_q + Traits::kSmemK, smem_v = smem_q + Traits::kSmemV;
  const ThreadCopy<Traits, typename Traits::TileQ, Traits::kTileQ> copy_q;
  const ThreadCopy<Traits, typename Traits::TileKv, Traits::kTileKv> copy_kv;
  const auto load_k = [&](int tile) {
    copy_kv.load(smem_k, parked->k, p.k_row_stride, tile * Traits::kTileKv, parked->rows_kv);
  };
  const auto load_v = [&](int tile) {
    copy_kv.load(smem_v, parked->v, p.v_row_stride, tile * Traits::kTileKv, parked->rows_kv);
  };

  const auto next_tile = [&] { return walk.next(parked->bits, p.two_tiles_per_block); };
  int tile = next_tile();
  copy_q.load(smem_q, q, p.q_row_stride, first_row, rows_q);
  if (tile >= 0) load_k(tile);

  WarpTile<Traits> warp_tile;
  while (tile >= 0) {
    cp_async_wait_all();
    __syncthreads();
    load_v(tile);
    warp_tile.multiply_qk(smem_warp_q, smem_k, lane_offsets);
    if (tile >= parked->first_masked) {
      warp_tile.mask(tile * Traits::kTileKv, p.score_sign, lane,
                     parked->first_limit + warp * Traits::kWarpRows, parked->rows_kv);
    }
    float maxima[WarpTile<Traits>::kRows];
    warp_tile.update_softmax(p.scale_log2, maxima);
    if constexpr (Traits::Map::kKeeps) {
      Traits::Map::keep_maxima(p, warp_tile.softmax, *parked, tile, maxima);
    }
    warp_tile.begin_probabilities(p.scale_log2);
    cp_async_wait_all();
    __syncthreads();
    [[maybe_unused]] const int this_tile = tile;
    tile = next_tile();
    if (tile >= 0) load_k(tile);
    warp_tile.multiply_pv(smem_v, lane_offsets, p.scale_log2);
    if constexpr (Traits::Map::kKeeps) {
      Traits::Map::keep_sums(p, warp_tile.softmax, *parked, this_tile);
    }
  }

  // No tile: Q may still be in flight into the rows that the output is about to use.
  cp_async_wait_all();
  __syncthreads();
  store_output<Traits>(warp_tile, *parked, p.out_row_stride, smem + warp * kWarpBytes, warp, lane);
  if constexpr (Traits::Map::kKeeps) {
    Traits::Map::finish(p, warp_tile.softmax, *parked);
  }
}

// One tile per CTA; with a map, whose scratch memory is a CTA's own, as many CTAs as there is scratch
// memory for, and a tile after the other.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    block_sparse_attn_sm80(const __grid_constant__ typename Traits::Params p) {
  extern __shared__ __align__(1024) char smem[];
  if constexpr (Traits::Map::kKeeps) {
    auto& parked = *reinterpret_cast<typename Traits::Parked*>(smem + Traits::kSmemParked);
    for (unsigned index = blockIdx.x; index < p.tiles;) {
      if (threadIdx.x == 0) parked.index = index;
      compute_tile<Traits>(p, smem, index);
      __syncthreads();
      index = parked.index + gridDim.x;
      __syncthreads();  // shared memory is used again
    }
  } else {
    compute_tile<Traits>(p, smem, blockIdx.x);
  }
}

}  // namespace seer::dev
