// SPDX-License-Identifier: Apache-2.0
// The argument check of unpack_block_bits, on CPU and CUDA.
#pragma once

#include <string>

#include "seer/block_bits.h"

namespace seer {

inline Status check_unpack(const UnpackBlockBitsParams& params) {
  if (params.blocks_kv <= params.words * 32) return {};
  return Status::invalid("block_bits: expected at least " +
                         std::to_string(ceil_div(params.blocks_kv, 32)) + " words per row, got " +
                         std::to_string(params.words) +
                         ". Pass the number of blocks that the bits were packed for.");
}

}  // namespace seer
