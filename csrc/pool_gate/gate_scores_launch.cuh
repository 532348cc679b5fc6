// SPDX-License-Identifier: Apache-2.0
// Launcher of the gate_scores kernel; generated files instantiate it (variant.h).
#pragma once

#include <cuda_runtime.h>

#include "common/element_of.cuh"
#include "pool_gate/gate_scores_kernel.cuh"
#include "pool_gate/variant.h"

namespace seer {

template <GateKey kKey>
int launch_gate_scores_variant(const GateScoresParams& params, CUstream_st* stream) {
  using Element = ElementOf<kKey.dtype>;
  const auto kernel = params.cu_seqlens_q == nullptr ? &dev::gate_scores<Element, kKey.dim, false>
                                                     : &dev::gate_scores<Element, kKey.dim, true>;
  constexpr int kSmemBytes = dev::KeyStream<Element, kKey.dim, 1, dev::kScoreWarps>::kSmemBytes;
  const int64_t tiles = ceil_div(params.blocks_q, 16 * dev::kScoreWarps);
  const auto grid = static_cast<unsigned>(int64_t{params.batch} * params.heads_q * tiles);
  kernel<<<grid, 32 * dev::kScoreWarps, kSmemBytes, stream>>>(params);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace seer
