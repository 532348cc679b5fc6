// SPDX-License-Identifier: Apache-2.0
// The scheduler warp of the Hopper kernel: takes tiles from the launch's counter and turns the bit
// rows of a tile's units into ONE ordered stream of (KV tile, owners), page by page. The
// order is that of sm90_order.cuh.
//
// Tiles whose softmax ran out of its fixed range (sm90_softmax.cuh) come back here: a consumer
// marks the tile's last page, and whoever fills that page's place next finds the mark. At most one
// per page of the ring can be waiting.
#pragma once

#include <climits>
#include <cstdint>

#include "block_sparse_attn/sm90_order.cuh"
#include "block_sparse_attn/sm90_stream.cuh"
#include "block_sparse_attn/sm90_tiles.cuh"

namespace seer::dev {

// 4 bits, each doubled.
__device__ __forceinline__ uint32_t double_nibble(uint32_t x) {
  x = (x | x << 2) & 0x33u;
  x = (x | x << 1) & 0x55u;
  return x | x << 1;
}

template <class Traits>
class Scheduler {
  using Order = dev::Order<Traits::kConsumers>;
  using Tables = OrderTables<Traits::kConsumers>;
  static_assert(sizeof(Tables) == Traits::kOrderBytes);
  static_assert(Traits::kSmemOrder % alignof(Tables) == 0);

 public:
  __device__ __forceinline__ Scheduler(const Sm90Params& params, SmemAddress shared)
      : p(params), base(shared) {}

  __device__ __forceinline__ void run() {
    acquire_page();
    Sm90Page place{};
    place.tile = static_cast<int>(blockIdx.x);  // the CTA's first tile has its own number
    for (;;) {
      int tile_of_head;
      if (TileOrder<Traits>::locate(p, place.tile, place, tile_of_head)) {
        stream_tile(place, tile_of_head);
        acquire_page();
      } else if (!await_consumers()) {
        break;
      }
      place = {};
      if (marked > 0) {
        const int2 mark = pending(--marked);
        place.tile = __reduce_max_sync(kFullWarp, mark.x);
        place.redo_of = mark.y;
        place.flags = Sm90Page::kCareful;
      } else {
        place.tile = take_tile();
      }
    }
    publish_empty_page(kEnd);
  }

 private:
  // The next tile that nobody has: taken once there is a page for it, so that a CTA with long tiles
  // leaves later ones to others. Without a counter, there are no more tiles than CTAs.
  __device__ __forceinline__ int take_tile() {
    if (p.next_tile == nullptr) return INT_MAX;
    int tile = 0;
    if (lane_id() == 0) tile = static_cast<int>(gridDim.x) + atomicAdd(p.next_tile, 1);
    return __reduce_max_sync(kFullWarp, tile);
  }

  __device__ __forceinline__ Sm90Page& page() {
    return shared_object<Sm90Page>(Traits::kSmemPage, index);
  }

  // Waits until nobody reads the page at `index` any more, and takes its mark.
  __device__ __forceinline__ void acquire_page() {
    mbarrier_wait(base + Traits::kEmptyPage + 8 * index, phase ^ 1);
    // Reduced so that the compiler knows it to be the same in all lanes.
    const int redo = __reduce_max_sync(kFullWarp, page().redo);
    if (redo != 0) {
      if (lane_id() == 0) pending(marked) = make_int2(page().tile, redo);
      __syncwarp();
      ++marked;
    }
  }
  __device__ __forceinline__ void publish_page() {
    __syncwarp();
    mbarrier_arrive(base + Traits::kFullPage + 8 * index);
    if (++index == Traits::kPages) {
      index = 0;
      phase ^= 1;
    }
  }
  // A page without a tile: kFlush only turns the ring, kEnd ends the kernel.
  static constexpr int kFlush = 0, kEnd = -1;
  __device__ __forceinline__ void publish_empty_page(int entries) {
    __syncwarp();  // all lanes have read the mark of acquire_page()
    if (lane_id() == 0) {
      page() = Sm90Page{};
      page().entries = entries;
    }
    publish_page();
  }
  __device__ __forceinline__ int2& pending(int i) {
    static_assert(sizeof(int2) == Traits::kPendingBytes);
    return shared_object<int2>(Traits::kSmemPending, i);
  }
  // Of the present tile: what all of its pages say, and the row of bits of each unit.
  __device__ __forceinline__ static const uint32_t*& row_of_bits(int consumer) {
    return shared_object<const uint32_t*>(Traits::kSmemRows, consumer);
  }
  __device__ __forceinline__ static Sm90Page& current() {
    return shared_object<Sm90Page>(Traits::kSmemCurrent);
  }

  __device__ __forceinline__ static Tables& tables() {
    return shared_object<Tables>(Traits::kSmemOrder);
  }

  // At the end: waits for all pages in flight; true if a mark came up.
  __device__ __forceinline__ bool await_consumers() {
    for (int i = 0; i < Traits::kPages && marked == 0; ++i) {
      publish_empty_page(kFlush);
      acquire_page();
    }
    return marked > 0;
  }

  // Streams the tile of `place`. It waits in shared memory meanwhile: registers are short here.
  __device__ __forceinline__ void stream_tile(const Sm90Page& place, int tile_of_head) {
    const int lane = lane_id();
    __syncwarp();
    if (lane == 0) {
      current() = place;
      current().flags |= Sm90Page::kFirst;
    }
    __syncwarp();
    const int consumer = min(lane, Traits::kConsumers - 1);
    const Sm90Unit unit = TileOrder<Traits>::unit(p, place, tile_of_head, consumer);
    if (lane < Traits::kConsumers) {
      current().units[lane] = unit;
      row_of_bits(lane) = p.bits + place.batch * p.bits_batch_stride +
                          p.by.heads_per_bits.quotient(unit.head) * p.bits_head_stride +
                          (unit.first_row >> (p.wide_q ? 7 : 6)) * p.bits_row_stride;
    }
    const int longest = static_cast<int>(__reduce_max_sync(kFullWarp, unit.tiles));
    __syncwarp();
    int first = 0;
#pragma unroll 1
    do {
      stream_window(first, longest - first);
      first += Order::kTiles;
    } while (first < longest);
    close_page(Sm90Page::kLast);
  }

  __device__ __forceinline__ void open_page() {
    constexpr int kWords = sizeof(Sm90Page) / 4;
    static_assert(kWords <= 32);
    const int lane = lane_id();
    __syncwarp();
    if (lane < kWords) {
      reinterpret_cast<int*>(&page())[lane] = reinterpret_cast<const int*>(&current())[lane];
    }
    __syncwarp();
    if (lane == 0) {
      page().first_slot = slot;
      current().flags &= ~Sm90Page::kFirst;
    }
    filled = 0;
  }
  __device__ __forceinline__ void close_page(int flags) {
    if (lane_id() == 0) {
      page().entries = filled;
      page().flags |= flags;
    }
    slot = (slot + filled) % (Traits::kStagesK * Traits::kStagesV);
    publish_page();
  }

  // Appends the KV tiles from `first_tile` on, `left` but at most a window, to the tile's pages.
  __device__ __forceinline__ void stream_window(int first_tile, int left) {
    const bool opens = first_tile == 0;
    const int width = left > 128 ? 8 : left > 64 ? 4 : left > 32 ? 2 : 1;
    first_tile += width * lane_id();
    // The lane's bits of each consumer, from memory; the page is opened while they come.
    const int bit = p.wide_kv ? first_tile / 2 : first_tile;
    uint32_t bits[Traits::kConsumers];
    int visible[Traits::kConsumers];
#pragma unroll
    for (int i = 0; i < Traits::kConsumers; ++i) {
      visible[i] = min(max(current().units[i].tiles - first_tile, 0), width);
      bits[i] = ~0u;
      if (p.bits != nullptr && visible[i] > 0) bits[i] = __ldg(row_of_bits(i) + bit / 32);
    }
    if (opens) open_page();
#pragma unroll
    for (int i = 0; i < Traits::kConsumers; ++i) {
      bits[i] >>= bit % 32;
      if (p.wide_kv) bits[i] = double_nibble(bits[i] & 0xf);
      bits[i] &= (1u << visible[i]) - 1;
    }
    Order order;
    order.sort(bits, tables());
    int first = 0;  // in the window's order
#pragma unroll 1
    while (first < order.entries) {
      // What does not fit is halved: a page of a few entries is over before the next one is made.
      const int left = order.entries - first, space = Traits::kPageEntries - filled;
      const int count = left > space ? min(space, (left + 1) / 2) : left;
      write_entries(order, first_tile, width, first, count);
      first += count;
      filled += count;
      if (first < order.entries) {
        close_page(0);
        acquire_page();
        open_page();
      }
    }
  }

  // Appends `count` entries of the window's order, from `first` on, to the page.
  __device__ __forceinline__ void write_entries(const Order& order, int first_tile, int width,
                                                int first, int count) const {
    SmemAddress begin =
        base + Traits::kSmemEntries + (index * Traits::kPageEntries + filled - first) * 4;
    // One address for the compiler, and not a sum to be worked out for every entry.
    asm volatile("" : "+r"(begin));
    order.each(width, tables(), [&](int tile, int owners, int place) {
      const bool here =
          owners != 0 && static_cast<unsigned>(place - first) < static_cast<unsigned>(count);
      // Without a branch, so that the tiles of a lane are placed at the same time.
      asm volatile(
          "{\n"
          ".reg .pred here;\n"
          "setp.ne.u32 here, %2, 0;\n"
          "@here st.shared.u32 [%0], %1;\n"
          "}\n" ::"r"(begin + 4 * place),
          "r"((first_tile + tile) | owners << kOwnersShift), "r"(static_cast<int>(here))
          : "memory");
    });
  }

  const Sm90Params& p;
  const SmemAddress base;
  int index = 0;       // of the page to fill next
  uint32_t phase = 0;  // of its barriers
  int marked = 0;      // tiles to be done again
  int slot = 0;        // of the page's first entry, modulo kStagesK * kStagesV
  int filled = 0;      // entries of the open page
};

}  // namespace seer::dev
