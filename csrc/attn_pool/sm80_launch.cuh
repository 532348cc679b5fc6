// SPDX-License-Identifier: Apache-2.0
// Launcher of the portable attn_pool kernel; generated files instantiate it (attn_pool/variant.h).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "attn_pool/dense.h"
#include "attn_pool/launch_params.h"
#include "attn_pool/sm80_row_map.cuh"
#include "block_sparse_attn/sm80_launch.cuh"

namespace seer {

// CTAs that work at a time: those that fit on the device. Asked once per device.
template <class Traits>
cudaError_t sm80_pool_ctas(int64_t* ctas) {
  constexpr auto kKernel = &dev::block_sparse_attn_sm80<Traits>;
  constexpr int kDevices = 64;
  static std::atomic<int64_t> known[kDevices];  // 0: not asked yet
  int device = 0, processors = 0, fitting = 0;
  cudaError_t error = cudaGetDevice(&device);
  *ctas = error == cudaSuccess && device < kDevices ? known[device].load() : 0;
  if (*ctas != 0) return error;
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) error = allow_shared_memory<kKernel>(Traits::kSmemBytes);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, kKernel, Traits::kThreads,
                                                          Traits::kSmemBytes);
  }
  *ctas = int64_t{processors} * std::clamp(fitting, 1, Traits::kMinCtas);
  if (error == cudaSuccess && device < kDevices) known[device].store(*ctas);
  return error;
}

template <class Traits>
cudaError_t launch_sm80_pool(const AttnPoolParams& params, cudaStream_t stream) {
  int64_t ctas = 0;
  cudaError_t error = sm80_pool_ctas<Traits>(&ctas);
  if (error != cudaSuccess) return error;
  BlockSparseAttnParams dense = as_dense(params);
  dense.block_q = Traits::kTileQ;  // what a CTA computes, whatever the map's blocks
  Sm80PoolParams p;
  static_cast<Sm80Params&>(p) = to_sm80_params(dense);
  p.map = row_map_params(params);
  p.tiles = static_cast<unsigned>(int64_t{params.batch} * params.heads_q * p.tiles_q);
  const auto grid = static_cast<unsigned>(std::min<int64_t>(ctas, p.tiles));
  dev::block_sparse_attn_sm80<Traits><<<grid, Traits::kThreads, Traits::kSmemBytes, stream>>>(p);
  return cudaGetLastError();
}

template <AttnPoolKey kKey>
int launch_attn_pool_variant(const AttnPoolParams& params, CUstream_st* stream) {
  using Traits = Sm80PoolTraits<kKey>;
  static_assert(kKey.threads == Traits::kThreads, "variants.json: threads is not the kernel's");
  static_assert(kKey.smem_bytes == Traits::kSmemBytes,
                "variants.json: smem_bytes is not the kernel's");
  return static_cast<int>(launch_sm80_pool<Traits>(params, stream));
}

template <AttnPoolKey kKey>
int attn_pool_rows_at_a_time(int64_t* rows) {
  int64_t ctas = 0;
  const cudaError_t error = sm80_pool_ctas<Sm80PoolTraits<kKey>>(&ctas);
  *rows = ctas * kKey.rows;
  return static_cast<int>(error);
}

}  // namespace seer
