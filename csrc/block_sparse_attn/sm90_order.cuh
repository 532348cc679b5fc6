// SPDX-License-Identifier: Apache-2.0
// The order in which a tile's three consumers walk the KV tiles that they keep, found by one warp.
//
// The order inside a row is free, so it is chosen to load little and to keep the consumers level:
//   1. KV tiles that all three own (one load serves three);
//   2. tiles of a pair, alternating with tiles that only the third owns;
//   3. what is left of the pairs, in turns; then of the singles.
//
// It is found for a window of up to 256 KV tiles, as many neighbours per lane as it takes, without
// a loop over tiles: a tile's place follows from its class (its set of owners, 1 to 7), its rank in
// the class, and the sizes of the classes. Each lane knows how many tiles of each class lower lanes
// hold (class c is byte c of eight); lane c keeps what is needed to place class c.
#pragma once

#include <cstdint>

#include "common/warp.cuh"

namespace seer::dev {

class Order {
 public:
  static constexpr int kTiles = 256;  // of a window, at most
  static constexpr int kLaneTiles = kTiles / 32;

  int entries;  // of the window

  // Takes the lane's bits of each consumer: its KV tiles, the lowest first.
  __device__ __forceinline__ void sort(uint32_t a, uint32_t b, uint32_t c) {
    const int lane = lane_id();
    bits = a | b << 8 | c << 16;
    const uint32_t own[2] = {
        byte_of(a & ~b & ~c, 1) + byte_of(b & ~a & ~c, 2) + byte_of(a & b & ~c, 3),
        byte_of(c & ~a & ~b, 0) + byte_of(a & c & ~b, 1) + byte_of(b & c & ~a, 2) +
            byte_of(a & b & c, 3)};
    entries = static_cast<int>(__reduce_add_sync(kFullWarp, __popc(a | b | c)));
    // Sums over this and lower lanes. All 256 tiles of one class overflow a byte, in the last lane;
    // the subtraction undoes what that does to its neighbour.
    uint32_t until[2] = {own[0], own[1]};
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t other = __shfl_up_sync(kFullWarp, until[half], step);
        if (lane >= step) until[half] += other;
      }
    }
    before[0] = until[0] - own[0];
    before[1] = until[1] - own[1];
    const auto of = [](auto value, int lane) { return __shfl_sync(kFullWarp, value, lane); };
    const int count = byte_at(of(before[0], 31), of(before[1], 31), lane & 7) +
                      byte_at(of(own[0], 31), of(own[1], 31), lane & 7);  // of class `lane`

    // A pair alternates with the single that complements it as long as there are both: classes c
    // and 7 - c. Afterwards lists take turns: the next list's class is the rotation of the class.
    const int all = of(count, 7);
    const int even = min(count, of(count, (7 - lane) & 7));
    const int rest = count - even;
    const int even0 = of(even, 6), even1 = of(even, 5);
    const int pairs = all + 2 * (even0 + even1 + of(even, 3));  // where the rests of pairs begin
    const int singles = pairs + of(rest, 6) + of(rest, 5) + of(rest, 3);

    const bool single = (lane & (lane - 1)) == 0;
    const bool first = lane == 1 || lane == 6, third = lane == 4 || lane == 3;
    const int begin = all + single + (first ? 0 : 2 * even0) + (third ? 2 * even1 : 0);
    const int rotated = (lane << 1 | lane >> 2) & 7;
    const int next = of(rest, rotated), after = of(rest, (lane << 2 | lane >> 1) & 7);
    // The tile of rank r >= even is the (r - even)th in its list's turns: behind as many of its own
    // list, and of the others as many or one more, if they have so many. In terms of r:
    //   turns_begin + r + min(r, next_end) + min(r, after_end)
    const int turns_begin = (single ? singles : pairs) - 3 * even + third + !first;
    const int next_end = next + even - third, after_end = after + even - !first;
    // What all three own comes in its own order from 0 on, which zeros say.
    alternating = lane == 7 ? 0 : even | begin << 10 | turns_begin << 20;
    turns = lane == 7 ? 0 : (next_end & 0xffff) | after_end << 16;
  }

  // Calls visit(tile of the lane, owners, place) for the lane's first `width` tiles, by all lanes;
  // the place means nothing if nobody owns the tile.
  template <class Visit>
  __device__ __forceinline__ void each(int width, Visit visit) const {
    uint32_t rank[2] = {before[0], before[1]};  // of the next tile of every class
#pragma unroll 1
    for (int first = 0; first < width; first += kAtOnce) {
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) {
        // Bits 0, 8 and 16 meet at 16, 17 and 18.
        const int owners = static_cast<int>((bits >> i & 0x10101) * 0x10204 >> 16 & 7);
        const int r = byte_at(rank[0], rank[1], owners);
        const uint32_t one = 1u << owners % 4 * 8;
        rank[0] += owners < 4 ? one : 0;
        rank[1] += owners < 4 ? 0 : one;
        visit(i, owners, place(owners, r));
      }
    }
  }

 private:
  static constexpr int kAtOnce = 4;

  static __device__ __forceinline__ uint32_t byte_of(uint32_t set, int index) {
    return static_cast<uint32_t>(__popc(set)) << (8 * index);
  }
  static __device__ __forceinline__ int byte_at(uint32_t low, uint32_t high, int index) {
    return static_cast<int>(__byte_perm(low, high, index) & 255);
  }

  // Where the tile of rank `r` of its class goes.
  __device__ __forceinline__ int place(int owners, int r) const {
    const int even_begin = __shfl_sync(kFullWarp, alternating, owners);
    const int ends = __shfl_sync(kFullWarp, turns, owners);
    const int even = even_begin & 1023, begin = even_begin >> 10 & 1023;
    const int in_turn =
        (even_begin >> 20) + r + min(r, static_cast<int16_t>(ends)) + min(r, ends >> 16);
    return r < even ? begin + 2 * r : in_turn;
  }

  uint32_t bits;       // 8 of each consumer
  uint32_t before[2];  // counts of lower lanes
  int alternating, turns;
};

}  // namespace seer::dev
