// SPDX-License-Identifier: Apache-2.0
#include "block_sparse_attn/launch_checks.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>

#include "common/cuda_status.h"

namespace seer {
namespace {

// Rows are 32-bit in the kernels, with room for sums of two.
constexpr int64_t kMaxRows = int64_t{1} << 30;
constexpr int64_t kMaxStride = INT32_MAX;

// Kernels move 16 bytes at a time. A stride along a dimension of size 1 is never used.
Status check_view(const char* name, const void* data, int64_t batch_stride, int64_t row_stride,
                  int64_t head_stride, bool one_batch, bool one_row, bool one_head) {
  const std::string argument(name);
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) {
    return Status::invalid(argument + ": expected data aligned to 16 bytes, got address " +
                           std::to_string(reinterpret_cast<uintptr_t>(data) % 16) +
                           " modulo 16. Make a contiguous copy.");
  }
  const struct {
    const char* name;
    int64_t stride;
    bool unused;
  } strides[] = {{"batch", batch_stride, one_batch},
                 {"row", row_stride, one_row},
                 {"head", head_stride, one_head}};
  for (const auto& s : strides) {
    if (!s.unused && s.stride % 8 != 0) {
      return Status::invalid(argument +
                             ": expected strides that are multiples of 8 elements, got " + s.name +
                             " stride " + std::to_string(s.stride) + ". Make a contiguous copy.");
    }
  }
  if (!one_row && (row_stride < 0 || row_stride > kMaxStride)) {
    return Status::unsupported(argument + ": expected a row stride below 2^31 elements, got " +
                               std::to_string(row_stride) + ". Make a contiguous copy.");
  }
  return {};
}

Status check_rows(const char* name, int64_t rows) {
  if (rows >= 0 && rows <= kMaxRows) return {};
  return Status::unsupported(std::string(name) + ": expected at most 2^30 rows, got " +
                             std::to_string(rows) + ". Split the sequence.");
}

}  // namespace

Status check_launch_params(const BlockSparseAttnParams& p) {
  if (p.heads_kv <= 0 || p.heads_q % p.heads_kv != 0) {
    return Status::invalid(
        "k: expected heads_kv that divides heads_q = " + std::to_string(p.heads_q) + ", got " +
        std::to_string(p.heads_kv) + ". Give every KV head the same number of query heads.");
  }
  if (!std::isfinite(p.scale)) {
    return Status::invalid("scale: expected a finite number, got " + std::to_string(p.scale) +
                           ". Leave it out for head_dim^-0.5.");
  }
  if ((p.cu_seqlens_q == nullptr) != (p.cu_seqlens_kv == nullptr)) {
    return Status::invalid(
        "cu_seqlens_kv: expected cu_seqlens_q and cu_seqlens_kv together, got "
        "one of them. Pass both or neither.");
  }
  for (const auto& [name, rows] : {std::pair{"q", p.rows_q}, std::pair{"k", p.rows_kv}}) {
    if (Status status = check_rows(name, rows); !status.ok()) return status;
  }
  const bool varlen = p.cu_seqlens_q != nullptr;
  const bool one_batch = varlen || p.batch == 1;
  const bool one_q = (varlen ? p.total_q : p.rows_q) <= 1;
  const bool one_kv = (varlen ? p.total_kv : p.rows_kv) <= 1;
  const auto view = [&](const char* name, const auto& v, bool one_row, int heads) {
    return check_view(name, v.data, v.batch_stride, v.row_stride, v.head_stride, one_batch, one_row,
                      heads == 1);
  };
  if (Status s = view("q", p.q, one_q, p.heads_q); !s.ok()) return s;
  if (Status s = view("k", p.k, one_kv, p.heads_kv); !s.ok()) return s;
  if (Status s = view("v", p.v, one_kv, p.heads_kv); !s.ok()) return s;
  if (Status s = view("out", p.out, one_q, p.heads_q); !s.ok()) return s;

  const BlockBitsView& bits = p.block_bits;
  if (bits.data == nullptr) return {};
  if (bits.heads != 1 && bits.heads != p.heads_kv && bits.heads != p.heads_q) {
    return Status::invalid("block_bits: expected 1, heads_kv = " + std::to_string(p.heads_kv) +
                           " or heads_q = " + std::to_string(p.heads_q) + " heads, got " +
                           std::to_string(bits.heads) + ". Build the mask for these heads.");
  }
  const int64_t words = ceil_div(ceil_div(p.rows_kv, p.block_kv), 32);
  if (bits.words < words) {
    return Status::invalid("block_bits: expected at least " + std::to_string(words) +
                           " words per row for " + std::to_string(p.rows_kv) + " KV rows, got " +
                           std::to_string(bits.words) + ". Build the mask for these lengths.");
  }
  return {};
}

VarlenFillParams varlen_fill_params(const BlockSparseAttnParams& p) {
  VarlenFillParams fill;
  fill.cu_seqlens = p.cu_seqlens_q;
  fill.batch = p.batch;
  fill.heads = p.heads_q;
  fill.total = p.total_q;
  fill.max_rows = p.rows_q;
  fill.out = p.out;
  fill.element_bytes = static_cast<int>(size_of(p.dtype));
  fill.row_bytes = static_cast<int>(p.head_dim * size_of(p.dtype));
  fill.lse = p.lse;
  fill.lse_head_stride = p.lse_head_stride;
  return fill;
}

}  // namespace seer
