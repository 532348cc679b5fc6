// SPDX-License-Identifier: Apache-2.0
// Walks the kept KV tiles of one query block from the last to the first, straight from the block
// bits: no list is ever written.
//
// A warp reads 32 words with one coalesced load (lane l holds word l of a page), so a page covers
// 1024 tiles = 65 536 columns. Finding the next tile costs a find-first-set; an empty word costs
// nothing, since a ballot tells which words of the page hold a bit. Every warp of a CTA walks on
// its own and finds the same tiles.
#pragma once

#include <cstdint>

namespace seer::dev {

// Each of the low 16 bits doubled: bit i goes to bits 2i and 2i + 1.
__device__ __forceinline__ uint32_t double_bits(uint32_t x) {
  x &= 0xffffu;
  x = (x | (x << 8)) & 0x00ff00ffu;
  x = (x | (x << 4)) & 0x0f0f0f0fu;
  x = (x | (x << 2)) & 0x33333333u;
  x = (x | (x << 1)) & 0x55555555u;
  return x | (x << 1);
}

class BlockBitWalk {
 public:
  // words: the bits of this query block, nullptr if every block is kept.
  // doubled: a bit stands for two tiles, not for one.
  // tiles: tiles at or past this index are not walked, whatever the bits say.
  __device__ __forceinline__ BlockBitWalk(const uint32_t* words, bool doubled, int tiles) {
    // Only the first page can reach past the end.
    first_tile_ = max(tiles - 1, 0) / kTilesPerPage * kTilesPerPage;
    const int left = tiles - first_tile_ - lane() * 32;
    page_word_ = left > 0 ? load_word(words, doubled) : 0;
    if (left > 0 && left < 32) page_word_ &= (1u << left) - 1;
    nonempty_ = __ballot_sync(0xffffffffu, page_word_ != 0);
  }

  // The next kept tile, or -1 when there is none left. Takes words and doubled again: a page is
  // turned so seldom that they need not sit in registers in between.
  __device__ __forceinline__ int next(const uint32_t* words, bool doubled) {
    while (current_ == 0) {
      if (nonempty_ == 0) {
        first_tile_ = (first_tile_ & -kTilesPerPage) - kTilesPerPage;
        if (first_tile_ < 0) return -1;
        page_word_ = load_word(words, doubled);
        nonempty_ = __ballot_sync(0xffffffffu, page_word_ != 0);
        continue;
      }
      const int source = 31 - __clz(nonempty_);
      nonempty_ ^= 1u << source;
      current_ = __shfl_sync(0xffffffffu, page_word_, source);
      first_tile_ = (first_tile_ & -kTilesPerPage) + source * 32;
    }
    const int bit = 31 - __clz(current_);
    current_ ^= 1u << bit;
    return first_tile_ + bit;
  }

 private:
  static constexpr int kTilesPerPage = 32 * 32;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }

  // This lane's word of the page in hand.
  __device__ __forceinline__ uint32_t load_word(const uint32_t* words, bool doubled) const {
    if (words == nullptr) return 0xffffffffu;
    const int index = (first_tile_ & -kTilesPerPage) / 32 + lane();
    if (!doubled) return __ldg(words + index);
    return double_bits(__ldg(words + index / 2) >> (index % 2 * 16));
  }

  int first_tile_;        // of the word being walked
  uint32_t page_word_;    // this lane's word of the page
  uint32_t nonempty_;     // words of the page not yet walked that hold a bit
  uint32_t current_ = 0;  // bits of the word being walked, not yet walked
};

}  // namespace seer::dev
