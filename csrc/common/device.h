// SPDX-License-Identifier: Apache-2.0
// The current device, as the choice of kernels needs it.
#pragma once

#include <cuda_runtime_api.h>

#include "common/cuda_status.h"

namespace seer {

// Compute capability of the current device, e.g. 90.
inline Status device_sm(int* sm) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  *sm = 10 * major + minor;
  return cuda_status(error, "asking for the device's compute capability");
}

// Multiprocessors of the current device.
inline Status device_multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  }
  return cuda_status(error, "asking for the device's multiprocessors");
}

}  // namespace seer
