// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ceilings.h"
#include "common/mma_sm80.cuh"
#include "inputs.h"
#include "random_tile.cuh"

namespace seer::bench {
namespace {

constexpr int kWarps = 8, kTiles = 8, kSteps = 4096;

__global__ void __launch_bounds__(32 * kWarps) mma_loop_kernel(float* sink) {
  uint32_t a[4], b[kTiles][2];
  float c[kTiles][4] = {};
  uint32_t seed = blockIdx.x * blockDim.x + threadIdx.x;
  for (uint32_t& pair : a) pair = random_pair(&seed);
  for (auto& tile : b) {
    for (uint32_t& pair : tile) pair = random_pair(&seed);
  }
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      dev::mma_16x8x16<__nv_bfloat16>(c[n], a, b[n][0], b[n][1]);
    }
  }
  float sum = 0.0f;
  for (const auto& tile : c) sum += tile[0] + tile[1] + tile[2] + tile[3];
  if (sum == kNeverASum) *sink = sum;
}

double copy_gbps(Timer* timer) {
  size_t free_bytes = 0, all = 0;
  check(cudaMemGetInfo(&free_bytes, &all), "asking for free memory");
  const auto bytes = static_cast<int64_t>(std::min<size_t>(size_t{1} << 30, free_bytes / 8));
  const DeviceBuffer from = normal(DType::kBFloat16, bytes / 2, 1), to(bytes);
  const auto copy = [&](cudaStream_t stream) {
    check(cudaMemcpyAsync(to.as<>(), from.as<>(), bytes, cudaMemcpyDeviceToDevice, stream),
          "copying");
  };
  return 2e-6 * double(bytes) / timer->time(copy, Protocol::kSustained, L2::kHot).median;
}

}  // namespace

double launch_mma_loop(int multiprocessors, float* sink, cudaStream_t stream) {
  const int blocks = 2 * multiprocessors;
  mma_loop_kernel<<<blocks, 32 * kWarps, 0, stream>>>(sink);
  check(cudaGetLastError(), "launching the matrix loop");
  return 2.0 * 16 * 8 * 16 * kTiles * kSteps * kWarps * blocks;
}

Ceilings measure_ceilings(Timer* timer, const Device& device) {
  Ceilings ceilings;
  ceilings.gbps = copy_gbps(timer);
  const DeviceBuffer sink(sizeof(float));
  auto* launch_loop = &launch_mma_loop;
  ceilings.product = "mma 16x8x16 in registers";
#ifdef SEER_BENCH_SM90
  if (device.sm == 90) {
    launch_loop = &launch_wgmma_loop;
    ceilings.product = "wgmma 64x128x16 from shared memory";
  }
#endif
  double flop = 0.0;
  const auto launch = [&](cudaStream_t stream) {
    flop = launch_loop(device.multiprocessors, sink.as<float>(), stream);
  };
  const Timing timing = timer->time(launch, Protocol::kSustained, L2::kHot);
  ceilings.tflops = 1e-9 * flop / timing.median;
  return ceilings;
}

}  // namespace seer::bench
