// SPDX-License-Identifier: Apache-2.0
// The attention engine behind block_sparse_attn_cpu and attn_pool_cpu.
#pragma once

#include "common/cpu_kernels.h"
#include "seer/block_sparse_attn.h"
#include "seer/status.h"
#include "seer/types.h"

namespace seer::cpu {

// The block-pooled attention map that attn_pool asks for; layout as in seer/attn_pool.h.
struct PooledMap {
  float* data = nullptr;  // nullptr: no map
  bool per_token = false;
  bool sum = false;  // of a block's probabilities; else their maximum
};

// Checks the problem, cu_seqlens contents included, then runs it. With a map, params.block_bits
// must be empty: its rows are those of dense attention.
Status attention(const BlockSparseAttnParams& params, const PooledMap& pooled,
                 const ParallelFor& parallel_for, Isa isa = best_isa());

}  // namespace seer::cpu
