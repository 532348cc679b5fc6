// SPDX-License-Identifier: Apache-2.0
// Packing, unpacking and building of block bits. `rows` counts the rows of all leading dimensions.
#pragma once

#include <cstdint>

#include "seer/status.h"
#include "seer/types.h"

struct CUstream_st;

namespace seer {

struct PackBlockBitsParams {
  const uint8_t* mask = nullptr;  // [rows, blocks_kv], 0 or not 0
  int32_t* bits = nullptr;        // [rows, ceil(blocks_kv / 32)]; bits past blocks_kv are written 0
  int64_t rows = 0;
  int64_t blocks_kv = 0;
};

struct UnpackBlockBitsParams {
  const int32_t* bits = nullptr;  // [rows, words]
  uint8_t* mask = nullptr;        // [rows, blocks_kv], written 0 or 1
  int64_t rows = 0;
  int64_t words = 0;
  int64_t blocks_kv = 0;  // <= words * 32
};

struct BlockBitsFromIndicesParams {
  const int32_t* indices =
      nullptr;  // [rows, capacity], any order; entries outside [0, blocks_kv) are ignored
  const int32_t* counts = nullptr;  // [rows]; only the first min(count, capacity) entries are read
  int32_t* bits = nullptr;          // [rows, ceil(blocks_kv / 32)]
  int64_t rows = 0;
  int64_t capacity = 0;
  int64_t blocks_kv = 0;
};

Status launch_pack_block_bits(const PackBlockBitsParams& params, CUstream_st* stream);
Status launch_unpack_block_bits(const UnpackBlockBitsParams& params, CUstream_st* stream);
Status launch_block_bits_from_indices(const BlockBitsFromIndicesParams& params,
                                      CUstream_st* stream);

Status pack_block_bits_cpu(const PackBlockBitsParams& params, const ParallelFor& parallel_for);
Status unpack_block_bits_cpu(const UnpackBlockBitsParams& params, const ParallelFor& parallel_for);
Status block_bits_from_indices_cpu(const BlockBitsFromIndicesParams& params,
                                   const ParallelFor& parallel_for);

}  // namespace seer
