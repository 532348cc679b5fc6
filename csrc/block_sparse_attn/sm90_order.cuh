// SPDX-License-Identifier: Apache-2.0
// The order in which a tile's three consumers walk the KV tiles that they keep, found by one warp.
//
// The order inside a row is free, so it is chosen to load little and to keep the consumers level:
//   1. KV tiles that all three own (one load serves three);
//   2. tiles of a pair, alternating with tiles that only the third owns;
//   3. what is left of the pairs, in turns; then of the singles.
//
// It is found for a window of 256 KV tiles, 8 per lane, without a loop over tiles: a tile's place
// follows from its class (its set of owners, 1 to 7), its rank in the class, and the sizes of the
// classes. Each lane knows how many tiles of each class lower lanes hold (six shuffles for four
// classes at a time, packed in bytes); lane c keeps what is needed to place class c.
#pragma once

#include <cstdint>

#include "common/warp.cuh"

namespace seer::dev {

class Order {
 public:
  static constexpr int kTiles = 256;  // of a window

  int entries;  // of the window

  // Takes the lane's 8 bits of each consumer: KV tiles 8 * lane to 8 * lane + 7 of the window.
  __device__ __forceinline__ void sort(uint32_t a, uint32_t b, uint32_t c) {
    const int lane = lane_id();
    bits = a | b << 8 | c << 16;
    int count = 0;  // of class `lane`
#pragma unroll
    for (int pack = 0; pack < 2; ++pack) {  // classes 1-4 and 5-7, a byte each
      uint32_t own = 0;
#pragma unroll
      for (int field = 0; field < 4; ++field) {
        const int owners = 4 * pack + field + 1;
        if (owners < 8) own |= __popc(members(owners)) << (8 * field);
      }
      // At most 31 * 8 tiles lie before a lane: no byte overflows.
      uint32_t sum = __shfl_up_sync(kFullWarp, own, 1);
      if (lane == 0) sum = 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(kFullWarp, sum, step);
        if (lane >= step) sum += other;
      }
      before[pack] = sum;
      const uint32_t in_lane = __shfl_sync(kFullWarp, own, 31);
      const uint32_t until_lane = __shfl_sync(kFullWarp, sum, 31);
      const int field = 8 * ((lane + 3) % 4);
      if ((lane + 3) / 4 == pack + 1)
        count = (in_lane >> field & 255) + (until_lane >> field & 255);
    }
    // A pair alternates with the single that complements it as long as there are both: classes c
    // and 7 - c. Afterwards lists take turns: the next list's class is the rotation of the class.
    const auto of = [](int value, int lane) { return __shfl_sync(kFullWarp, value, lane); };
    const int all = of(count, 7);
    const int complement = of(count, (7 - lane) & 7);
    const int even = lane == 7 ? 0 : min(count, complement);
    const int rest = count - even;
    const int even0 = of(even, 6), even1 = of(even, 5);
    const int pairs = all + 2 * (even0 + even1 + of(even, 3));  // where the rests of pairs begin
    const int singles = pairs + of(rest, 6) + of(rest, 5) + of(rest, 3);
    entries = singles + of(rest, 1) + of(rest, 2) + of(rest, 4);

    const bool single = (lane & (lane - 1)) == 0;
    const bool first = lane == 1 || lane == 6, third = lane == 4 || lane == 3;
    const int begin = all + single + (first ? 0 : 2 * even0) + (third ? 2 * even1 : 0);
    const int rotated = (lane << 1 | lane >> 2) & 7;
    const int next = of(rest, rotated), after = of(rest, (lane << 2 | lane >> 1) & 7);
    alternating = static_cast<uint32_t>(even | begin << 10 | (single ? singles : pairs) << 20);
    turns = static_cast<uint32_t>(next | after << 10 | third << 20 | !first << 21);
  }

  __device__ __forceinline__ int owners(int bit) const {
    const uint32_t at = bits >> bit;
    return static_cast<int>((at & 1) | (at >> 7 & 2) | (at >> 14 & 4));
  }

  // Where the lane's tile `bit` goes; meaningless if nobody owns it. By all lanes.
  __device__ __forceinline__ int place(int bit, int owners) const {
    const int index = owners - 1;
    const uint32_t earlier = index < 4 ? before[0] : before[1];
    const int rank = static_cast<int>(earlier >> (8 * (index & 3)) & 255) +
                     __popc(members(owners) & ((1u << bit) - 1));
    const uint32_t even_begin = __shfl_sync(kFullWarp, alternating, owners);
    const uint32_t lists = __shfl_sync(kFullWarp, turns, owners);
    const int even = even_begin & 1023, begin = even_begin >> 10 & 1023, rest = even_begin >> 20;
    const int turn = rank - even;
    const int in_turn = rest + turn + min(int(lists & 1023), turn + int(lists >> 20 & 1)) +
                        min(int(lists >> 10 & 1023), turn + int(lists >> 21 & 1));
    const int in_pairs = begin + 2 * rank;
    return owners == 7 ? rank : turn < 0 ? in_pairs : in_turn;
  }

 private:
  // The lane's tiles that exactly these consumers own.
  __device__ __forceinline__ uint32_t members(int owners) const {
    const uint32_t x = bits ^ ((owners & 1) ? 0 : 0xff) ^ ((owners & 2) ? 0 : 0xff00) ^
                       ((owners & 4) ? 0 : 0xff0000);
    return x & x >> 8 & x >> 16 & 0xff;
  }

  uint32_t bits;       // 8 of each consumer
  uint32_t before[2];  // packed counts of lower lanes
  uint32_t alternating, turns;
};

}  // namespace seer::dev
