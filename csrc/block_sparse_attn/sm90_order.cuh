// SPDX-License-Identifier: Apache-2.0
// The order in which a tile's consumers walk the KV tiles that they keep, found by one warp.
//
// The order inside a row is free, so it is chosen to load little and to keep the consumers level.
// KV tiles with the same set of owners are a list; a list and the one of all other consumers are a
// couple. Then
//   1. KV tiles that all own (one load serves all);
//   2. couples take turns, as long as both lists last: a tile of each, so a turn of a couple has
//      work for everybody;
//   3. what is left of the couples takes turns, a tile each.
// In both, the longest goes first. So whoever has a turn has it behind all that are longer, and
// the turns before were min(turn, length) of every couple.
//
// It is found for a window of up to 256 KV tiles, as many neighbours per lane as it takes, without
// a loop over tiles: a tile's place follows from its list, its rank in the list, and the lengths.
#pragma once

#include <cstdint>

#include "common/mbarrier.cuh"
#include "common/warp.cuh"

namespace seer::dev {

// What the scheduler has in shared memory, because registers are short. Lists are numbered by their
// owners, a bit per consumer; couples by the lower one of their lists.
template <int kConsumers>
struct alignas(16) OrderTables {
  static constexpr int kWords = (1 << kConsumers) / 4;
  uint32_t before[32][kWords];  // by lane: tiles of each list in lower lanes, a byte per list
  uint32_t turns[2][kWords];    // how many a couple has in steps 2 and 3, two couples per word
};

template <int kConsumers>
class Order {
  using Tables = OrderTables<kConsumers>;

 public:
  static constexpr int kTiles = 256;  // of a window, at most

  int entries;  // of the window

  // Takes the lane's bits of each consumer: its KV tiles, the lowest first, 8 at most.
  __device__ __forceinline__ void sort(const uint32_t (&keeps)[kConsumers], Tables& tables) {
    uint32_t any = 0;
    bits = 0;
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      any |= keeps[i];
      bits |= keeps[i] << 8 * i;
    }
    entries = static_cast<int>(__reduce_add_sync(kFullWarp, __popc(any)));

    // Every lane knows its own list, of which it is the number, and the couple of that.
    const int lane = lane_id(), couple = min(lane, lane ^ kAll);
    const int length = count(keeps, tables), other = __shfl_xor_sync(kFullWarp, length, kAll);
    const int all = __shfl_sync(kFullWarp, length, kAll);
    const int both = couple == 0 ? 0 : min(length, other);
    const int rest = couple == 0 ? 0 : max(length, other) - both;
    const uint32_t turns = both | rest << 16;
    int pairs = 0, ahead = 0, rests_ahead = 0;  // couples with longer turns
#pragma unroll
    for (int i = 1; i <= kAll / 2; ++i) {
      const uint32_t of_couple = __shfl_sync(kFullWarp, turns, i);
      const int its_both = of_couple & 0xffff, its_rest = of_couple >> 16;
      pairs += its_both;
      ahead += its_both > both || (its_both == both && i < couple);
      rests_ahead += its_rest > rest || (its_rest == rest && i < couple);
    }
    // In a turn, the list with more owners comes first.
    const bool second = 2 * __popc(lane) + (lane == couple) <= kConsumers;
    place_of_list = both | (all + 2 * ahead + second) << 10 | (all + 2 * pairs + rests_ahead) << 20;
    const uint32_t next = __shfl_down_sync(kFullWarp, turns, 1);
    __syncwarp();  // all lanes have read the last window's
    if (lane < kAll / 2 && lane % 2 == 0) {
      tables.turns[0][lane / 2] = __byte_perm(turns, next, 0x5410);  // the lower halves
      tables.turns[1][lane / 2] = __byte_perm(turns, next, 0x7632);
    }
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
        visit(i, owners, place(owners, r, tables));
      }
    }
  }

 private:
  static constexpr int kWords = Tables::kWords;
  static constexpr int kAll = (1 << kConsumers) - 1;  // the list that all own
  static constexpr int kAtOnce = 4;                   // tiles of a lane

  static __device__ __forceinline__ int byte_at(uint32_t low, uint32_t high, int index) {
    return static_cast<int>(__byte_perm(low, high, index) & 255);
  }

  // The length of the list that the lane is the number of; fills tables.before.
  static __device__ __forceinline__ int count(const uint32_t (&keeps)[kConsumers], Tables& tables) {
    const int lane = lane_id();
    int length = 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      uint32_t own = 0;
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        const int list = 4 * word + byte;
        uint32_t tiles = list == 0 ? 0 : 0xff;
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) tiles &= list >> i & 1 ? keeps[i] : ~keeps[i];
        own += static_cast<uint32_t>(__popc(tiles)) << 8 * byte;
      }
      // Sums over this and lower lanes. All 256 tiles of one list overflow a byte, in the last
      // lane; the subtraction undoes what that does to its neighbour.
      uint32_t until = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t lower = __shfl_up_sync(kFullWarp, until, step);
        if (lane >= step) until += lower;
      }
      const uint32_t before = until - own;
      tables.before[lane][word] = before;
      const uint32_t last_before = __shfl_sync(kFullWarp, before, 31);
      const uint32_t last_own = __shfl_sync(kFullWarp, own, 31);
      if (lane / 4 == word) {
        length = byte_at(last_before, 0, lane % 4) + byte_at(last_own, 0, lane % 4);
      }
    }
    return length;
  }

  // Where the tile of rank `r` of its list goes.
  __device__ __forceinline__ int place(int owners, int r, const Tables& tables) const {
    const uint32_t of_list = __shfl_sync(kFullWarp, place_of_list, owners);
    const int both = of_list & 1023;
    const bool rest = r >= both;
    const uint32_t turn = rest ? r - both : r;
    uint32_t sums = 0;  // of the couples' turns before, two in halves
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      sums += __vminu2(tables.turns[rest][word], turn * 0x10001u);
    }
    const int turns = (sums & 0xffff) + (sums >> 16);
    const int in_couples = rest ? (of_list >> 20) + turns : (of_list >> 10 & 1023) + 2 * turns;
    return owners == kAll ? r : in_couples;
  }

  uint32_t bits;  // 8 of each consumer
  // Of list `lane`, 10 bits each: its tiles in step 2, and the places of its first tiles in the
  // first turns of steps 2 and 3.
  uint32_t place_of_list;
};

}  // namespace seer::dev
