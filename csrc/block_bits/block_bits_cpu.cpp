// SPDX-License-Identifier: Apache-2.0
#include "seer/block_bits.h"

#include <algorithm>

#include "block_bits/unpack_check.h"

namespace seer {
namespace {

// Rows per task, so that a task touches some 64 KiB whatever the row length.
int64_t grain(int64_t blocks_kv) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, blocks_kv));
}

}  // namespace

Status pack_block_bits_cpu(const PackBlockBitsParams& params, const ParallelFor& parallel_for) {
  const int64_t words = ceil_div(params.blocks_kv, 32);
  if (params.rows == 0 || words == 0) return {};
  parallel_for(params.rows, grain(params.blocks_kv), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* mask = params.mask + row * params.blocks_kv;
      for (int64_t word = 0; word < words; ++word) {
        const int64_t count = std::min<int64_t>(32, params.blocks_kv - word * 32);
        uint32_t bits = 0;
        for (int64_t i = 0; i < count; ++i) bits |= (mask[word * 32 + i] != 0 ? 1u : 0u) << i;
        params.bits[row * words + word] = static_cast<int32_t>(bits);
      }
    }
  });
  return {};
}

Status unpack_block_bits_cpu(const UnpackBlockBitsParams& params, const ParallelFor& parallel_for) {
  if (Status status = check_unpack(params); !status.ok()) return status;
  if (params.rows == 0 || params.blocks_kv == 0) return {};
  parallel_for(params.rows, grain(params.blocks_kv), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* bits = params.bits + row * params.words;
      uint8_t* mask = params.mask + row * params.blocks_kv;
      for (int64_t j = 0; j < params.blocks_kv; ++j)
        mask[j] = static_cast<uint32_t>(bits[j / 32]) >> (j % 32) & 1u;
    }
  });
  return {};
}

Status block_bits_from_indices_cpu(const BlockBitsFromIndicesParams& params,
                                   const ParallelFor& parallel_for) {
  const int64_t words = ceil_div(params.blocks_kv, 32);
  if (params.rows == 0 || words == 0) return {};
  parallel_for(params.rows, grain(params.blocks_kv), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      auto* bits = reinterpret_cast<uint32_t*>(params.bits + row * words);
      std::fill_n(bits, words, 0u);
      const int32_t* indices = params.indices + row * params.capacity;
      const int64_t count = std::min<int64_t>(params.counts[row], params.capacity);
      for (int64_t i = 0; i < count; ++i)
        if (indices[i] >= 0 && indices[i] < params.blocks_kv)
          bits[indices[i] / 32] |= 1u << (indices[i] % 32);
    }
  });
  return {};
}

}  // namespace seer
