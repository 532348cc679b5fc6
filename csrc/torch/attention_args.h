// SPDX-License-Identifier: Apache-2.0
// The arguments block_sparse_attn and attn_pool have in common: checks, and the fields they fill.
#pragma once

#include <cmath>
#include <optional>

#include "check.h"

namespace seer::binding {

struct AttentionArgs {
  const Tensor &q, &k, &v;
  int64_t block_q, block_kv;
  bool causal;
  std::optional<double> scale;
  const std::optional<Tensor>&cu_seqlens_q, &cu_seqlens_kv;
  int64_t max_rows_q, max_rows_kv;

  bool varlen() const { return cu_seqlens_q.has_value(); }
};

// Rank, shape, dtype, device and stride checks of everything above.
void check_attention(const Op& op, const AttentionArgs& args);

// block_bits against checked attention arguments.
void check_block_bits(const Op& op, const Tensor& block_bits, const AttentionArgs& args);

int64_t batch_of(const AttentionArgs& args);
int64_t rows_q_of(const AttentionArgs& args);
int64_t rows_kv_of(const AttentionArgs& args);

// Fills the fields that the two params structs share, but for the outputs.
template <class Params>
Params problem_params(const Op& op, const AttentionArgs& args) {
  const int64_t heads_dim = args.q.dim() - 2;
  Params params;
  params.dtype = op.float_dtype("q", args.q);
  params.batch = static_cast<int>(batch_of(args));
  params.heads_q = static_cast<int>(args.q.size(heads_dim));
  params.heads_kv = static_cast<int>(args.k.size(heads_dim));
  params.head_dim = static_cast<int>(args.q.size(heads_dim + 1));
  params.rows_q = rows_q_of(args);
  params.rows_kv = rows_kv_of(args);
  params.block_q = static_cast<int>(args.block_q);
  params.block_kv = static_cast<int>(args.block_kv);
  params.causal = args.causal;
  params.scale = static_cast<float>(
      args.scale ? *args.scale : 1.0 / std::sqrt(static_cast<double>(params.head_dim)));
  params.q = const_view(args.q);
  params.k = const_view(args.k);
  params.v = const_view(args.v);
  if (args.varlen()) {
    params.total_q = args.q.size(0);
    params.total_kv = args.k.size(0);
    params.cu_seqlens_q = args.cu_seqlens_q->const_data_ptr<int32_t>();
    params.cu_seqlens_kv = args.cu_seqlens_kv->const_data_ptr<int32_t>();
  }
  return params;
}

// The same with outputs, which have been allocated.
template <class Params>
Params attention_params(const Op& op, const AttentionArgs& args, const Tensor& out,
                        const Tensor& lse) {
  Params params = problem_params<Params>(op, args);
  params.out = view_of<void*>(out, out.mutable_data_ptr());
  params.lse = lse.mutable_data_ptr<float>();
  params.lse_batch_stride = args.varlen() ? 0 : lse.stride(0);
  params.lse_head_stride = lse.stride(lse.dim() - 2);
  return params;
}

// lse [batch, heads_q, rows_q], varlen [heads_q, total_q]; `tail` more floats lie behind it
Tensor empty_lse(const AttentionArgs& args, int64_t tail = 0);
// out: q's shape and dtype, contiguous
Tensor empty_out(const AttentionArgs& args);

}  // namespace seer::binding
