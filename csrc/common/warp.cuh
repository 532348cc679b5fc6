// SPDX-License-Identifier: Apache-2.0
// Who a thread is, for code that is short of registers.
#pragma once

namespace seer::dev {

constexpr unsigned kFullWarp = 0xffffffffu;

// The lane's and the thread's number, read anew: what depends on them is then not held in registers
// across loops.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
__device__ __forceinline__ int thread_id() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

}  // namespace seer::dev
