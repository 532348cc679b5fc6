// SPDX-License-Identifier: Apache-2.0
// Dense attention forward that also returns the block-pooled attention map
// (SeerAttention, Gao et al. 2024, section 3.2 and appendix A.1).
//
//   P[r, c] = exp(scale * q_r . k_c - lse_r) for visible c, 0 elsewhere
//
//                max, per_token    pooled[r, j] = max over columns c of KV block j of P[r, c]
//                max               pooled[i, j] = max over rows r of query block i of the same
//                sum, per_token    pooled[r, j] = sum over columns c of KV block j of P[r, c]
//                sum               pooled[i, j] = mean over rows r of query block i of the same
//
// A query block's rows are those that exist: the mean of a ragged last block divides by their
// number. Rows that see nothing exist too, and count as zeros.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "seer/status.h"
#include "seer/types.h"

struct CUstream_st;

namespace seer {

enum class PoolReduce : int { kMax = 0, kSum = 1 };

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
  PoolReduce reduce = PoolReduce::kMax;
  float scale = 1.0f;
  // Inputs.
  ConstView q, k, v;
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_kv = nullptr;
  // Outputs. pooled is contiguous; CPU kernels want it zero-filled, CUDA launches zero it.
  //   2-D        [batch, heads_q, ceil(rows_q / block_q), ceil(rows_kv / block_kv)], also varlen
  //   per_token  [batch, heads_q, rows_q, blocks_kv], varlen [heads_q, total_q, blocks_kv]
  MutView out;
  float* lse = nullptr;
  int64_t lse_batch_stride = 0;
  int64_t lse_head_stride = 0;
  float* pooled = nullptr;
  // CUDA: as in BlockSparseAttnParams, but for the workspace: attn_pool_workspace() bytes of device
  // memory with any content, aligned to 256 bytes, the launch's own until its kernel is done.
  int arch = 0;
  void* workspace = nullptr;
};

// One compiled CUDA kernel: a row of csrc/variants.json.
struct AttnPoolVariant {
  const char* name;  // e.g. "attn_pool_sm90_bf16_d128"
  int sm;            // as BlockSparseAttnVariant
  DType dtype;
  int head_dim;
  int rows;     // query rows that a thread block (of family 90: a consumer) works on; block_q is a
                // multiple of it up to 128
  int tile_kv;  // KV rows of one step; block_kv is a multiple of it up to 128
  int threads;
  int smem_bytes;
};

// The variants compiled into this library (empty in a CPU-only build).
const std::vector<AttnPoolVariant>& attn_pool_variants();

// As find_block_sparse_attn_variant.
int find_attn_pool_variant(const AttnPoolParams& params, int sm, std::string* why_not);

// Elements of `pooled`; 0 for blocks without tokens, which launches refuse.
int64_t attn_pool_map_elements(const AttnPoolParams& params);

// Size of AttnPoolParams::workspace on the current device: for each row that is being computed
// somewhere on the device, 4 bytes for every 64 columns of the longest sequence. Independent of
// rows_q, heads and batch: 52 MB at 32768 columns and head_dim 128 on 132
// processors of compute capability 9.0.
Status attn_pool_workspace(const AttnPoolParams& params, int64_t* bytes);

// Enqueues the kernel on `stream` of the current device, behind a memset of `pooled` where it does
// not write all of it. No allocation, no synchronisation.
Status launch_attn_pool(const AttnPoolParams& params, CUstream_st* stream);

// The CPU kernel.
Status attn_pool_cpu(const AttnPoolParams& params, const ParallelFor& parallel_for);

}  // namespace seer
