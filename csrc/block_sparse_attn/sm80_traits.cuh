// SPDX-License-Identifier: Apache-2.0
// Compile-time shape of the sm80 block-sparse attention kernel: tiles, warps, shared memory, and
// the parameters its launcher hands over. Budgets are tabulated in docs/block_sparse_attn.md.
#pragma once

#include <cstdint>

#include "block_sparse_attn/variant.h"
#include "common/element_of.cuh"
#include "common/smem_tile.cuh"

namespace seer {

// What a CTA computes at its start and needs again only at its end or in masked tiles. It waits in
// shared memory: through the loop, every register is taken.
struct Sm80Parked {
  const uint32_t* bits;   // of the query block
  const uint16_t *k, *v;  // first row of the sequence
  uint16_t* out;          // first row of the tile
  float* lse;
  int rows_kv;       // of the sequence
  int rows;          // rows of the tile that exist
  int first_masked;  // first KV tile in which some row does not see every column
  int first_limit;   // row r of the tile sees columns below min(first_limit + r, rows_kv)
};

struct Sm80Params;

// What a kernel keeps of the scores beside the output: nothing. attn_pool/sm80_row_map.cuh keeps a
// number per row and KV tile.
struct Sm80NoMap {
  static constexpr bool kKeeps = false;
};

template <BlockSparseAttnKey kKey>
struct Sm80Traits {
  using Params = Sm80Params;
  using Map = Sm80NoMap;
  using Parked = Sm80Parked;
  using Element = ElementOf<kKey.dtype>;

  static constexpr int kHeadDim = kKey.head_dim;
  static constexpr int kTileQ = kKey.block_q;
  static constexpr int kTileKv = 64;

  // A warp owns 32 query rows, two 16-row mma tiles: each K or V fragment read from shared memory
  // then feeds two products. With 16 rows, shared memory would cap the kernel near 350 TFLOP/s on
  // an H200, with 32 near 490. The output and the scores of 32 rows fill most of a register file
  // slice, so Q is read again from shared memory for every KV tile.
  static constexpr int kWarpRows = 32;
  static constexpr int kWarps = kTileQ / kWarpRows;
  static constexpr int kThreads = kWarps * 32;
  // Eight warps per SM, two per scheduler, leave each thread 255 registers; CTAs that take turns
  // in the tensor cores hide each other's softmax and copies.
  static constexpr int kMinCtas = 8 / kWarps;
  // See OnlineSoftmax: how far a row may outgrow its reference. 0 costs 3 % (docs/perf_notes.md).
  static constexpr int kSlackLog2 = 8;

  using TileQ = dev::SmemTile<kTileQ, kHeadDim>;
  using TileKv = dev::SmemTile<kTileKv, kHeadDim>;
  static constexpr int kSmemK = TileQ::kBytes;
  static constexpr int kSmemV = kSmemK + TileKv::kBytes;
  static constexpr int kSmemParked = kSmemV + TileKv::kBytes;
  static constexpr int kSmemBytes = kSmemParked + sizeof(Sm80Parked);

  static_assert(kKey.sm == 80, "these are the traits of the sm80 kernel");
  static_assert(kHeadDim == 64 || kHeadDim == 128, "head_dim: 64 or 128");
  static_assert(kTileQ == 64 || kTileQ == 128, "block_q: 64 or 128");
  static_assert(kKey.tile_kv == kTileKv, "variants.json: tile_kv is not the kernel's");
};

// Kernel arguments, derived once on the host. Strides in elements (bits: in words).
struct Sm80Params {
  const uint16_t *q, *k, *v;
  uint16_t* out;
  float* lse;
  const uint32_t* bits;
  const int32_t *cu_seqlens_q, *cu_seqlens_kv;
  int64_t q_batch_stride, q_head_stride;
  int64_t k_batch_stride, k_head_stride;
  int64_t v_batch_stride, v_head_stride;
  int64_t out_batch_stride, out_head_stride;
  int64_t lse_batch_stride, lse_head_stride;
  int64_t bits_batch_stride, bits_head_stride, bits_row_stride;
  int64_t total_q, total_kv;
  int q_row_stride, k_row_stride, v_row_stride, out_row_stride;
  int rows_q, rows_kv;  // varlen: the longest
  int tiles_q, heads_kv, group;
  int heads_per_bits;        // query heads that share one row of bits
  bool two_tiles_per_block;  // block_kv is twice tile_kv
  bool causal;
  float scale_log2;  // |scale| * log2(e), never 0
  float score_sign;  // -1 if scale is negative: scores are negated before the softmax
};

}  // namespace seer
