// SPDX-License-Identifier: Apache-2.0
// What names a compiled attn_pool kernel, and the functions each generated source defines
// (block_sparse_attn/variant.h). Causality, the block sizes that are multiples of the tile, and the
// map's form and reduction are run-time arguments.
#pragma once

#include <cstdint>

#include "block_sparse_attn/variant.h"
#include "seer/attn_pool.h"
#include "seer/types.h"

namespace seer {

struct AttnPoolKey {
  int sm;
  DType dtype;
  int head_dim;
  int rows;
  int tile_kv;
  int threads;  // this and smem_bytes are asserted to be the kernel's own
  int smem_bytes;

  // The block_sparse_attn kernel that this one is made of.
  constexpr BlockSparseAttnKey attention() const {
    return {sm, dtype, head_dim, rows, tile_kv, threads, smem_bytes};
  }
};

// The part of the workspace in front of the strips: Hopper's tile counter, and alignment.
constexpr int64_t kAttnPoolStripsOffset = 256;
// A strip holds a value for every 64 columns.
constexpr int64_t attn_pool_strip_tiles(int64_t rows_kv) { return ceil_div(rows_kv, 64); }

// Whether the kernel wants the map zeroed. Else it writes all of it: rows of tokens are its own.
constexpr bool attn_pool_wants_zeros(const AttnPoolParams& params) {
  return !params.per_token || params.cu_seqlens_q != nullptr;
}

// Enqueues one kernel with params that were checked, pooled being zero if it wants that; returns the cudaError_t.
template <AttnPoolKey kKey>
int launch_attn_pool_variant(const AttnPoolParams& params, CUstream_st* stream);

// Rows that the kernel computes at a time on the whole (current) device: its strips.
template <AttnPoolKey kKey>
int attn_pool_rows_at_a_time(int64_t* rows);

}  // namespace seer
