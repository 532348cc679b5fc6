// SPDX-License-Identifier: Apache-2.0
// Rows of a packed output that belong to no sequence: out 0, lse -inf.
#pragma once

#include <cstdint>

#include "seer/status.h"
#include "seer/types.h"

struct CUstream_st;

namespace seer {

struct VarlenFillParams {
  const int32_t* cu_seqlens = nullptr;  // [batch + 1], device
  int batch = 0;
  int heads = 0;
  int64_t total = 0;     // packed rows
  int64_t max_rows = 0;  // a sequence owns at most this many rows from its start
  MutView out;           // [total, heads, row_bytes / element_bytes]
  int element_bytes = 2;
  int row_bytes = 0;     // bytes of one head's row, a multiple of 16
  float* lse = nullptr;  // [heads, total]
  int64_t lse_head_stride = 0;
};

// Writes only the rows that no sequence covers; with well-formed cu_seqlens it writes nothing.
Status fill_uncovered_rows(const VarlenFillParams& params, CUstream_st* stream);

}  // namespace seer
