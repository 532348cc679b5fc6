// SPDX-License-Identifier: Apache-2.0
// The table of compiled kernels and the choice among them. Plain host code: the torch-free Python
// module and CPU-only builds contain it too.
#include <algorithm>
#include <string>
#include <vector>

#include "block_sparse_attn/variant.h"

namespace seer {

bool family_runs_on(int family, int sm) {
  return family == 80 ? sm >= SEER_LOWEST_SM : sm == family;
}

bool sm90_addressable(const BlockSparseAttnParams& p) {
  constexpr int64_t kMaxStride = int64_t{1} << 39;  // 2-byte elements
  const bool varlen = p.cu_seqlens_q != nullptr;
  const auto fits = [&](const ConstView& view, int64_t rows, int heads) {
    const auto stride_fits = [](int64_t size, int64_t stride) {
      return size <= 1 || (stride > 0 && stride < kMaxStride);
    };
    return rows > 0 && stride_fits(varlen ? 1 : p.batch, view.batch_stride) &&
           stride_fits(rows, view.row_stride) && stride_fits(heads, view.head_stride);
  };
  const int64_t rows_q = varlen ? p.total_q : p.rows_q;
  const int64_t rows_kv = varlen ? p.total_kv : p.rows_kv;
  return fits(p.q, rows_q, p.heads_q) && fits(p.k, rows_kv, p.heads_kv) &&
         fits(p.v, rows_kv, p.heads_kv);
}

namespace {

bool runs_on(const BlockSparseAttnVariant& variant, int sm) {
  return family_runs_on(variant.sm, sm);
}

bool of_family(const BlockSparseAttnVariant& variant, const BlockSparseAttnParams& params) {
  return params.arch == 0 || params.arch == variant.sm;
}

bool serves(const BlockSparseAttnVariant& variant, const BlockSparseAttnParams& params) {
  return variant.dtype == params.dtype && variant.head_dim == params.head_dim &&
         variant.block_q == params.block_q &&
         (params.block_kv == variant.tile_kv || params.block_kv == 2 * variant.tile_kv) &&
         of_family(variant, params) && (variant.sm != 90 || sm90_addressable(params));
}

// How many fields of the request a kernel misses; the text names the nearest kernels first.
int distance(const BlockSparseAttnVariant& variant, const BlockSparseAttnParams& params, int sm) {
  return (variant.dtype != params.dtype) + (variant.head_dim != params.head_dim) +
         (variant.block_q != params.block_q) + 4 * !runs_on(variant, sm) +
         4 * !of_family(variant, params);
}

std::string fields(DType dtype, int head_dim, int block_q) {
  return std::string(name_of(dtype)) + ", head_dim " + std::to_string(head_dim) + ", block_q " +
         std::to_string(block_q);
}

std::string explain(const BlockSparseAttnParams& params, int sm) {
  const std::string expected = params.arch == 0 ? "variant: expected a compiled kernel"
                                                : "arch: expected a compiled kernel of family " +
                                                      std::to_string(params.arch);
  std::string text = expected + ", got none for sm_" + std::to_string(sm) + ", " +
                     fields(params.dtype, params.head_dim, params.block_q) + ", block_kv " +
                     std::to_string(params.block_kv) + ".";
  std::vector<BlockSparseAttnVariant> rows = block_sparse_attn_variants();
  if (rows.empty()) {
    return text +
           " This build has no CUDA kernels: rebuild it where nvcc is found, or use CPU "
           "tensors.";
  }
  if (params.arch == 90 && !sm90_addressable(params)) {
    text +=
        " Its kernels take q, k and v that are not empty, with strides above 0 and below 2^39 "
        "elements.";
  }
  std::stable_sort(rows.begin(), rows.end(), [&](const auto& a, const auto& b) {
    return distance(a, params, sm) < distance(b, params, sm);
  });
  text += " Nearest kernels of this build:";
  std::vector<std::string> named;  // two families may have kernels for one shape
  for (const auto& row : rows) {
    const std::string shape = fields(row.dtype, row.head_dim, row.block_q);
    if (std::find(named.begin(), named.end(), shape) != named.end()) continue;
    text += (named.empty() ? " (" : "; (") + shape + ", block_kv " + std::to_string(row.tile_kv) +
            " or " + std::to_string(2 * row.tile_kv) + ", sm_" + std::to_string(row.sm) +
            (row.sm == 80 ? " and later)" : ")");
    named.push_back(shape);
    if (named.size() == 3) break;
  }
  return text + ". Convert the inputs to one of these, or use CPU tensors.";
}

}  // namespace

const std::vector<BlockSparseAttnVariant>& block_sparse_attn_variants() {
  static const std::vector<BlockSparseAttnVariant> table = {
#define SEER_VARIANT(name, sm, dtype, ...) {#name, sm, dtype_named(#dtype), __VA_ARGS__},
#include "block_sparse_attn_variants.inc"
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
