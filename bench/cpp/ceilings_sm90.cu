// SPDX-License-Identifier: Apache-2.0
// The wgmma loop: compiled for compute capability 9.0 alone.
#include "ceilings.h"
#include "common/wgmma.cuh"
#include "random_tile.cuh"

namespace seer::bench {
namespace {

constexpr int kWarpgroups = 3, kSteps = 512;
constexpr int kRepeats = 4;  // of the tile before a wait; meanwhile the other warpgroups go on
constexpr int kRows = 64, kColumns = 128;  // B: rows of the reduction x columns
constexpr int kPanelBytes = kRows * 128;   // 64 columns
constexpr int kTileBytes = kPanelBytes * kColumns / 64;

__global__ void __launch_bounds__(128 * kWarpgroups) wgmma_loop_kernel(float* sink) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ alignas(1024) uint32_t tile[kWarpgroups][kTileBytes / 4];
  uint32_t seed = blockIdx.x * blockDim.x + threadIdx.x;
  uint32_t* mine = tile[threadIdx.x / 128];
  for (int i = threadIdx.x % 128; i < kTileBytes / 4; i += 128) mine[i] = random_pair(&seed);
  uint32_t a[kRows / 16][4];
  for (auto& step : a) {
    for (uint32_t& pair : step) pair = random_pair(&seed);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();

  const uint64_t b = dev::smem_descriptor(dev::down_rows(kPanelBytes),
                                          static_cast<uint32_t>(__cvta_generic_to_shared(mine)));
  float c[kColumns / 2] = {};
  for (int step = 0; step < kSteps; ++step) {
    dev::pin(c);
    cute::warpgroup_arrive();
#pragma unroll
    for (int n = 0; n < kRepeats * kRows / 16; ++n) {
      const int k = n % (kRows / 16);
      // 16 rows of 128 bytes further; descriptors count 16 bytes.
      dev::wgmma_values<__nv_bfloat16>(c, a[k], b + k * (16 * 128 / 16));
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
  }
  dev::pin(c);
  float sum = 0.0f;
  for (const float value : c) sum += value;
  if (sum == kNeverASum) *sink = sum;
#endif
}

}  // namespace

double launch_wgmma_loop(int multiprocessors, float* sink, cudaStream_t stream) {
  wgmma_loop_kernel<<<multiprocessors, 128 * kWarpgroups, 0, stream>>>(sink);
  check(cudaGetLastError(), "launching the matrix loop");
  return 2.0 * 64 * kColumns * kRows * kRepeats * kSteps * kWarpgroups * multiprocessors;
}

}  // namespace seer::bench
