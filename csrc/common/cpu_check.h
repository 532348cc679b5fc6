// SPDX-License-Identifier: Apache-2.0
// Argument checks of the CPU kernels, for callers that come without the torch binding.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "seer/block_sparse_attn.h"
#include "seer/status.h"

namespace seer::cpu {

inline Status refuse(const std::string& argument, const std::string& expected,
                     const std::string& got, const std::string& remedy) {
  return Status::invalid(argument + ": expected " + expected + ", got " + got + ". " + remedy);
}

// What to do about a sequence longer than the caller's max_rows.
constexpr const char* kRaiseMaxRows = "Raise the matching max_rows argument to the longest length.";

// Contents of one cu_seqlens array: the running sum of the sequence lengths. `total`: packed rows,
// -1 where they are not known. `if_longer`: what to do about a sequence of more than max_rows.
inline Status check_cu_seqlens(const std::string& name, const int32_t* cu_seqlens, int batch,
                               int64_t total, int64_t max_rows, const char* if_longer) {
  if (cu_seqlens[0] != 0)
    return refuse(name, "a first entry of 0", std::to_string(cu_seqlens[0]),
                  "Pass the running sum of the sequence lengths.");
  for (int b = 0; b < batch; ++b) {
    const int64_t length = int64_t{cu_seqlens[b + 1]} - cu_seqlens[b];
    const std::string got = "sequence " + std::to_string(b) + " from " +
                            std::to_string(cu_seqlens[b]) + " to " +
                            std::to_string(cu_seqlens[b + 1]);
    if (length < 0)
      return refuse(name, "entries that do not decrease", got,
                    "Pass the running sum of the sequence lengths.");
    if (length > max_rows)
      return refuse(name, "sequences of at most " + std::to_string(max_rows) + " rows", got,
                    if_longer);
  }
  if (total >= 0 && cu_seqlens[batch] != total)
    return refuse(name, "a last entry of " + std::to_string(total) + ", the packed rows",
                  std::to_string(cu_seqlens[batch]),
                  "Let the sequences cover the packed tensor exactly.");
  return {};
}

inline Status check_attention(const BlockSparseAttnParams& params) {
  for (const auto& [name, block] :
       {std::pair<const char*, int>{"block_q", params.block_q}, {"block_kv", params.block_kv}})
    if (block != 16 && block != 32 && block != 64 && block != 128)
      return refuse(name, "16, 32, 64 or 128", std::to_string(block),
                    "Rebuild the mask at a supported block size.");
  if (params.head_dim < 8 || params.head_dim > 256 || params.head_dim % 8 != 0)
    return refuse("q", "head_dim a multiple of 8 from 8 to 256",
                  "head_dim " + std::to_string(params.head_dim), "Pad head_dim with zeros.");
  if (params.heads_q > 0 && (params.heads_kv < 1 || params.heads_q % params.heads_kv != 0))
    return refuse("k", "heads_kv that divides heads_q = " + std::to_string(params.heads_q),
                  "heads_kv = " + std::to_string(params.heads_kv),
                  "Grouped-query attention needs a whole number of query heads per KV head.");
  if (!std::isfinite(params.scale))
    return refuse("scale", "a finite number", std::to_string(params.scale),
                  "Leave it out for head_dim ** -0.5.");
  const BlockBitsView& bits = params.block_bits;
  if (bits.data != nullptr) {
    if (bits.heads != 1 && bits.heads != params.heads_kv && bits.heads != params.heads_q)
      return refuse("block_bits", "1, heads_kv or heads_q heads", std::to_string(bits.heads),
                    "Build the mask for these heads.");
    const int64_t words = ceil_div(ceil_div(params.rows_kv, params.block_kv), 32);
    if (bits.words < words)
      return refuse("block_bits", "at least " + std::to_string(words) + " words per row",
                    std::to_string(bits.words), "Build the mask for this rows_kv and block_kv.");
  }
  if ((params.cu_seqlens_q == nullptr) != (params.cu_seqlens_kv == nullptr))
    return refuse(params.cu_seqlens_q ? "cu_seqlens_kv" : "cu_seqlens_q",
                  "cu_seqlens_q and cu_seqlens_kv together", "only one of them",
                  "Pass both for packed sequences, or neither.");
  if (params.cu_seqlens_q == nullptr) return {};
  const Status q = check_cu_seqlens("cu_seqlens_q", params.cu_seqlens_q, params.batch,
                                    params.total_q, params.rows_q, kRaiseMaxRows);
  return q.ok() ? check_cu_seqlens("cu_seqlens_kv", params.cu_seqlens_kv, params.batch,
                                   params.total_kv, params.rows_kv, kRaiseMaxRows)
                : q;
}

}  // namespace seer::cpu
