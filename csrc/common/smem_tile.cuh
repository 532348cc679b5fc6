// SPDX-License-Identifier: Apache-2.0
// How a [rows, head_dim] tile of 16-bit elements lies in shared memory.
//
// The tile is cut into panels of 64 columns (128 bytes, all 32 banks). Inside a panel row r the
// eight 16-byte chunks are permuted: chunk c lies at place c ^ (r % 8). So the eight rows of one
// ldmatrix phase, the eight lanes of one cp.async row and the 4-byte stores of an accumulator all
// touch every bank once: no conflict anywhere.
#pragma once

#include <cute/layout.hpp>
#include <cute/swizzle_layout.hpp>

#include <cstdint>

namespace seer::dev {

template <int kRows, int kCols>
struct SmemTile {
  static_assert(kRows % 16 == 0 && kCols % 64 == 0, "tiles are made of 16-row, 64-column panels");
  static constexpr int kPanels = kCols / 64;
  static constexpr int kRowBytes = 128;  // of one panel
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;

  using Atom = decltype(cute::composition(
      cute::Swizzle<3, 3, 3>{},
      cute::Layout<cute::Shape<cute::_8, cute::_64>, cute::Stride<cute::_64, cute::_1>>{}));
  using Layout =
      decltype(cute::tile_to_shape(Atom{}, cute::Shape<cute::Int<kRows>, cute::Int<kCols>>{}));

  // Byte offset of element (row, col) in the tile.
  __host__ __device__ static constexpr uint32_t offset(int row, int col) {
    return 2u * static_cast<uint32_t>(Layout{}(row, col));
  }

  // Address arithmetic the kernels rely on, so that a lane computes one offset and everything
  // else is a constant of the instruction (+) or one xor:
  //   8 rows down is + 8 rows, a panel right is + kPanelBytes, 16 columns right inside a panel
  //   is ^ 32 (columns < 16 are the starting point).
  static constexpr bool steps_are_constant() {
    for (int row = 0; row < 8; ++row) {
      for (int col = 0; col < 16; col += 8) {
        const uint32_t start = offset(row, col);
        if (offset(row + 8, col) != start + 8 * kRowBytes) return false;
        if (kPanels > 1 && offset(row, col + 64) != start + kPanelBytes) return false;
        for (int step = 0; step < 4; ++step) {
          if (offset(row, col + 16 * step) != (start ^ (32u * step))) return false;
        }
      }
    }
    return true;
  }
  static_assert(steps_are_constant(), "the swizzle lost the steps that the address code uses");
};

// Offsets inside any SmemTile that a lane hands to ldmatrix for the 16x16 submatrix at (0, 0). The
// four 8x8 quarters come in the order in which the mma wants its registers:
//   upper_lower: upper left, lower left, upper right, lower right (A operand; transposed: two B)
//   left_right:  upper left, upper right, lower left, lower right (two B operands, 8 rows each)
struct LaneOffsets {
  uint32_t upper_lower, left_right;

  __device__ __forceinline__ explicit LaneOffsets(int lane)
      : upper_lower(SmemTile<16, 64>::offset(lane % 16, lane / 16 * 8)),
        left_right(SmemTile<16, 64>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8)) {}
};

}  // namespace seer::dev
