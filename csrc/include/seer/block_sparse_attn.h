// SPDX-License-Identifier: Apache-2.0
// Block-sparse attention forward (FlashAttention-2, Dao 2023, over the kept blocks only).
//
//   out[b, r, h] = softmax_c(scale * q[b, r, h] . k[b, c, u]) @ v[b, c, u],   u = h / group,
//   over the visible columns c: the block (r / block_q, c / block_kv) is kept, c < rows_kv of the
//   sequence, and, if causal, c <= r + rows_kv - rows_q.
//   lse[b, h, r] = natural log of the sum of exponentials.
//   A row that sees nothing: out 0, lse -inf.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "seer/status.h"
#include "seer/types.h"

// cudaStream_t without the toolkit's headers: a CPU-only build includes this file too.
struct CUstream_st;

namespace seer {

// Size of BlockSparseAttnParams::workspace.
constexpr int64_t kBlockSparseAttnWorkspaceBytes = 16;

struct BlockSparseAttnParams {
  // Problem. With cu_seqlens, rows_* are the longest lengths (max_rows_*), total_* the packed rows.
  DType dtype = DType::kBFloat16;
  int batch = 0;
  int heads_q = 0;
  int heads_kv = 0;
  int head_dim = 0;
  int64_t rows_q = 0;
  int64_t rows_kv = 0;
  int64_t total_q = 0;   // varlen only
  int64_t total_kv = 0;  // varlen only
  int block_q = 64;
  int block_kv = 64;
  bool causal = true;
  float scale = 1.0f;
  // Inputs.
  ConstView q, k, v;
  BlockBitsView block_bits;
  const int32_t* cu_seqlens_q = nullptr;   // [batch + 1], device of q; nullptr: not varlen
  const int32_t* cu_seqlens_kv = nullptr;  // [batch + 1]
  // Outputs. lse[b, h, r] lies at lse + b * lse_batch_stride + h * lse_head_stride + r
  // (varlen: lse + h * lse_head_stride + packed row).
  MutView out;
  float* lse = nullptr;
  int64_t lse_batch_stride = 0;
  int64_t lse_head_stride = 0;
  // Which kernel family serves the call: 0 the newest that can, else 80 (portable) or 90 (Hopper).
  int arch = 0;
  // kBlockSparseAttnWorkspaceBytes of device memory with any content, aligned to 4 bytes: the
  // launch's own until its kernel is done. Family 90 needs it, and it zeroes it on the stream.
  int32_t* workspace = nullptr;
};

// One compiled CUDA kernel: a row of csrc/variants.json.
struct BlockSparseAttnVariant {
  const char* name;  // e.g. "block_sparse_attn_sm80_bf16_d128_q64"
  int sm;            // kernel family. 80: mma.sync, runs on every GPU from compute capability 8.0
                     // on; 90: TMA and wgmma, runs on compute capability 9.0 alone
  DType dtype;
  int head_dim;
  int block_q;
  int tile_kv;  // KV rows of one step; block_kv is any multiple of it up to 128
  int threads;
  int smem_bytes;
};

// The variants compiled into this library (empty in a CPU-only build).
const std::vector<BlockSparseAttnVariant>& block_sparse_attn_variants();

// Index into the table of the variant that serves these params on a device of compute capability
// `sm` (e.g. 90), of the family params.arch if that is not 0; or -1 with a reason that names the
// nearest rows.
int find_block_sparse_attn_variant(const BlockSparseAttnParams& params, int sm,
                                   std::string* why_not);

// Enqueues the kernel on `stream` of the current device. No allocation, no synchronisation.
// Every element of out and lse that belongs to a row r < rows_q (varlen: of a sequence) is written.
Status launch_block_sparse_attn(const BlockSparseAttnParams& params, CUstream_st* stream);

// The CPU kernel: fp32 accumulation, memory O(threads * block).
Status block_sparse_attn_cpu(const BlockSparseAttnParams& params, const ParallelFor& parallel_for);

}  // namespace seer
