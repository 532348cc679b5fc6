// SPDX-License-Identifier: Apache-2.0
// The definitions of the operators, as slow and obvious fp32 kernels that share no code with those
// under test. What they compute is what docs/design.md section 5 says.
#pragma once

#include <cstdint>
#include <vector>

#include "device.h"
#include "seer/block_sparse_attn.h"
#include "seer/pool_gate.h"

namespace seer::bench {

// A query block of one head of one sequence: rows [first_row, first_row + rows).
struct QueryBlock {
  int batch, head;
  int64_t first_row, rows;
};

// Attention of some query blocks, their rows one behind the other.
struct AttentionRows {
  std::vector<float> out;  // [rows, head_dim]
  std::vector<float> lse;  // [rows]
  std::vector<float> map;  // [rows, blocks_kv], if asked for: the largest probability of each row
                           // within a KV block, or their sum
};
enum class MapOf { kNothing, kMax, kSum };

// Takes 4 * rows * rows_kv bytes of device memory for the probabilities.
AttentionRows reference_attention(const BlockSparseAttnParams& params,
                                  const std::vector<QueryBlock>& blocks, MapOf map);

// [batch, blocks, heads_out, gate_dim].
std::vector<float> reference_pool_gate(const PoolGateParams& params);

// [batch, heads_q, blocks_q, blocks_kv], -inf where hidden.
std::vector<float> reference_gate_scores(const GateScoresParams& params);

}  // namespace seer::bench
