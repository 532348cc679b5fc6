// SPDX-License-Identifier: Apache-2.0
// The tables of the gate's compiled kernels and the choice among them. Plain host code: the
// torch-free Python module and CPU-only builds contain it too.
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "common/variant_key.h"
#include "seer/pool_gate.h"

namespace seer {
namespace {

// Kernels count blocks in 32 bits, with room for sums of two.
constexpr int64_t kMaxBlocks = int64_t{1} << 30;
// gate_select ranks a row of scores in shared memory: this many fit on every GPU.
constexpr int64_t kMaxRankedBlocks = 20000;

bool gate_dim_served(int gate_dim) { return gate_dim == 64 || gate_dim == 128; }

// Kernels move 16 bytes at a time. A stride along a dimension of size 1 is never used.
bool aligned(const ConstView& view, bool one_batch, bool one_row, bool one_head) {
  const auto fits = [](bool unused, int64_t stride) { return unused || stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && fits(one_batch, view.batch_stride) &&
         fits(one_row, view.row_stride) && fits(one_head, view.head_stride);
}

int find(const std::vector<GateVariant>& table, DType dtype, int dim, int sm) {
  for (int i = 0; i < static_cast<int>(table.size()); ++i) {
    if (table[i].dtype == dtype && table[i].dim == dim && sm >= SEER_LOWEST_SM) return i;
  }
  return -1;
}

// "<argument>: expected ..., got ...": no row of the table.
std::string no_row(const std::vector<GateVariant>& table, const char* argument,
                   const char* dim_name, DType dtype, int dim, int sm) {
  const std::string got = std::string(", got ") + name_of(dtype) + ", " + dim_name + " " +
                          std::to_string(dim) + " on sm_" + std::to_string(sm) + ".";
  if (table.empty()) {
    return std::string(argument) + ": expected a build with CUDA kernels" + got +
           " Rebuild it where nvcc is found, or use CPU tensors.";
  }
  std::set<std::string> shapes;
  for (const GateVariant& row : table) {
    shapes.insert(std::string(name_of(row.dtype)) + " " + std::to_string(row.dim));
  }
  std::string text = std::string(argument) + ": expected dtype and " + dim_name + " of ";
  for (const std::string& shape : shapes) text += (shape == *shapes.begin() ? "" : ", ") + shape;
  return text + " on sm_" + std::to_string(SEER_LOWEST_SM) + " or later" + got +
         " Convert it; torch.ops.seer runs it as torch operations.";
}

int refuse(std::string* why_not, std::string text) {
  if (why_not != nullptr) *why_not = std::move(text);
  return -1;
}

int refuse_blocks(std::string* why_not, const char* argument, int64_t blocks) {
  return refuse(why_not, std::string(argument) + ": expected at most 2^30 blocks, got " +
                             std::to_string(blocks) + ". Split the sequence.");
}

constexpr const char* kMisaligned =
    ": expected data and strides that are multiples of 16 bytes, got others. Make a contiguous "
    "copy; torch.ops.seer runs it as torch operations.";

}  // namespace

#define SEER_VARIANT(name, sm, dtype, dim) {#name, sm, dtype_named(#dtype), dim},
const std::vector<GateVariant>& pool_gate_variants() {
  static const std::vector<GateVariant> table = {
#include "pool_gate_variants.inc"
  };
  return table;
}
const std::vector<GateVariant>& gate_scores_variants() {
  static const std::vector<GateVariant> table = {
#include "gate_scores_variants.inc"
  };
  return table;
}
const std::vector<GateVariant>& gate_select_variants() {
  static const std::vector<GateVariant> table = {
#include "gate_select_variants.inc"
  };
  return table;
}
#undef SEER_VARIANT

int find_pool_gate_variant(const PoolGateParams& p, int sm, std::string* why_not) {
  if (p.block < 1) {
    return refuse(why_not,
                  "block: expected at least 1 row, got " + std::to_string(p.block) + ". Use 64.");
  }
  const auto& table = pool_gate_variants();
  const int index = find(table, p.dtype, p.head_dim, sm);
  if (index < 0) return refuse(why_not, no_row(table, "x", "head_dim", p.dtype, p.head_dim, sm));
  if (p.weight != nullptr && !gate_dim_served(p.gate_dim)) {
    return refuse(why_not, "weight: expected gate_dim 64 or 128, got " +
                               std::to_string(p.gate_dim) +
                               ". torch.ops.seer runs it as torch operations.");
  }
  const bool packed = p.cu_seqlens != nullptr;
  if (!aligned(p.x, packed || p.batch == 1, (packed ? p.total : p.rows) == 1, p.heads == 1)) {
    return refuse(why_not, std::string("x") + kMisaligned);
  }
  if (reinterpret_cast<uintptr_t>(p.weight) % 16 != 0) {
    return refuse(why_not, std::string("weight") + kMisaligned);
  }
  if (const int64_t blocks = ceil_div(p.rows, p.block); blocks > kMaxBlocks) {
    return refuse_blocks(why_not, "x", blocks);
  }
  return index;
}

namespace {

int find_for_gates(const std::vector<GateVariant>& table, const GateScoresParams& p, int sm,
                   std::string* why_not) {
  const int index = find(table, p.dtype, p.gate_dim, sm);
  if (index < 0) {
    return refuse(why_not, no_row(table, "q_gate", "gate_dim", p.dtype, p.gate_dim, sm));
  }
  if (!aligned(p.q_gate, p.batch == 1, p.blocks_q == 1, p.heads_q == 1)) {
    return refuse(why_not, std::string("q_gate") + kMisaligned);
  }
  if (!aligned(p.k_gate, p.batch == 1, p.blocks_kv == 1, p.heads_k == 1)) {
    return refuse(why_not, std::string("k_gate") + kMisaligned);
  }
  if (p.blocks_q > kMaxBlocks) return refuse_blocks(why_not, "q_gate", p.blocks_q);
  if (p.blocks_kv > kMaxBlocks) return refuse_blocks(why_not, "k_gate", p.blocks_kv);
  return index;
}

}  // namespace

int find_gate_scores_variant(const GateScoresParams& p, int sm, std::string* why_not) {
  return find_for_gates(gate_scores_variants(), p, sm, why_not);
}

int find_gate_select_variant(const GateSelectParams& p, int sm, std::string* why_not) {
  const int index = find_for_gates(gate_select_variants(), p.gate, sm, why_not);
  if (index >= 0 && p.method != SelectMethod::kThreshold && p.gate.blocks_kv > kMaxRankedBlocks) {
    return refuse(why_not, "k_gate: expected at most " + std::to_string(kMaxRankedBlocks) +
                               " blocks to rank, got " + std::to_string(p.gate.blocks_kv) +
                               ". Use a threshold; torch.ops.seer runs it as torch operations.");
  }
  return index;
}

}  // namespace seer
