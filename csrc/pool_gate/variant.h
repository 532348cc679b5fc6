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
  // The order of the CTAs: `lead` of the first problem, then `turns` times one of it and `per_turn`
  // of the second, then the others of the first, which has `first_ctas`, then those of the second.
  uint32_t first_ctas, lead, turns, per_turn;
};

struct PoolPlace {
  int problem;
  uint32_t cta;  // of the problem
};
constexpr PoolPlace pool_place(const PoolGateLaunch& launch, uint32_t cta) {
  if (cta < launch.lead) return {0, cta};
  cta -= launch.lead;
  const uint32_t in_turn = 1 + launch.per_turn, in_turns = launch.turns * in_turn;
  if (cta < in_turns) {
    const uint32_t turn = cta / in_turn, place = cta % in_turn;
    if (place == 0) return {0, launch.lead + turn};
    return {1, turn * launch.per_turn + place - 1};
  }
  cta -= in_turns;
  const uint32_t started = launch.lead + launch.turns, left = launch.first_ctas - started;
  if (cta < left) return {0, started + cta};
  return {1, launch.turns * launch.per_turn + cta - left};
}

// What the host has to know of the kernels' tiles.
constexpr int kPoolWarps = 8;
constexpr int kWeightedBlocks = 32;  // most blocks per CTA with weight: two m-tiles
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
