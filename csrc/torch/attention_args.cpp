// SPDX-License-Identifier: Apache-2.0
#include "attention_args.h"

#include <limits>
#include <sstream>

#include "runtime.h"

namespace seer::binding {
namespace {

void check_block(const Op& op, const char* name, int64_t block, bool cuda) {
  const bool known = block == 64 || block == 128 || (!cuda && (block == 16 || block == 32));
  SEER_EXPECT(op, known, name, cuda ? "64 or 128" : "16, 32, 64 or 128", number(block),
              "Rebuild the mask at a supported block size.");
}

}  // namespace

int64_t batch_of(const AttentionArgs& args) {
  return args.varlen() ? args.cu_seqlens_q->size(0) - 1 : args.q.size(0);
}
int64_t rows_q_of(const AttentionArgs& args) {
  return args.varlen() ? args.max_rows_q : args.q.size(1);
}
int64_t rows_kv_of(const AttentionArgs& args) {
  return args.varlen() ? args.max_rows_kv : args.k.size(1);
}

void check_attention(const Op& op, const AttentionArgs& args) {
  const Tensor &q = args.q, &k = args.k, &v = args.v;
  const bool varlen = args.varlen();
  if (args.cu_seqlens_q.has_value() != args.cu_seqlens_kv.has_value())
    op.fail(varlen ? "cu_seqlens_kv" : "cu_seqlens_q", "cu_seqlens_q and cu_seqlens_kv together",
            "only one of them", "Pass both for packed sequences, or neither.");
  const int64_t rank = varlen ? 3 : 4;
  const char* q_layout = varlen ? "[total_q, heads_q, head_dim] with cu_seqlens"
                                : "[batch, rows_q, heads_q, head_dim]";
  const char* kv_layout = varlen ? "[total_kv, heads_kv, head_dim] with cu_seqlens"
                                 : "[batch, rows_kv, heads_kv, head_dim]";
  op.rank("q", q, rank, q_layout);
  op.rank("k", k, rank, kv_layout);
  op.rank("v", v, rank, kv_layout);
  op.int_sizes("q", q, rank - 3);
  op.int_sizes("k", k, rank - 3);
  op.same_device("k", k, "q", q);
  op.same_device("v", v, "q", q);
  op.float_dtype("q", q);
  op.same_dtype("k", k, "q", q);
  op.same_dtype("v", v, "q", q);

  const int64_t heads_q = q.size(rank - 2), head_dim = q.size(rank - 1);
  const int64_t heads_kv = k.size(rank - 2);
  SEER_EXPECT(op, head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0, "q",
              "head_dim a multiple of 8 from 8 to 256", "head_dim " + number(head_dim),
              "Pad head_dim with zeros.");
  SEER_EXPECT(op, k.size(rank - 1) == head_dim, "k", "head_dim " + number(head_dim) + " as q has",
              "shape " + shape_of(k), "Give q and k the same head_dim.");
  bool same_kv = true;
  for (int64_t d = 0; d < rank; ++d) same_kv = same_kv && k.size(d) == v.size(d);
  SEER_EXPECT(op, same_kv, "v", "the shape of k, " + shape_of(k), "shape " + shape_of(v),
              "Give k and v the same shape.");
  if (!varlen)
    SEER_EXPECT(op, k.size(0) == q.size(0), "k", "batch " + number(q.size(0)) + " as q has",
                "shape " + shape_of(k), "Give q, k and v the same batch.");
  SEER_EXPECT(op, heads_q == 0 || (heads_kv > 0 && heads_q % heads_kv == 0), "k",
              "heads_kv that divides heads_q = " + number(heads_q),
              "heads_kv = " + number(heads_kv),
              "Grouped-query attention needs a whole number of query heads per KV head.");
  op.unit_last_stride("q", q);
  op.unit_last_stride("k", k);
  op.unit_last_stride("v", v);
  check_block(op, "block_q", args.block_q, q.is_cuda());
  check_block(op, "block_kv", args.block_kv, q.is_cuda());
  if (args.scale)
    SEER_EXPECT(op, std::isfinite(static_cast<float>(*args.scale)), "scale",
                "a finite float32 number", number(*args.scale),
                "Leave it out for head_dim ** -0.5.");

  if (varlen) {
    op.cu_seqlens("cu_seqlens_q", *args.cu_seqlens_q, "q", q);
    op.cu_seqlens("cu_seqlens_kv", *args.cu_seqlens_kv, "q", q);
    SEER_EXPECT(op, args.cu_seqlens_kv->size(0) == args.cu_seqlens_q->size(0), "cu_seqlens_kv",
                number(args.cu_seqlens_q->size(0)) + " entries as cu_seqlens_q has",
                number(args.cu_seqlens_kv->size(0)), "Describe the same batch in both.");
    op.max_rows("max_rows_q", args.max_rows_q);
    op.max_rows("max_rows_kv", args.max_rows_kv);
  } else {
    constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
    SEER_EXPECT(op, q.size(1) <= kMaxRows, "q", "fewer than 2^31 rows", number(q.size(1)),
                "Split the sequence.");
    SEER_EXPECT(op, k.size(1) <= kMaxRows, "k", "fewer than 2^31 rows", number(k.size(1)),
                "Split the sequence.");
  }
}

void check_block_bits(const Op& op, const Tensor& block_bits, const AttentionArgs& args) {
  const int64_t rank = args.q.dim();
  const int64_t heads_q = args.q.size(rank - 2), heads_kv = args.k.size(rank - 2);
  const int64_t batch = batch_of(args);
  const int64_t blocks_q = ceil_div(rows_q_of(args), args.block_q);
  const int64_t words = ceil_div(ceil_div(rows_kv_of(args), args.block_kv), 32);
  op.dtype("block_bits", block_bits, ScalarType::Int);
  op.same_device("block_bits", block_bits, "q", args.q);
  op.rank("block_bits", block_bits, 4, "[batch, heads, blocks_q, words]");
  const int64_t heads = block_bits.size(1);
  const bool fits = (block_bits.size(0) == batch || block_bits.size(0) == 1) &&
                    (heads == heads_q || heads == heads_kv || heads == 1) &&
                    block_bits.size(2) == blocks_q && block_bits.size(3) >= words;
  if (!fits) {
    std::ostringstream contract;
    contract << "[" << batch << " or 1, " << heads_q << ", " << heads_kv << " or 1, " << blocks_q
             << ", at least " << words << "]";
    op.fail("block_bits", contract.str(), "shape " + shape_of(block_bits),
            "Build the mask with seer_cuda.BlockMask for these lengths and block sizes.");
  }
  op.unit_last_stride("block_bits", block_bits);
}

Tensor empty_lse(const AttentionArgs& args, int64_t tail) {
  const Tensor& q = args.q;
  if (args.varlen()) return empty({q.size(1), q.size(0)}, ScalarType::Float, q, tail);
  return empty({q.size(0), q.size(2), q.size(1)}, ScalarType::Float, q, tail);
}

Tensor empty_out(const AttentionArgs& args) {
  const Tensor& q = args.q;
  if (args.varlen()) return empty({q.size(0), q.size(1), q.size(2)}, q.scalar_type(), q);
  return empty({q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type(), q);
}

}  // namespace seer::binding
