// SPDX-License-Identifier: Apache-2.0
// attn_pool's attention is block_sparse_attn's without a mask.
#pragma once

#include "seer/attn_pool.h"
#include "seer/block_sparse_attn.h"

namespace seer {

inline BlockSparseAttnParams as_dense(const AttnPoolParams& params) {
  BlockSparseAttnParams dense;
  dense.dtype = params.dtype;
  dense.batch = params.batch;
  dense.heads_q = params.heads_q;
  dense.heads_kv = params.heads_kv;
  dense.head_dim = params.head_dim;
  dense.rows_q = params.rows_q;
  dense.rows_kv = params.rows_kv;
  dense.total_q = params.total_q;
  dense.total_kv = params.total_kv;
  dense.block_q = params.block_q;
  dense.block_kv = params.block_kv;
  dense.causal = params.causal;
  dense.scale = params.scale;
  dense.q = params.q;
  dense.k = params.k;
  dense.v = params.v;
  dense.cu_seqlens_q = params.cu_seqlens_q;
  dense.cu_seqlens_kv = params.cu_seqlens_kv;
  dense.out = params.out;
  dense.lse = params.lse;
  dense.lse_batch_stride = params.lse_batch_stride;
  dense.lse_head_stride = params.lse_head_stride;
  dense.arch = params.arch;
  dense.workspace = static_cast<int32_t*>(params.workspace);
  return dense;
}

}  // namespace seer
