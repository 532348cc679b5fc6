// SPDX-License-Identifier: Apache-2.0
#include "seer/block_sparse_attn.h"

#include "common/cpu_attn.h"

namespace seer {

Status block_sparse_attn_cpu(const BlockSparseAttnParams& params, const ParallelFor& parallel_for) {
  return cpu::attention(params, cpu::PooledMap{}, parallel_for);
}

}  // namespace seer
