// SPDX-License-Identifier: Apache-2.0
#include "device.h"

namespace seer::bench {
namespace {

std::string version_text(int version) {  // 13000 is 13.0
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

Device open_device(int index) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    throw CudaError(std::string("no CUDA device: ") +
                    (error == cudaSuccess ? "none is visible" : cudaGetErrorString(error)) +
                    ". Timing needs a GPU; --plan, --list and --help do not.");
  }
  if (index >= count) {
    throw CudaError("--device: expected one of " + std::to_string(count) + " devices, got " +
                    std::to_string(index) + ". Count from 0.");
  }
  check(cudaSetDevice(index), "choosing the device");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "asking for the device's properties");
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "asking for the driver's version");
  check(cudaRuntimeGetVersion(&runtime), "asking for the runtime's version");
  return {index,
          10 * properties.major + properties.minor,
          properties.multiProcessorCount,
          properties.name,
          version_text(driver),
          version_text(runtime)};
}

}  // namespace seer::bench
