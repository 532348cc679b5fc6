// SPDX-License-Identifier: Apache-2.0
// Launcher of the Hopper attn_pool kernel; generated files instantiate it (attn_pool/variant.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "attn_pool/dense.h"
#include "attn_pool/launch_params.h"
#include "attn_pool/sm90_row_map.cuh"
#include "block_sparse_attn/sm90_launch.cuh"

namespace seer {

template <class Traits>
cudaError_t launch_sm90_pool(const AttnPoolParams& params, cudaStream_t stream) {
  Sm90Device device;
  cudaError_t error = Sm90Device::current(&device);
  if (error != cudaSuccess) return error;
  Sm90PoolParams p;
  error = to_sm90_params<Traits>(as_dense(params), device.cache_bytes, &p);
  if (error != cudaSuccess) return error;
  p.map = row_map_params(params);
  return enqueue_sm90<Traits>(p, device.processors, stream);
}

template <AttnPoolKey kKey>
int launch_attn_pool_variant(const AttnPoolParams& params, CUstream_st* stream) {
  using Traits = Sm90PoolTraits<kKey, false>;
  static_assert(kKey.threads == Traits::kThreads, "variants.json: threads is not the kernel's");
  static_assert(kKey.smem_bytes == Traits::kSmemBytes,
                "variants.json: smem_bytes is not the kernel's");
  const bool sum = params.reduce == PoolReduce::kSum;
  return static_cast<int>(sum ? launch_sm90_pool<Sm90PoolTraits<kKey, true>>(params, stream)
                              : launch_sm90_pool<Traits>(params, stream));
}

template <AttnPoolKey kKey>
int attn_pool_rows_at_a_time(int64_t* rows) {
  using Traits = Sm90PoolTraits<kKey, false>;
  Sm90Device device;
  const cudaError_t error = Sm90Device::current(&device);
  *rows = int64_t{device.processors} * Traits::kConsumers * Traits::kRows;
  return static_cast<int>(error);
}

}  // namespace seer
