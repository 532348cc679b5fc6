// SPDX-License-Identifier: Apache-2.0
// The learned gate (AttnGate of SeerAttention, Gao et al. 2024, section 3.1), in three steps:
//   pool_gate    block pooling of q or k, per-head projection, RoPE at each block's first token
//   gate_scores  fp32 scores of every (query block, KV block) pair
//   gate_select  scores, causal rule, softmax and selection, straight to block bits
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "seer/status.h"
#include "seer/types.h"

struct CUstream_st;  // cudaStream_t

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
  int64_t rows = 0;   // packed sequences: the longest
  int64_t total = 0;  // packed rows, with cu_seqlens only
  int block = 64;
  int pools = kPoolAvg;
  // Inputs.
  ConstView x;  // [batch, rows, heads, head_dim], or packed [total, heads, head_dim]
  // [batch + 1]: blocks count from each sequence's own start. Null: not packed.
  const int32_t* cu_seqlens = nullptr;
  const void* weight =
      nullptr;  // [heads_out, pools * head_dim, gate_dim] of x's dtype, contiguous; or nullptr
  const float* cos = nullptr;  // [batch|1, blocks, rotary_dim / 2] contiguous; both or neither
  const float* sin = nullptr;
  int rotary_dim = 0;             // channels [0, rotary_dim) rotate, halves paired (NeoX)
  int64_t rope_batch_stride = 0;  // 0 broadcasts
  // Output [batch, blocks, heads_out, gate_dim] of x's dtype, contiguous; 0 past the end of a
  // sequence that is shorter than `rows`.
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
  // Packed sequences: [batch + 1] tokens; sequence n has ceil(length / block) blocks, at most
  // blocks_q and blocks_kv, and the rule counts its own. Nothing past them is visible. Both or null.
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_kv = nullptr;
  int block_q = 64;
  int block_kv = 64;
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

// One compiled CUDA kernel: a row of csrc/variants.json. It serves every block size.
struct GateVariant {
  const char* name;  // e.g. "pool_gate_sm80_bf16_d128"
  int sm;            // 80: runs on every GPU from compute capability 8.0 on
  DType dtype;
  int dim;  // pool_gate: head_dim; gate_scores and gate_select: gate_dim
};

// The variants compiled into this library (empty in a CPU-only build).
const std::vector<GateVariant>& pool_gate_variants();
const std::vector<GateVariant>& gate_scores_variants();
const std::vector<GateVariant>& gate_select_variants();

// Index into the table of the variant that serves these params on a device of compute capability
// `sm` (e.g. 90); or -1 with a reason. Kernels take the two 16-bit types, gate_dim 64 and 128, and
// rows that start at multiples of 16 bytes.
int find_pool_gate_variant(const PoolGateParams& params, int sm, std::string* why_not);
int find_gate_scores_variant(const GateScoresParams& params, int sm, std::string* why_not);
int find_gate_select_variant(const GateSelectParams& params, int sm, std::string* why_not);

// Whether a variant serves the call on the current device, at most two problems of pool_gate in one
// launch. Other failures count as served: the launch reports them.
bool pool_gate_served(const PoolGateParams* problems, int count);
bool gate_scores_served(const GateScoresParams& params);
bool gate_select_served(const GateSelectParams& params);

// Enqueue the kernel on `stream` of the current device: no allocation, no synchronisation. What no
// variant serves is refused with Code::kUnsupported. Every element of the output is written.
//
// pool_gate embeds `count` (1 or 2) tensors of one dtype and head_dim, q and k say, in one launch.
Status launch_pool_gate(const PoolGateParams* problems, int count, CUstream_st* stream);
Status launch_gate_scores(const GateScoresParams& params, CUstream_st* stream);
Status launch_gate_select(const GateSelectParams& params, CUstream_st* stream);

Status pool_gate_cpu(const PoolGateParams& params, const ParallelFor& parallel_for);
Status gate_scores_cpu(const GateScoresParams& params, const ParallelFor& parallel_for);
Status gate_select_cpu(const GateSelectParams& params, const ParallelFor& parallel_for);

}  // namespace seer
