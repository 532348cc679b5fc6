// SPDX-License-Identifier: Apache-2.0
// Block masks of the cases, and the work that the cases ask for. Host code: the same with and
// without a GPU, by the rules of bench/masks.py and bench/gate.py.
#pragma once

#include <cstdint>
#include <vector>

#include "cases.h"

namespace seer::bench {

// Block bits [batch, heads, blocks_q, words]; empty: every block is kept.
struct HostMask {
  int heads = 0, words = 0;
  int64_t blocks_q = 0;
  std::vector<int32_t> bits;

  bool dense() const { return bits.empty(); }
  const int32_t* row(int batch, int head, int64_t i) const {
    return bits.data() + ((int64_t{batch} * heads + head) * blocks_q + i) * words;
  }
};

// KV blocks that query block i can see at all.
int64_t visible_blocks(const Case& c, int64_t i);

// Every row keeps round(density * visible) blocks, at least one: the last visible one and
//   random      a uniform choice, for each query head its own (kv_head: for each KV head)
//   structured  first the four blocks up to the diagonal, then block 0, then random columns that
//               eight neighbouring query blocks of a head have in common
HostMask make_mask(const Case& c, uint64_t seed);

// Share of the visible blocks that is kept.
double kept_share(const Case& c, const HostMask& mask);

// Work counts what is asked for, not what a kernel does about it. `bytes`: inputs, weights, masks and
// results, each once.
struct Work {
  double flop = 0.0, bytes = 0.0;
};

//   attention        4 * head_dim * block_q * block_kv FLOP for each kept visible block and query
//                    head, half of it for a block that the causal diagonal crosses
//   pool_gate, pair  2 FLOP for each weight and block of the projections
//   gate_scores, gate_select  2 * head_dim FLOP for each visible score
// Softmax, pooling and selection are not counted.
Work work_of(const Case& c, const HostMask& mask);

}  // namespace seer::bench
