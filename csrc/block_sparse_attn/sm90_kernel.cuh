// SPDX-License-Identifier: Apache-2.0
// Block-sparse attention forward for Hopper (compute capability 9.0): TMA and wgmma.
//
// What   out = softmax(scale * Q K^T, over visible columns) V, and the log-sum-exp of each row.
// Shape  One persistent CTA per SM: a control warpgroup and three or four consumer warpgroups.
//          scheduler   takes tiles (64 query rows per consumer, of one KV head) and merges their bit
//                      rows into one ordered stream of (KV tile, owners): sm90_scheduler.cuh
//          K, V, Q     a warp each follows the stream and loads by TMA, far ahead:
//                      sm90_loaders.cuh
//          consumers   S = Q K^T, softmax, out += P V on what they own: sm90_consumer.cuh
// The picture, the protocol and its proof, and the budgets: docs/block_sparse_attn_hopper.md.
//
// Never read: K/V tiles that no row of a tile keeps or sees. Rows past the end of a sequence
// arrive as zeros. Inside a kept tile a masked column has P = 0, but 0 * V is NaN if V is Inf or
// NaN there: as in dense attention, V rows of a visited tile must be finite.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>

#include "block_sparse_attn/sm90_consumer.cuh"
#include "block_sparse_attn/sm90_loaders.cuh"
#include "block_sparse_attn/sm90_scheduler.cuh"

namespace seer::dev {

template <class Traits>
__device__ __forceinline__ void init_shared(SmemAddress base) {
  const auto init = [&](int first, int count, int arrivals) {
    const int i = threadIdx.x;
    if (i < count) mbarrier_init(base + first + 8 * i, arrivals);
  };
  constexpr int kWarps = 4 * Traits::kConsumers;
  init(Traits::kFullK, Traits::kOwnerSets * Traits::kBarriersPerSet, 1);
  init(Traits::kFullV, Traits::kOwnerSets * Traits::kBarriersPerSet, 1);
  init(Traits::kEmptyK, Traits::kStagesK, kWarps);
  init(Traits::kEmptyV, Traits::kStagesV, kWarps);
  init(Traits::kFullQ, Traits::kConsumers, 1);
  init(Traits::kEmptyQ, Traits::kConsumers, 4);
  init(Traits::kFullPage, Traits::kPages, 32);  // all lanes of the scheduler
  init(Traits::kEmptyPage, Traits::kPages, 32 * Traits::kPageReaders);
  if (threadIdx.x < Traits::kPages) {
    shared_object<Sm90Page>(Traits::kSmemPage, threadIdx.x).redo = 0;
  }
  if (threadIdx.x == 0) shared_object<Sm90Search>(Traits::kSmemSearch) = {};
  fence_mbarrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    block_sparse_attn_sm90(const __grid_constant__ typename Traits::Params p) {
  const auto base = static_cast<SmemAddress>(__cvta_generic_to_shared(&shared_object<char>(0)));
  // Shuffled, so that the compiler knows that roles are the same for a whole warp.
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);
  init_shared<Traits>(base);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&p.q);
    prefetch_tensor_map(&p.k);
    prefetch_tensor_map(&p.v);
  }
  __syncthreads();

  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kControlRegisters>();
    if (warp == 0) {
      Scheduler<Traits>(p, base).run();
    } else if (warp == 1) {
      load_kv<Traits, true>(p, base);
    } else if (warp == 2) {
      load_kv<Traits, false>(p, base);
    } else {
      load_q<Traits>(p, base);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits>(p, base, warp / 4 - 1).run();
  }
}

}  // namespace seer::dev
