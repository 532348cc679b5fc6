// SPDX-License-Identifier: Apache-2.0
// Shared memory as a kernel of compute capability 9.0 uses it: objects at fixed offsets, and
// barriers in shared memory (mbarrier, compute capability 9.0) and the bulk tensor copies (TMA)
// that complete on them.
//
// A barrier counts arrivals and bytes; when both reach what its phase expects, the phase completes
// and the next one begins. A wait names a phase by its parity alone, so it is only meaningful for a
// waiter that can be at most one phase away: whoever waits on a barrier must wait for every phase
// of it, in order. The kernels here keep that rule everywhere.
#pragma once

#include <cstdint>

namespace seer::dev {

using SmemAddress = uint32_t;  // in the shared window

// The object at `offset` bytes of the kernel's dynamic shared memory. A constant address: it takes
// no register, as a pointer handed around would.
template <class T>
__device__ __forceinline__ T& shared_object(int offset, int index = 0) {
  extern __shared__ __align__(1024) char smem[];
  return reinterpret_cast<T*>(smem + offset)[index];
}

__device__ __forceinline__ void mbarrier_init(SmemAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's reads and writes of shared memory before later accesses by the copy engine
// and the tensor cores (the async proxy).
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const void* tensor_map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(tensor_map) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(SmemAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(SmemAddress barrier, int count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count)
               : "memory");
}

// Arrives once and makes the present phase wait for `bytes` more.
__device__ __forceinline__ void mbarrier_arrive_expect(SmemAddress barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has completed (the first phase has parity 0; a fresh barrier
// counts as having completed a phase of parity 1).
__device__ __forceinline__ void mbarrier_wait(SmemAddress barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies a box of a 5-dimensional tensor to shared memory; its bytes complete on `barrier`. Parts
// of the box outside the tensor become zeros. To be called by one thread.
__device__ __forceinline__ void tma_load(SmemAddress target, const void* tensor_map,
                                         SmemAddress barrier, const int (&at)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(target),
      "l"(tensor_map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
      : "memory");
}

}  // namespace seer::dev
