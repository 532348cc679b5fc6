// SPDX-License-Identifier: Apache-2.0
// Launcher of the pool_gate kernel; generated files instantiate it (variant.h).
#pragma once

#include <cuda_runtime.h>

#include "common/element_of.cuh"
#include "pool_gate/pool_gate_kernel.cuh"
#include "pool_gate/variant.h"

namespace seer {

template <GateKey kKey>
int launch_pool_gate_variant(const PoolGateLaunch& launch, int grid, int smem_bytes,
                             CUstream_st* stream) {
  constexpr auto kKernel = &dev::pool_gate<ElementOf<kKey.dtype>, kKey.dim>;
  kKernel<<<static_cast<unsigned>(grid), dev::kPoolThreads, smem_bytes, stream>>>(launch);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace seer
