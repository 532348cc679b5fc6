// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most, measured before the cases are and by the same protocol
// (sustained: a power-bound GPU has no other peak worth the name).
#pragma once

#include <string>

#include "device.h"
#include "timing.h"

namespace seer::bench {

struct Ceilings {
  double tflops = 0.0;  // 0: not measured
  double gbps = 0.0;    // bytes read and bytes written
  std::string product;  // what was measured
};

// gbps: a device copy, cudaMemcpyAsync, of 1 GiB (or an eighth of the free memory).
// tflops: tensor cores alone. Every warp multiplies random bfloat16 tiles that stay where they are,
// A in registers and, on compute capability 9.0, B in shared memory (wgmma 64x128x16, as in P V of
// the attention kernels), else in registers too (mma 16x8x16). Nothing is loaded, stored, or waited
// for, so no kernel with inputs gets there: a cuBLAS product on an H200 reaches less.
Ceilings measure_ceilings(Timer* timer, const Device& device);

// A launch of the loop, and its FLOP. sink: device memory that is never written.
double launch_mma_loop(int multiprocessors, float* sink, cudaStream_t stream);
#ifdef SEER_BENCH_SM90
double launch_wgmma_loop(int multiprocessors, float* sink, cudaStream_t stream);
#endif

}  // namespace seer::bench
