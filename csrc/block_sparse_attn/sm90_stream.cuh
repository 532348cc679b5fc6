// SPDX-License-Identifier: Apache-2.0
// The stream from the scheduler to the loaders and consumers of the Hopper kernel: a ring of
// pages, each a description of its tile (Sm90Page) and up to 128 entries (KV tile, owners).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "block_sparse_attn/sm90_traits.cuh"
#include "common/mbarrier.cuh"
#include "common/warp.cuh"

namespace seer::dev {

// An entry of a page: KV tile in the low bits, the set of its owners on top.
constexpr int kOwnersShift = 24;  // 2^30 rows, the most that the op takes, are 2^24 tiles
__device__ __forceinline__ int entry_tile(uint32_t entry) {
  return static_cast<int>(entry & ((1u << kOwnersShift) - 1));
}
__device__ __forceinline__ int entry_owners(uint32_t entry) {
  return static_cast<int>(entry >> kOwnersShift);
}

// The barrier, of those of K or V, of load number `count` of an owner set. Its phase has parity
// count / 8 % 2, so loads are counted modulo 16.
__device__ __forceinline__ int barrier_index(int owners, int count) {
  constexpr int kBarriersPerSet = 8;
  return (owners - 1) * kBarriersPerSet + (count & (kBarriersPerSet - 1));
}

// Loads counted per owner set, modulo 16: four bits for each.
template <int kConsumers>
using SetCounts = std::conditional_t<(1 << kConsumers) * 4 <= 32, uint32_t, uint64_t>;

// A reader's place in the ring of pages.
template <class Traits>
class PageReader {
 public:
  __device__ __forceinline__ explicit PageReader(SmemAddress shared) : base(shared) {}

  __device__ __forceinline__ void wait() const {
    mbarrier_wait(base + Traits::kFullPage + 8 * index, phase);
  }
  __device__ __forceinline__ const Sm90Page& page() const {
    return shared_object<const Sm90Page>(Traits::kSmemPage, index);
  }
  // Entry `i` of the page, 0 past its end.
  __device__ __forceinline__ uint32_t entry(int i, int entries) const {
    uint32_t value = 0;
    if (i < entries) {
      asm volatile("ld.shared.u32 %0, [%1];"
                   : "=r"(value)
                   : "r"(base + Traits::kSmemEntries + (index * Traits::kPageEntries + i) * 4)
                   : "memory");
    }
    return value;
  }
  // To be called by all lanes of a warp. Each arrives for itself: one in the name of all would do
  // behind a __syncwarp, but racecheck does not see that order, and pages are few.
  __device__ __forceinline__ void release() {
    __syncwarp();
    mbarrier_arrive(base + Traits::kEmptyPage + 8 * index);
    if (++index == Traits::kPages) {
      index = 0;
      phase ^= 1;
    }
  }
  // Marks the page's tile as to be done again for the warps in `warps`.
  __device__ __forceinline__ void mark(int warps) const {
    const SmemAddress redo = base + Traits::kSmemPage + index * int(sizeof(Sm90Page)) +
                             static_cast<int>(offsetof(Sm90Page, redo));
    asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(redo), "r"(warps) : "memory");
  }

 private:
  const SmemAddress base;
  int index = 0;
  uint32_t phase = 0;
};

}  // namespace seer::dev
