// SPDX-License-Identifier: Apache-2.0
// The scheduler warp of the Hopper kernel: takes tiles from the launch's counter and turns the bit
// rows of a tile's three units into ONE ordered stream of (KV tile, owners), page by page. The
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
  static_assert(Traits::kConsumers == 3, "the order of the stream is made for three consumers");
  static constexpr int kNoPage = -1;

 public:
  __device__ __forceinline__ Scheduler(const Sm90Params& params, SmemAddress shared)
      : p(params), base(shared) {}

  __device__ __forceinline__ void run() {
    int next = static_cast<int>(blockIdx.x);
    for (;;) {
      const bool again = marked > 0;
      int tile = __shfl_sync(kFullWarp, next, 0);
      if (again) tile = pending(--marked).x;
      Sm90Page place{};
      int tile_of_head;
      if (!TileOrder<Traits>::locate(p, tile, place, tile_of_head)) {
        if (await_consumers()) continue;
        break;
      }
      if (again) {
        place.flags = Sm90Page::kCareful;
        place.redo_of = pending(marked).y;
      } else {
        next = take_tile();  // is under way while this tile is streamed
      }
      stream_tile(place, tile_of_head);
    }
    publish_empty_page(kEnd);
  }

 private:
  // The CTA's first tile has its own number; the others come from the counter, in lane 0. Without
  // one, there are no more tiles than CTAs.
  __device__ __forceinline__ int take_tile() {
    if (p.next_tile == nullptr) return INT_MAX;
    return lane_id() == 0 ? static_cast<int>(gridDim.x) + atomicAdd(p.next_tile, 1) : 0;
  }

  __device__ __forceinline__ Sm90Page& page() {
    return shared_object<Sm90Page>(Traits::kSmemPage, index);
  }

  // Waits until nobody reads the page at `index` any more, and takes its mark.
  __device__ __forceinline__ void acquire_page() {
    mbarrier_wait(base + Traits::kEmptyPage + 8 * index, phase ^ 1);
    const int2 mark = make_int2(page().tile, page().redo);
    __syncwarp();
    if (mark.y != 0) {
      if (lane_id() == 0) pending(marked) = mark;
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
    acquire_page();
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
  __device__ __forceinline__ Sm90Page& current() {
    return shared_object<Sm90Page>(Traits::kSmemCurrent);
  }

  // At the end: waits for all pages in flight; true if a mark came up.
  __device__ __forceinline__ bool await_consumers() {
    for (int i = 0; i < Traits::kPages && marked == 0; ++i) publish_empty_page(kFlush);
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
    if (lane < Traits::kConsumers) current().units[lane] = unit;
    tiles = unit.tiles;
    row = p.bits + place.batch * p.bits_batch_stride +
          p.by.heads_per_bits.quotient(unit.head) * p.bits_head_stride +
          (unit.first_row >> (p.wide_q ? 7 : 6)) * p.bits_row_stride;
    const int longest = static_cast<int>(__reduce_max_sync(kFullWarp, tiles));
    filled = kNoPage;
    for (int first = 0; first < longest; first += Order::kTiles) {
      stream_window(first, longest - first);
    }
    if (filled == kNoPage) open_page();  // a tile that keeps nothing has a page too
    close_page(Sm90Page::kLast);
  }

  __device__ __forceinline__ void open_page() {
    acquire_page();
    constexpr int kWords = sizeof(Sm90Page) / 4;
    static_assert(kWords <= 32);
    const int lane = lane_id();
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
    filled = kNoPage;
    publish_page();
  }

  // The bits of the lane's `width` KV tiles from `first` on of every consumer, cut to what it sees.
  // All three loads are under way at the same time.
  __device__ __forceinline__ void window_bits(int first, int width, uint32_t (&bits)[3]) const {
    const int bit = p.wide_kv ? first / 2 : first;
    int visible[Traits::kConsumers];
#pragma unroll
    for (int i = 0; i < Traits::kConsumers; ++i) {
      visible[i] = min(max(__shfl_sync(kFullWarp, tiles, i) - first, 0), width);
      const auto address = __shfl_sync(kFullWarp, reinterpret_cast<uintptr_t>(row), i);
      bits[i] = ~0u;
      if (p.bits != nullptr && visible[i] > 0) {
        bits[i] = __ldg(reinterpret_cast<const uint32_t*>(address) + bit / 32);
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kConsumers; ++i) {
      bits[i] >>= bit % 32;
      if (p.wide_kv) bits[i] = double_nibble(bits[i] & 0xf);
      bits[i] &= (1u << visible[i]) - 1;
    }
  }

  // Appends the KV tiles from `first_tile` on, `left` but at most a window, to the tile's pages.
  __device__ __forceinline__ void stream_window(int first_tile, int left) {
    const int width = left > 128 ? 8 : left > 64 ? 4 : left > 32 ? 2 : 1;
    first_tile += width * lane_id();
    uint32_t bits[Traits::kConsumers];
    window_bits(first_tile, width, bits);
    Order order;
    order.sort(bits[0], bits[1], bits[2]);
    int first = 0;  // in the window's order
    while (first < order.entries) {
      if (filled == Traits::kPageEntries) close_page(0);
      if (filled == kNoPage) open_page();
      const int count = min(order.entries - first, Traits::kPageEntries - filled);
      write_entries(order, first_tile, width, first, count);
      first += count;
      filled += count;
    }
  }

  // Appends `count` entries of the window's order, from `first` on, to the page.
  __device__ __forceinline__ void write_entries(const Order& order, int first_tile, int width,
                                                int first, int count) const {
    SmemAddress begin =
        base + Traits::kSmemEntries + (index * Traits::kPageEntries + filled - first) * 4;
    // One address for the compiler, and not a sum to be worked out for every entry.
    asm volatile("" : "+r"(begin));
    order.each(width, [&](int tile, int owners, int place) {
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
  int index = 0;         // of the page to fill next
  uint32_t phase = 0;    // of its barriers
  int marked = 0;        // tiles to be done again
  int slot = 0;          // of the page's first entry, modulo kStagesK * kStagesV
  int filled = kNoPage;  // entries of the open page
  // Of the unit of consumer `lane`: KV tiles that it sees, and its row of bits.
  int tiles = 0;
  const uint32_t* row = nullptr;
};

}  // namespace seer::dev
