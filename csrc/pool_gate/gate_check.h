// SPDX-License-Identifier: Apache-2.0
// Argument checks of the gate's kernels, on CPU and CUDA, for callers that come without the torch
// binding. No heads at all are nothing to do, not an error.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>

#include "common/cpu_check.h"
#include "seer/pool_gate.h"
#include "seer/status.h"

namespace seer {

inline Status check_gate(const GateScoresParams& params) {
  if (params.heads_q == 0) return {};
  if (params.heads_k < 1 || params.heads_q % params.heads_k != 0)
    return cpu::refuse("k_gate", "heads that divide heads_q = " + std::to_string(params.heads_q),
                       "heads_k = " + std::to_string(params.heads_k),
                       "Use heads_q or heads_kv heads.");
  if ((params.cu_seqlens_q == nullptr) != (params.cu_seqlens_kv == nullptr))
    return cpu::refuse(params.cu_seqlens_q ? "cu_seqlens_kv" : "cu_seqlens_q",
                       "cu_seqlens_q and cu_seqlens_kv together", "only one of them",
                       "Pass both for packed sequences, or neither.");
  for (const auto& [name, block] :
       {std::pair<const char*, int>{"block_q", params.block_q}, {"block_kv", params.block_kv}})
    if (block < 1) return cpu::refuse(name, "at least 1 row", std::to_string(block), "Use 64.");
  if (params.gate_dim < 1)
    return cpu::refuse("q_gate", "gate_dim of at least 1", std::to_string(params.gate_dim),
                       "Embed the blocks with pool_gate.");
  return {};
}

inline Status check_pool_gate(const PoolGateParams& params) {
  if (params.block < 1)
    return cpu::refuse("block", "at least 1 row", std::to_string(params.block), "Use 64.");
  if (params.pools < 1 || params.pools > 7)
    return cpu::refuse("pools", "a bit set of 1 max, 2 min, 4 avg", std::to_string(params.pools),
                       "Use 4 for avg or 7 for max, min and avg.");
  if (params.heads == 0) return {};
  if (params.heads < 1 || params.heads_out < 0 || params.heads_out % params.heads != 0)
    return cpu::refuse("weight", "heads_out a multiple of heads = " + std::to_string(params.heads),
                       std::to_string(params.heads_out), "Give one matrix per output head.");
  if (params.heads_out == 0) return {};
  if (params.head_dim < 1)
    return cpu::refuse("x", "head_dim of at least 1", std::to_string(params.head_dim),
                       "Pass q or k before RoPE.");
  const auto sizes = [](int heads_out, int64_t gate_dim) {
    return "heads_out = " + std::to_string(heads_out) +
           " and gate_dim = " + std::to_string(gate_dim);
  };
  const int64_t channels =
      std::popcount(static_cast<unsigned>(params.pools)) * int64_t{params.head_dim};
  if (params.weight == nullptr && (params.heads_out != params.heads || params.gate_dim != channels))
    return cpu::refuse("weight", "one, or " + sizes(params.heads, channels) + " as pooling gives",
                       "none with " + sizes(params.heads_out, params.gate_dim),
                       "Pass the matrices that make such embeddings, or the sizes of pooling.");
  if (params.gate_dim < 1)
    return cpu::refuse("weight", "gate_dim of at least 1", std::to_string(params.gate_dim),
                       "Give the gate a width.");
  if ((params.cos == nullptr) != (params.sin == nullptr))
    return cpu::refuse(params.cos ? "sin" : "cos", "cos and sin together", "only one of them",
                       "Pass both for RoPE, or neither.");
  if (params.rotary_dim < 0 || params.rotary_dim > params.gate_dim || params.rotary_dim % 2 != 0)
    return cpu::refuse("cos", "an even rotary_dim of at most gate_dim",
                       std::to_string(params.rotary_dim), "Give one column per channel pair.");
  return {};
}

inline Status check_gate_select(const GateSelectParams& params) {
  const auto refuse = [](const char* argument, const char* expected, const std::string& got) {
    return Status::invalid(std::string(argument) + ": expected " + expected + ", got " + got +
                           ". See seer/pool_gate.h for the methods and their values.");
  };
  const int method = static_cast<int>(params.method);
  if (method < 0 || method > static_cast<int>(SelectMethod::kTopP))
    return refuse("method", "one of SelectMethod, 0 to 3", std::to_string(method));
  const std::string got = std::to_string(params.value);
  if (!std::isfinite(params.value)) return refuse("value", "a finite number", got);
  if (params.method == SelectMethod::kDensity && !(params.value >= 0.0 && params.value <= 1.0))
    return refuse("value", "a density from 0 to 1", got);
  for (const auto& [name, count] : {std::pair<const char*, int64_t>{"sink", params.sink},
                                    {"local", params.local},
                                    {"dense_last_rows", params.dense_last_rows}})
    if (count < 0) return refuse(name, "a count of blocks, at least 0", std::to_string(count));
  return check_gate(params.gate);
}

}  // namespace seer
