// SPDX-License-Identifier: Apache-2.0
// The loader warps of the Hopper kernel: K, V and Q from global to shared memory by TMA.
//
// K and V have a ring of stages each, and a warp each, which follows the stream and runs ahead as
// far as its ring allows. A load completes on a barrier of its owner set; its stage is free again
// when all owners have arrived on the stage's empty barrier (the loader arrives for the others).
#pragma once

#include <cstdint>

#include "block_sparse_attn/sm90_stream.cuh"

namespace seer::dev {

// Counts loads per owner set: bits 0-2 of a count choose the barrier, bit 3 is the phase's parity.
template <int kConsumers>
class SetCounters {
  using Counts = SetCounts<kConsumers>;

 public:
  __device__ __forceinline__ int take(int owners) {
    const int shift = 4 * owners;
    const int count = static_cast<int>(counts >> shift & 15);
    counts = (counts & ~(Counts{15} << shift)) | static_cast<Counts>(count + 1 & 15) << shift;
    return count;
  }

 private:
  Counts counts = 0;
};

// Coordinates of 64 rows from `row` on of a sequence of `rows` rows. Packed sequences use a map in
// which dimension 3 is the row where a window of 64 rows begins (64 rows earlier than counted) and
// dimension 1 the row inside the window: shifted so that rows past the sequence's end fall out of
// the window, they become zeros although the tensor goes on (sm90_launch.cuh).
struct BoxPlace {
  int row, outer;

  __device__ __forceinline__ BoxPlace(bool packed, int start, int row_, int rows, int batch) {
    if (packed) {
      row = max(64 - (rows - row_), 0);
      outer = start + row_ - row + 64;
    } else {
      row = row_;
      outer = batch;
    }
  }
};

// Loads K (kIsK) or V of every entry of the stream.
template <class Traits, bool kIsK>
__device__ __forceinline__ void load_kv(const Sm90Params& p, SmemAddress base) {
  constexpr int kStages = kIsK ? Traits::kStagesK : Traits::kStagesV;
  constexpr int kRing = kIsK ? Traits::kSmemK : Traits::kSmemV;
  constexpr int kFull = kIsK ? Traits::kFullK : Traits::kFullV;
  constexpr int kEmpty = kIsK ? Traits::kEmptyK : Traits::kEmptyV;
  const void* const map = kIsK ? &p.k : &p.v;
  const int lane = threadIdx.x % 32;
  PageReader<Traits> reader(base);
  SetCounters<Traits::kConsumers> counters;
  int stage = 0;
  uint32_t phase = 0;
  for (;;) {
    reader.wait();
    const Sm90Page& page = reader.page();
    const int entries = page.entries;
    if (entries < 0) break;
    const int head = page.head_kv, start = page.kv_start, rows = page.rows_kv, batch = page.batch;
    for (int first = 0; first < entries; first += 32) {
      const uint32_t mine = reader.entry(first + lane, entries);
      const int count = min(entries - first, 32);
      for (int i = 0; i < count; ++i) {
        const uint32_t entry = __shfl_sync(kFullWarp, mine, i);
        const int owners = entry_owners(entry);
        const SmemAddress empty = base + kEmpty + 8 * stage;
        mbarrier_wait(empty, phase ^ 1);
        const int load = counters.take(owners);
        if (lane == 0) {
          const SmemAddress full = base + kFull + 8 * barrier_index(owners, load);
          const BoxPlace box(p.cu_seqlens_q != nullptr, start, entry_tile(entry) * Traits::kTileKv,
                             rows, batch);
          mbarrier_arrive_expect(full, Traits::kStageBytes);
          tma_load(base + kRing + stage * Traits::kStageBytes, map, full,
                   {0, box.row, head, box.outer, 0});
          const int strangers = Traits::kConsumers - __popc(owners);
          if (strangers > 0) mbarrier_arrive(empty, 4 * strangers);
        }
        __syncwarp();
        if (++stage == kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
    }
    reader.release();
  }
}

// Loads the query rows of every unit, as soon as its consumer has done with those of its last one.
template <class Traits>
__device__ __forceinline__ void load_q(const Sm90Params& p, SmemAddress base) {
  const int lane = threadIdx.x % 32;
  PageReader<Traits> reader(base);
  uint32_t phases = 0;  // bit per consumer
  for (;;) {
    reader.wait();
    const Sm90Page& page = reader.page();
    if (page.entries < 0) break;
    const int consumers = page.flags & Sm90Page::kFirst ? Traits::kConsumers : 0;
#pragma unroll 1
    for (int consumer = 0; consumer < consumers; ++consumer) {
      const Sm90Unit unit = page.units[consumer];
      if (unit.first_row < 0) continue;
      mbarrier_wait(base + Traits::kEmptyQ + 8 * consumer, (phases >> consumer & 1) ^ 1);
      phases ^= 1u << consumer;
      if (lane == 0) {
        const SmemAddress full = base + Traits::kFullQ + 8 * consumer;
        const BoxPlace box(p.cu_seqlens_q != nullptr, page.q_start, unit.first_row, page.rows_q,
                           page.batch);
        mbarrier_arrive_expect(full, Traits::kStageBytes);
        tma_load(base + Traits::kSmemQ + consumer * Traits::kStageBytes, &p.q, full,
                 {0, box.row, unit.head, box.outer, 0});
      }
      __syncwarp();
    }
    reader.release();
  }
}

}  // namespace seer::dev
