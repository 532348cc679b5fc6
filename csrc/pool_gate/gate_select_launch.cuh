// SPDX-License-Identifier: Apache-2.0
// Launcher of the gate_select kernels; generated files instantiate it (variant.h).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "common/element_of.cuh"
#include "common/shared_memory_limit.cuh"
#include "pool_gate/gate_rank.cuh"
#include "pool_gate/gate_threshold.cuh"
#include "pool_gate/gate_threshold_short.cuh"
#include "pool_gate/variant.h"

namespace seer {

// Rows whose keys fit at once, a power of two. Up to kMaxRankedBlocks one row fits everywhere.
inline int rank_rows(const GateSelectParams& p, int smem_bytes) {
  const bool mass = p.method == SelectMethod::kTopP;
  int rows = dev::kRankRows;
  while (rows > 1 && dev::rank_smem_bytes(p.gate.blocks_kv, rows, mass) > smem_bytes) rows /= 2;
  return rows;
}

// Blocks that top-k or density keeps per row.
inline int kept_blocks(const GateSelectParams& p) {
  const double blocks_kv = static_cast<double>(p.gate.blocks_kv);
  if (p.method == SelectMethod::kTopK) return static_cast<int>(std::clamp(p.value, 0.0, blocks_kv));
  return std::max(1, static_cast<int>(std::floor((1.0 - std::sqrt(1.0 - p.value)) * blocks_kv)));
}

template <class Element, int kDim, int kMTiles, bool kPacked>
cudaError_t launch_threshold(const GateSelectParams& p, cudaStream_t stream) {
  constexpr auto kKernel = &dev::select_threshold<Element, kDim, kMTiles, kPacked>;
  constexpr int kSmemBytes = dev::threshold_smem_bytes<Element, kDim, kMTiles>();
  const int64_t tiles = ceil_div(p.gate.blocks_q, 16 * kMTiles * dev::kThresholdWarps);
  const auto grid = static_cast<unsigned>(int64_t{p.gate.batch} * p.gate.heads_q * tiles);
  kKernel<<<grid, 32 * dev::kThresholdWarps, kSmemBytes, stream>>>(p);
  return cudaGetLastError();
}

// Whether a CTA of select_threshold_short takes two tiles of rows: where a pair has a warp for each
// of its column tiles, and CTAs of one tile would be more than run at once.
inline bool pairs_short_tiles(const GateScoresParams& p) {
  constexpr int64_t kEnough = 256;
  const int64_t tiles = ceil_div(p.blocks_q, dev::kShortRows);
  if (!p.causal || p.cu_seqlens_q != nullptr) return false;
  if (tiles < 2 || tiles > 2 * dev::kClasses) return false;
  if (int64_t{p.batch} * p.heads_q * tiles <= kEnough) return false;
  const auto classes = [&](int64_t tile) {
    const int64_t end = std::min((tile + 1) * dev::kShortRows, p.blocks_q);
    const int64_t most = std::clamp<int64_t>(end + p.blocks_kv - p.blocks_q, 0, p.blocks_kv);
    return ceil_div(most, dev::kShortColumns);
  };
  for (int64_t tile = 0; 2 * tile + 1 < tiles; ++tile) {
    if (classes(tile) + classes(tiles - 1 - tile) > dev::kPairWarps) return false;
  }
  return true;
}

template <class Element, int kDim, bool kPacked, bool kPairs>
cudaError_t enqueue_threshold_short(const GateSelectParams& p, cudaStream_t stream) {
  constexpr auto kKernel = &dev::select_threshold_short<Element, kDim, kPacked, kPairs>;
  constexpr int kSmemBytes = dev::short_smem_bytes<kDim, kPairs>();
  if (cudaError_t error = allow_shared_memory<kKernel>(kSmemBytes); error != cudaSuccess) {
    return error;
  }
  const GateScoresParams& gate = p.gate;
  const dev::ShortGrid places = {dev::Divisor::of(gate.heads_q),
                                 dev::Divisor::of(gate.heads_q / gate.heads_k)};
  const int64_t tiles = ceil_div(gate.blocks_q, dev::kShortRows);
  const dim3 grid(static_cast<unsigned>(int64_t{gate.batch} * gate.heads_q),
                  static_cast<unsigned>(kPairs ? ceil_div(tiles, 2) : tiles));
  kKernel<<<grid, 32 * dev::kShortWarps<kPairs>, kSmemBytes, stream>>>(p, places);
  return cudaGetLastError();
}

template <class Element, int kDim>
cudaError_t launch_threshold_short(const GateSelectParams& p, cudaStream_t stream) {
  if (p.gate.cu_seqlens_q != nullptr) {
    return enqueue_threshold_short<Element, kDim, true, false>(p, stream);
  }
  return pairs_short_tiles(p.gate)
             ? enqueue_threshold_short<Element, kDim, false, true>(p, stream)
             : enqueue_threshold_short<Element, kDim, false, false>(p, stream);
}

template <class Element, int kDim, class Rule, bool kPacked>
cudaError_t launch_ranks(const GateSelectParams& p, cudaStream_t stream) {
  constexpr auto kKernel = &dev::select_ranks<Element, kDim, Rule, kPacked>;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  // The limit of the kernel, not of this call: it is raised once per device.
  if (error == cudaSuccess) error = allow_shared_memory<kKernel>(most);
  if (error != cudaSuccess) return error;
  const int rows = rank_rows(p, most);
  const auto smem_bytes = static_cast<size_t>(
      dev::rank_smem_bytes(p.gate.blocks_kv, rows, p.method == SelectMethod::kTopP));
  const int64_t tiles = ceil_div(p.gate.blocks_q, dev::kRankRows);
  const auto grid = static_cast<unsigned>(int64_t{p.gate.batch} * p.gate.heads_q * tiles);
  const int limit = p.method == SelectMethod::kTopP ? 0 : kept_blocks(p);
  kKernel<<<grid, 32 * dev::kRankWarps, smem_bytes, stream>>>(p, limit, rows);
  return cudaGetLastError();
}

template <class Element, int kDim, class Rule>
cudaError_t launch_ranks(const GateSelectParams& p, cudaStream_t stream) {
  return p.gate.cu_seqlens_q == nullptr ? launch_ranks<Element, kDim, Rule, false>(p, stream)
                                        : launch_ranks<Element, kDim, Rule, true>(p, stream);
}

template <GateKey kKey>
int launch_gate_select_variant(const GateSelectParams& p, CUstream_st* stream) {
  using Element = ElementOf<kKey.dtype>;
  switch (p.method) {
    case SelectMethod::kThreshold: {
      // A row's result is the same whichever kernel it is.
      const bool packed = p.gate.cu_seqlens_q != nullptr;
      constexpr int64_t kGridY = 65535;  // the most tiles of rows that the grid takes
      if (p.gate.blocks_kv <= dev::kShortBlocks && p.gate.blocks_q <= kGridY * dev::kShortRows) {
        return launch_threshold_short<Element, kKey.dim>(p, stream);
      }
      // With the sizes of a packed sequence besides, the wide kernel would not fit its registers.
      if (packed) return launch_threshold<Element, kKey.dim, 1, true>(p, stream);
      // Twice the rows per CTA halve the traffic of keys; worth it once the GPU is full.
      constexpr int64_t kEnough = 256;
      const int64_t wide = ceil_div(p.gate.blocks_q, 32 * dev::kThresholdWarps);
      return int64_t{p.gate.batch} * p.gate.heads_q * wide >= kEnough
                 ? launch_threshold<Element, kKey.dim, 2, false>(p, stream)
                 : launch_threshold<Element, kKey.dim, 1, false>(p, stream);
    }
    case SelectMethod::kTopK:
    case SelectMethod::kDensity: return launch_ranks<Element, kKey.dim, dev::CountRule>(p, stream);
    case SelectMethod::kTopP: return launch_ranks<Element, kKey.dim, dev::MassRule>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace seer
