// SPDX-License-Identifier: Apache-2.0
// Dense attention forward that also returns the block-pooled attention map
// (SeerAttention, Gao et al. 2024, section 3.2 and appendix A.1), exact in fp32.
//
//   P[r, c]      = exp(scale * q_r . k_c - lse_r) for visible c, 0 elsewhere
//   pooled[i, j] = max over rows r of query block i and columns c of KV block j of P[r, c]
//   per_token:     pooled[r, j] = max over columns c of KV block j of P[r, c]
#pragma once

#include <cstdint>

#include "seer/status.h"
#include "seer/types.h"

namespace seer {

struct AttnPoolParams {
  // Problem: as BlockSparseAttnParams.
  DType dtype = DType::kBFloat16;
  int batch = 0;
  int heads_q = 0;
  int heads_kv = 0;
  int head_dim = 0;
  int64_t rows_q = 0;
  int64_t rows_kv = 0;
  int64_t total_q = 0;
  int64_t total_kv = 0;
  int block_q = 64;
  int block_kv = 64;
  bool causal = true;
  bool per_token = false;
  float scale = 1.0f;
  // Inputs.
  ConstView q, k, v;
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_kv = nullptr;
  // Outputs. pooled is zero-filled by the caller and contiguous:
  //   2-D        [batch, heads_q, ceil(rows_q / block_q), ceil(rows_kv / block_kv)], also varlen
  //   per_token  [batch, heads_q, rows_q, blocks_kv], varlen [heads_q, total_q, blocks_kv]
  MutView out;
  float* lse = nullptr;
  int64_t lse_batch_stride = 0;
  int64_t lse_head_stride = 0;
  float* pooled = nullptr;
};

Status attn_pool_cpu(const AttnPoolParams& params, const ParallelFor& parallel_for);

}  // namespace seer
