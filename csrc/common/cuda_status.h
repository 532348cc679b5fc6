// SPDX-License-Identifier: Apache-2.0
// CUDA errors as Status values.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "seer/status.h"

namespace seer {

inline Status cuda_status(cudaError_t error, const std::string& doing) {
  if (error == cudaSuccess) return {};
  return Status::cuda("CUDA: expected success of " + doing + ", got " + cudaGetErrorName(error) +
                      " (" + cudaGetErrorString(error) + ").");
}

// The result of the launch just made, in words that name the kernel and its resources.
inline Status check_launch(const std::string& kernel, int64_t grid, int smem_bytes,
                           cudaError_t error = cudaGetLastError()) {
  return cuda_status(error, "launching " + kernel + " (grid " + std::to_string(grid) +
                                ", shared memory " + std::to_string(smem_bytes) + " bytes)");
}

}  // namespace seer
