// SPDX-License-Identifier: Apache-2.0
// Memory that the host and, where there is one, the GPU see. The examples never free it.
#pragma once

#include <cstdint>
#include <cstdlib>

#if SEER_HAVE_CUDA
#include <cuda_runtime_api.h>

inline bool gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
inline bool wait() { return !gpu() || cudaDeviceSynchronize() == cudaSuccess; }
inline void* allocate(int64_t bytes) {
  void* data = nullptr;
  if (!gpu()) return std::malloc(bytes);
  return cudaMallocManaged(&data, bytes) == cudaSuccess ? data : nullptr;
}
#else  // a build without CUDA kernels
inline bool gpu() { return false; }
inline bool wait() { return true; }
inline void* allocate(int64_t bytes) { return std::malloc(bytes); }
#endif
