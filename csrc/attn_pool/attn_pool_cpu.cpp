// SPDX-License-Identifier: Apache-2.0
// attn_pool on the CPU: the attention engine keeps each KV block's row maxima of the one pass, so
// the map costs no second product and is exact: exp(max - row maximum) / row sum.
#include "seer/attn_pool.h"

#include "common/cpu_attn.h"

namespace seer {

Status attn_pool_cpu(const AttnPoolParams& params, const ParallelFor& parallel_for) {
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
  return cpu::attention(dense, cpu::PooledMap{params.pooled, params.per_token}, parallel_for);
}

}  // namespace seer
