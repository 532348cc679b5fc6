// SPDX-License-Identifier: Apache-2.0
// Launcher of the sm80 block-sparse attention kernel; generated files instantiate it (variant.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block_sparse_attn/score_scale.h"
#include "block_sparse_attn/sm80_kernel.cuh"
#include "block_sparse_attn/variant.h"
#include "common/shared_memory_limit.cuh"

namespace seer {

inline Sm80Params to_sm80_params(const BlockSparseAttnParams& params) {
  Sm80Params p{};
  p.q = static_cast<const uint16_t*>(params.q.data);
  p.k = static_cast<const uint16_t*>(params.k.data);
  p.v = static_cast<const uint16_t*>(params.v.data);
  p.out = static_cast<uint16_t*>(params.out.data);
  p.lse = params.lse;
  p.bits = reinterpret_cast<const uint32_t*>(params.block_bits.data);
  p.cu_seqlens_q = params.cu_seqlens_q;
  p.cu_seqlens_kv = params.cu_seqlens_kv;
  const bool varlen = params.cu_seqlens_q != nullptr;
  p.q_batch_stride = varlen ? 0 : params.q.batch_stride;
  p.q_row_stride = static_cast<int>(params.q.row_stride);
  p.q_head_stride = params.q.head_stride;
  p.k_batch_stride = varlen ? 0 : params.k.batch_stride;
  p.k_row_stride = static_cast<int>(params.k.row_stride);
  p.k_head_stride = params.k.head_stride;
  p.v_batch_stride = varlen ? 0 : params.v.batch_stride;
  p.v_row_stride = static_cast<int>(params.v.row_stride);
  p.v_head_stride = params.v.head_stride;
  p.out_batch_stride = varlen ? 0 : params.out.batch_stride;
  p.out_row_stride = static_cast<int>(params.out.row_stride);
  p.out_head_stride = params.out.head_stride;
  p.lse_batch_stride = varlen ? 0 : params.lse_batch_stride;
  p.lse_head_stride = params.lse_head_stride;
  p.bits_batch_stride = params.block_bits.batch_stride;
  p.bits_head_stride = params.block_bits.head_stride;
  p.bits_row_stride = params.block_bits.row_stride;
  p.total_q = params.total_q;
  p.total_kv = params.total_kv;
  p.rows_q = static_cast<int>(params.rows_q);
  p.rows_kv = static_cast<int>(params.rows_kv);
  p.tiles_q = static_cast<int>(ceil_div(params.rows_q, params.block_q));
  p.heads_kv = params.heads_kv;
  p.group = params.heads_q / params.heads_kv;
  // Without a mask its fields may hold anything.
  p.heads_per_bits = p.bits == nullptr ? params.heads_q : params.heads_q / params.block_bits.heads;
  p.two_tiles_per_block = params.block_kv == 128;
  p.causal = params.causal;
  const ScoreScale scale = score_scale(params.scale);
  p.scale_log2 = scale.log2;
  p.score_sign = scale.sign;
  return p;
}

template <class Traits>
cudaError_t launch_sm80(const BlockSparseAttnParams& params, cudaStream_t stream) {
  constexpr auto kKernel = &dev::block_sparse_attn_sm80<Traits>;
  if (cudaError_t error = allow_shared_memory<kKernel>(Traits::kSmemBytes); error != cudaSuccess) {
    return error;
  }
  const Sm80Params p = to_sm80_params(params);
  const auto grid = static_cast<unsigned>(int64_t{params.batch} * params.heads_q * p.tiles_q);
  kKernel<<<grid, Traits::kThreads, Traits::kSmemBytes, stream>>>(p);
  return cudaGetLastError();
}

template <BlockSparseAttnKey kKey>
int launch_variant(const BlockSparseAttnParams& params, CUstream_st* stream) {
  using Traits = Sm80Traits<kKey>;
  static_assert(kKey.threads == Traits::kThreads, "variants.json: threads is not the kernel's");
  static_assert(kKey.smem_bytes == Traits::kSmemBytes,
                "variants.json: smem_bytes is not the kernel's");
  return static_cast<int>(launch_sm80<Traits>(params, stream));
}

}  // namespace seer
