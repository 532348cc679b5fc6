// SPDX-License-Identifier: Apache-2.0
// What names a compiled kernel of pool_gate, gate_scores or gate_select, and the functions that the
// generated sources define. csrc/variants.json is the one list of kernels (docs/design.md).
#pragma once

#include <cstdint>

#include "common/variant_key.h"
#include "seer/pool_gate.h"

namespace seer {

struct GateKey {
  int sm;
  DType dtype;
  int dim;  // pool_gate: head_dim; gate_scores and gate_select: gate_dim
};

// One launch embeds one tensor or two.
constexpr int kMaxPoolProblems = 2;
struct PoolGateLaunch {
  PoolGateParams problems[kMaxPoolProblems];
  int tile_blocks[kMaxPoolProblems];  // blocks per CTA
  uint32_t first_cta[kMaxPoolProblems + 1];
};

// What the host has to know of the kernels' tiles.
constexpr int kPoolWarps = 8;
constexpr int kWeightedBlocks = 32;  // blocks per CTA with weight: two m-tiles
constexpr int kPlainBlocks = 16;     // without
constexpr int kUnit = 32;            // columns of a warp's share of the projection

// Pooled rows in shared memory, padded by one 16-byte chunk: ldmatrix without bank conflicts.
constexpr int pooled_row_bytes(int channels) { return 2 * channels + 16; }

// Enqueue one kernel with checked params; return the cudaError_t.
template <GateKey kKey>
int launch_pool_gate_variant(const PoolGateLaunch& launch, int grid, int smem_bytes,
                             CUstream_st* stream);
template <GateKey kKey>
int launch_gate_scores_variant(const GateScoresParams& params, CUstream_st* stream);
template <GateKey kKey>
int launch_gate_select_variant(const GateSelectParams& params, CUstream_st* stream);

}  // namespace seer
