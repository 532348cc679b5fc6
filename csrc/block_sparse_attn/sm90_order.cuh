// SPDX-License-Identifier: Apache-2.0
// The order in which a tile's consumers walk the KV tiles that they keep, found by one warp.
//
// The order inside a row is free, so it is chosen to keep the consumers level: KV tiles with the
// same set of owners form a list, and the lists take turns, the longest first. As long as every
// consumer has something of its own in each turn, nobody idles for long; where all keep the same
// tiles, there is only one list.
//
// It is found for a window of up to 256 KV tiles, as many neighbours per lane as it takes, without
// a loop over tiles. The tile of rank r of its list comes behind r turns,
//     min(r, length) tiles of every list,
// and in its turn behind one tile of every longer list. Each lane knows how many tiles of each list
// lower lanes hold (list c is byte c), and lane c the number of lists longer than list c.
#pragma once

#include <cstdint>

#include "common/mbarrier.cuh"
#include "common/warp.cuh"

namespace seer::dev {

// What the warp keeps in shared memory: registers are short.
template <int kConsumers>
struct alignas(16) OrderTables {
  static constexpr int kWords = (1 << kConsumers) / 4;
  uint32_t before[32][kWords];  // of every lane: tiles of each list in lower lanes, in bytes
  uint32_t lengths[2 * kWords];  // of the lists, in halves
};

template <int kConsumers>
class Order {
  using Tables = OrderTables<kConsumers>;
  static constexpr int kWords = Tables::kWords;
  static constexpr int kLists = 4 * kWords;  // the first one has no owners, and no length

 public:
  static constexpr int kTiles = 256;  // of a window, at most
  static constexpr int kLaneTiles = kTiles / 32;

  int entries;  // of the window

  // Takes the lane's bits of each consumer: its KV tiles, the lowest first.
  __device__ __forceinline__ void sort(const uint32_t (&keeps)[kConsumers], Tables& tables) {
    const int lane = lane_id();
    bits = 0;
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      bits |= keeps[i] << 8 * i;
      any |= keeps[i];
    }
    entries = static_cast<int>(__reduce_add_sync(kFullWarp, __popc(any)));

    int length = 0;  // of list `lane`
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      uint32_t own = 0;
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        uint32_t set = word + byte > 0 ? 0xffu : 0u;
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) {
          set &= (4 * word + byte) >> i & 1 ? keeps[i] : ~keeps[i];
        }
        own += static_cast<uint32_t>(__popc(set)) << 8 * byte;
      }
      // Sums over this and lower lanes. All 256 tiles of one list overflow a byte, in the last
      // lane; the subtraction undoes what that does to its neighbour.
      uint32_t until = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(kFullWarp, until, step);
        if (lane >= step) until += other;
      }
      const uint32_t before = until - own;
      tables.before[lane][word] = before;
      const uint32_t last = __shfl_sync(kFullWarp, before, 31);
      const uint32_t last_own = __shfl_sync(kFullWarp, own, 31);
      if (lane / 4 == word) length = byte_at(last, 0, lane % 4) + byte_at(last_own, 0, lane % 4);
    }

    longer = 0;
#pragma unroll
    for (int list = 1; list < kLists; ++list) {
      const int other = __shfl_sync(kFullWarp, length, list);
      longer += other > length || (other == length && list < lane);
    }
    const int next = __shfl_down_sync(kFullWarp, length, 1);
    if (lane < kLists && lane % 2 == 0) tables.lengths[lane / 2] = length | next << 16;
    __syncwarp();
  }

  // Calls visit(tile of the lane, owners, place) for the lane's first `width` tiles, by all lanes;
  // the place means nothing if nobody owns the tile.
  template <class Visit>
  __device__ __forceinline__ void each(int width, const Tables& tables, Visit visit) const {
    uint32_t rank[kWords];  // of the next tile of every list
#pragma unroll
    for (int word = 0; word < kWords; ++word) rank[word] = tables.before[lane_id()][word];
#pragma unroll 1
    for (int first = 0; first < width; first += kAtOnce) {
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) {
        // Bits 0, 8, 16 and 24 meet at 28 to 31.
        const int owners = static_cast<int>((bits >> i & 0x01010101u) * 0x10204080u >> 28);
        int r = byte_at(rank[0], rank[1], owners % 8);
        if constexpr (kWords == 4) r = owners < 8 ? r : byte_at(rank[2], rank[3], owners % 8);
        const uint32_t one = 1u << owners % 4 * 8;
#pragma unroll
        for (int word = 0; word < kWords; ++word) rank[word] += owners / 4 == word ? one : 0;

        uint32_t turns = 0;  // two sums of halves: a window has no more than 256 entries
#pragma unroll
        for (int pair = 0; pair < 2 * kWords; ++pair) {
          turns += __vminu2(tables.lengths[pair], static_cast<uint32_t>(r) * 0x10001u);
        }
        const int place = static_cast<int>((turns & 0xffff) + (turns >> 16)) +
                          __shfl_sync(kFullWarp, longer, owners);
        visit(i, owners, place);
      }
    }
  }

 private:
  static constexpr int kAtOnce = 4;

  static __device__ __forceinline__ int byte_at(uint32_t low, uint32_t high, int index) {
    return static_cast<int>(__byte_perm(low, high, index) & 255);
  }

  uint32_t bits;  // 8 of each consumer
  int longer;     // lists that are longer than list `lane`
};

}  // namespace seer::dev
