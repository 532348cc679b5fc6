// SPDX-License-Identifier: Apache-2.0
// The table of compiled kernels and the choice among them. Plain host code: the torch-free Python
// module and CPU-only builds contain it too.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "block_sparse_attn/variant.h"

namespace seer {
namespace {

// Portable kernels run on every GPU from the lowest architecture on that this build was made for;
// the others only on the architecture they name.
bool runs_on(const BlockSparseAttnVariant& variant, int sm) {
  return variant.sm == 80 ? sm >= SEER_LOWEST_SM : sm == variant.sm;
}

bool serves(const BlockSparseAttnVariant& variant, const BlockSparseAttnParams& params) {
  return variant.dtype == params.dtype && variant.head_dim == params.head_dim &&
         variant.block_q == params.block_q &&
         (params.block_kv == variant.tile_kv || params.block_kv == 2 * variant.tile_kv);
}

// How many fields of the request a kernel misses; the text names the nearest kernels first.
int distance(const BlockSparseAttnVariant& variant, const BlockSparseAttnParams& params, int sm) {
  return (variant.dtype != params.dtype) + (variant.head_dim != params.head_dim) +
         (variant.block_q != params.block_q) + 4 * !runs_on(variant, sm);
}

std::string fields(DType dtype, int head_dim, int block_q) {
  return std::string(name_of(dtype)) + ", head_dim " + std::to_string(head_dim) + ", block_q " +
         std::to_string(block_q);
}

std::string explain(const BlockSparseAttnParams& params, int sm) {
  std::string text = "variant: expected a compiled kernel, got none for sm_" + std::to_string(sm) +
                     ", " + fields(params.dtype, params.head_dim, params.block_q) + ", block_kv " +
                     std::to_string(params.block_kv) + ".";
  std::vector<BlockSparseAttnVariant> rows = block_sparse_attn_variants();
  if (rows.empty()) {
    return text +
           " This build has no CUDA kernels: rebuild it where nvcc is found, or use CPU "
           "tensors.";
  }
  std::stable_sort(rows.begin(), rows.end(), [&](const auto& a, const auto& b) {
    return distance(a, params, sm) < distance(b, params, sm);
  });
  text += " Nearest kernels of this build:";
  for (size_t i = 0; i < std::min<size_t>(rows.size(), 3); ++i) {
    text += (i == 0 ? " (" : "; (") + fields(rows[i].dtype, rows[i].head_dim, rows[i].block_q) +
            ", block_kv " + std::to_string(rows[i].tile_kv) + " or " +
            std::to_string(2 * rows[i].tile_kv) + ", sm_" + std::to_string(rows[i].sm) +
            (rows[i].sm == 80 ? " and later)" : ")");
  }
  return text + ". Convert the inputs to one of these, or use CPU tensors.";
}

}  // namespace

const std::vector<BlockSparseAttnVariant>& block_sparse_attn_variants() {
  static const std::vector<BlockSparseAttnVariant> table = {
#define SEER_VARIANT(name, sm, dtype, ...) {#name, sm, dtype_named(#dtype), __VA_ARGS__},
#include "variants.inc"
#undef SEER_VARIANT
  };
  return table;
}

int find_block_sparse_attn_variant(const BlockSparseAttnParams& params, int sm,
                                   std::string* why_not) {
  const auto& table = block_sparse_attn_variants();
  int best = -1;
  for (int i = 0; i < static_cast<int>(table.size()); ++i) {
    if (!runs_on(table[i], sm) || !serves(table[i], params)) continue;
    if (best < 0 || table[i].sm > table[best].sm) best = i;
  }
  if (best < 0 && why_not != nullptr) *why_not = explain(params, sm);
  return best;
}

}  // namespace seer
