// SPDX-License-Identifier: Apache-2.0
// What the two families' launchers have in common.
#pragma once

#include <cuda_runtime_api.h>

#include "attn_pool/row_map.cuh"
#include "attn_pool/variant.h"

namespace seer {

inline RowMapParams row_map_params(const AttnPoolParams& params) {
  RowMapParams map;
  map.strips =
      reinterpret_cast<float*>(static_cast<char*>(params.workspace) + kAttnPoolStripsOffset);
  map.map = params.pooled;
  map.strip_tiles = static_cast<int>(attn_pool_strip_tiles(params.rows_kv));
  map.block_q = params.block_q;
  map.map_cols = ceil_div(params.rows_kv, params.block_kv);
  map.packed = params.cu_seqlens_q != nullptr;
  map.map_rows = !params.per_token ? ceil_div(params.rows_q, params.block_q)
                 : map.packed      ? params.total_q
                                   : params.rows_q;
  map.heads_q = params.heads_q;
  map.wide_kv = params.block_kv == 128;
  map.per_token = params.per_token;
  map.sum = params.reduce == PoolReduce::kSum;
  map.zeroed = attn_pool_wants_zeros(params);
  return map;
}

}  // namespace seer
