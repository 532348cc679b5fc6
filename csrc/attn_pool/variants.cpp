// SPDX-License-Identifier: Apache-2.0
// The table of compiled attn_pool kernels and the choice among them (block_sparse_attn/variants.cpp).
#include <string>
#include <vector>

#include "attn_pool/dense.h"
#include "attn_pool/variant.h"

namespace seer {
namespace {

bool serves(const AttnPoolVariant& variant, const AttnPoolParams& params) {
  const bool blocks =
      (params.block_q == variant.rows || params.block_q == 2 * variant.rows) &&
      (params.block_kv == variant.tile_kv || params.block_kv == 2 * variant.tile_kv);
  return blocks && variant.dtype == params.dtype && variant.head_dim == params.head_dim &&
         (params.arch == 0 || params.arch == variant.sm) &&
         (variant.sm != 90 || sm90_addressable(as_dense(params)));
}

std::string explain(const AttnPoolParams& params, int sm) {
  const std::string expected = params.arch == 0 ? "variant: expected a compiled kernel"
                                                : "arch: expected a compiled kernel of family " +
                                                      std::to_string(params.arch);
  std::string text = expected + ", got none for sm_" + std::to_string(sm) + ", " +
                     name_of(params.dtype) + ", head_dim " + std::to_string(params.head_dim) +
                     ", block_q " + std::to_string(params.block_q) + ", block_kv " +
                     std::to_string(params.block_kv) + ".";
  if (attn_pool_variants().empty()) {
    return text +
           " This build has no CUDA kernels: rebuild it where nvcc is found, or use CPU tensors.";
  }
  text += " Kernels of this build:";
  const char* separator = " ";
  for (const auto& row : attn_pool_variants()) {
    text += separator + std::string(name_of(row.dtype)) + ", head_dim " +
            std::to_string(row.head_dim) + ", blocks of " + std::to_string(row.rows) + " or " +
            std::to_string(2 * row.rows) + ", sm_" + std::to_string(row.sm) +
            (row.sm == 80 ? " and later" : "");
    separator = "; ";
  }
  return text + ". Convert the inputs to one of these, or use CPU tensors.";
}

}  // namespace

const std::vector<AttnPoolVariant>& attn_pool_variants() {
  static const std::vector<AttnPoolVariant> table = {
#define SEER_VARIANT(name, sm, dtype, ...) {#name, sm, dtype_named(#dtype), __VA_ARGS__},
#include "attn_pool_variants.inc"
#undef SEER_VARIANT
  };
  return table;
}

int find_attn_pool_variant(const AttnPoolParams& params, int sm, std::string* why_not) {
  const auto& table = attn_pool_variants();
  int best = -1;
  for (int i = 0; i < static_cast<int>(table.size()); ++i) {
    if (!family_runs_on(table[i].sm, sm) || !serves(table[i], params)) continue;
    if (best < 0 || table[i].sm > table[best].sm) best = i;
  }
  if (best < 0 && why_not != nullptr) *why_not = explain(params, sm);
  return best;
}

int64_t attn_pool_map_elements(const AttnPoolParams& params) {
  if (params.block_q < 1 || params.block_kv < 1) return 0;
  const bool packed = params.cu_seqlens_q != nullptr;
  const int64_t heads =
      params.per_token && packed ? params.heads_q : int64_t{params.batch} * params.heads_q;
  const int64_t rows = !params.per_token ? ceil_div(params.rows_q, params.block_q)
                       : packed          ? params.total_q
                                         : params.rows_q;
  return heads * rows * ceil_div(params.rows_kv, params.block_kv);
}

}  // namespace seer
