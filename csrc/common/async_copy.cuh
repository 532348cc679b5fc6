// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory (cp.async, compute capability 8.0 on).
#pragma once

#include <cstdint>

namespace seer::dev {

// The 32-bit shared-window address of a pointer into shared memory. The inline assembly below
// takes these, so that one register holds an address and constants fold into the instruction.
__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// `x`, of which the compiler no longer knows that it never changes. Values computed from it inside
// a loop are then computed there: a few instructions instead of registers held through the loop.
template <class T>
__device__ __forceinline__ T recompute_from(T x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Copies the 16 bytes at global + kByteOffset past L1 (each K/V line is used once per CTA), or
// writes 16 zero bytes without touching global memory if `valid` is false. The offset is a template
// argument so that it ends up inside the instruction, not in an address register.
template <int kByteOffset>
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1 + %2], 16, %3;" ::"r"(smem),
               "l"(global), "n"(kByteOffset), "r"(bytes)
               : "memory");
}

// Waits for this thread's copies. Other threads' copies are visible after the next barrier.
__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Groups of this thread's copies: all since the last commit. Waits until at most kPending of the
// latest groups are on their way.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace seer::dev
