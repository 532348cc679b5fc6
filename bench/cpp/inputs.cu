// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "inputs.h"

namespace seer::bench {
namespace {

// The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit.
__device__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Box and Muller's transform of two uniform numbers, the first above 0.
__device__ float normal_number(uint64_t bits) {
  const float radius = (float(bits >> 40) + 1.0f) * 0x1p-24f;
  const float angle = float(bits & 0xffffff) * 0x1p-24f;
  return sqrtf(-2.0f * logf(radius)) * cospif(2.0f * angle);
}

template <class Element>
__global__ void fill_kernel(Element* out, int64_t count, uint64_t seed, float spread) {
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += threads) {
    out[i] = Element(spread * normal_number(mix(mix(seed) + uint64_t(i))));
  }
}

}  // namespace

DeviceBuffer normal(DType dtype, int64_t count, uint64_t seed, float spread) {
  DeviceBuffer buffer(count * size_of(dtype));
  switch (dtype) {
    case DType::kBFloat16:
      fill_kernel<<<1024, 256>>>(buffer.as<__nv_bfloat16>(), count, seed, spread);
      break;
    case DType::kFloat16:
      fill_kernel<<<1024, 256>>>(buffer.as<__half>(), count, seed, spread);
      break;
    case DType::kFloat32:
      fill_kernel<<<1024, 256>>>(buffer.as<float>(), count, seed, spread);
      break;
  }
  check(cudaGetLastError(), "filling inputs");
  check(cudaDeviceSynchronize(), "filling inputs");
  return buffer;
}

}  // namespace seer::bench
