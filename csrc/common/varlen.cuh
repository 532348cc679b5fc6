// SPDX-License-Identifier: Apache-2.0
// Where a sequence of a packed (varlen) batch lies.
#pragma once

#include <cstdint>

namespace seer::dev {

struct RowRange {
  int64_t start;  // first packed row
  int rows;
};

// Rows of sequence `b`. Whatever cu_seqlens holds, the range lies inside [0, total) and is at most
// max_rows long: bad metadata can give wrong numbers but never an access out of bounds.
__device__ __forceinline__ RowRange sequence_rows(const int32_t* cu_seqlens, int b, int64_t total,
                                                  int64_t max_rows) {
  const int64_t start = min(max(int64_t{cu_seqlens[b]}, int64_t{0}), total);
  const int64_t end = min(max(int64_t{cu_seqlens[b + 1]}, int64_t{0}), total);
  return {start, static_cast<int>(min(max(end - start, int64_t{0}), max_rows))};
}

}  // namespace seer::dev
