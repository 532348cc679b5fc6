// SPDX-License-Identifier: Apache-2.0
// The learned gate (AttnGate of SeerAttention, Gao et al. 2024, section 3.1), in three steps:
//   pool_gate    block pooling of q or k, per-head projection, RoPE at each block's first token
//   gate_scores  fp32 scores of every (query block, KV block) pair
//   gate_select  scores, causal rule, softmax and selection, straight to block bits
#pragma once

#include <cstdint>

#include "seer/status.h"
#include "seer/types.h"

namespace seer {

// Bits of PoolGateParams::pools. The pooled channels are concatenated in this order.
enum Pool : int { kPoolMax = 1, kPoolMin = 2, kPoolAvg = 4 };

struct PoolGateParams {
  // Problem. Without weight: heads_out == heads and gate_dim == number of pools * head_dim.
  DType dtype = DType::kBFloat16;
  int batch = 0;
  int heads = 0;
  int heads_out = 0;  // multiple of heads: output head h reads input head h / (heads_out / heads)
  int head_dim = 0;
  int gate_dim = 0;
  int64_t rows = 0;
  int block = 64;
  int pools = kPoolAvg;
  // Inputs.
  ConstView x;  // [batch, rows, heads, head_dim]
  const void* weight =
      nullptr;  // [heads_out, pools * head_dim, gate_dim] of x's dtype, contiguous; or nullptr
  const float* cos = nullptr;  // [batch|1, blocks, rotary_dim / 2] contiguous; both or neither
  const float* sin = nullptr;
  int rotary_dim = 0;             // channels [0, rotary_dim) rotate, halves paired (NeoX)
  int64_t rope_batch_stride = 0;  // 0 broadcasts
  // Output [batch, blocks, heads_out, gate_dim] of x's dtype, contiguous.
  void* out = nullptr;
};

struct GateScoresParams {
  DType dtype = DType::kBFloat16;
  int batch = 0;
  int heads_q = 0;
  int heads_k = 0;  // heads_q or a divisor of it
  int gate_dim = 0;
  int64_t blocks_q = 0;
  int64_t blocks_kv = 0;
  bool causal = true;  // block j is visible to block i iff j <= i + blocks_kv - blocks_q
  float scale = 1.0f;
  ConstView q_gate;  // [batch, blocks_q, heads_q, gate_dim]
  ConstView k_gate;  // [batch, blocks_kv, heads_k, gate_dim]
  float* scores =
      nullptr;  // [batch, heads_q, blocks_q, blocks_kv] contiguous; -inf where not visible
};

enum class SelectMethod : int { kThreshold = 0, kTopK = 1, kDensity = 2, kTopP = 3 };

struct GateSelectParams {
  GateScoresParams gate;  // gate.scores is not used
  SelectMethod method = SelectMethod::kThreshold;
  double value = 0.0;
  int64_t sink = 0;               // first blocks always kept
  int64_t local = 0;              // last visible blocks of each row always kept (1: the diagonal)
  int64_t dense_last_rows = 0;    // last query-block rows keep every visible block
  int32_t* block_bits = nullptr;  // [batch, heads_q, blocks_q, ceil(blocks_kv / 32)] contiguous
};

Status pool_gate_cpu(const PoolGateParams& params, const ParallelFor& parallel_for);
Status gate_scores_cpu(const GateScoresParams& params, const ParallelFor& parallel_for);
Status gate_select_cpu(const GateSelectParams& params, const ParallelFor& parallel_for);

}  // namespace seer
