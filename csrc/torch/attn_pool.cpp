// SPDX-License-Identifier: Apache-2.0
#include "seer/attn_pool.h"

#include <cstring>
#include <tuple>

#include "attention_args.h"
#include "ops.h"
#include "runtime.h"

namespace seer::binding {
namespace {

constexpr Op kOp{"attn_pool"};

Tensor zero_pooled(const AttentionArgs& args, bool per_token) {
  const Tensor& q = args.q;
  const int64_t heads_q = q.size(q.dim() - 2);
  const int64_t blocks_kv = ceil_div(rows_kv_of(args), args.block_kv);
  const int64_t map_rows =
      per_token ? q.size(q.dim() == 3 ? 0 : 1) : ceil_div(rows_q_of(args), args.block_q);
  constexpr double kMaxElements = 1e15;  // 4 PB: a mistake, and far from overflow
  SEER_EXPECT(kOp, double(batch_of(args)) * heads_q * map_rows * blocks_kv < kMaxElements,
              args.varlen() ? "max_rows_kv" : "k", "a map of fewer than 10^15 elements",
              number(map_rows) + " x " + number(blocks_kv) + " per head",
              "Pass the longest sequence's length.");
  Tensor pooled =
      per_token && args.varlen() ? empty({heads_q, q.size(0), blocks_kv}, ScalarType::Float, q)
      : per_token
          ? empty({batch_of(args), heads_q, q.size(1), blocks_kv}, ScalarType::Float, q)
          : empty({batch_of(args), heads_q, ceil_div(rows_q_of(args), args.block_q), blocks_kv},
                  ScalarType::Float, q);
  if (pooled.numel() > 0)
    std::memset(pooled.mutable_data_ptr(), 0, static_cast<size_t>(pooled.numel()) * sizeof(float));
  return pooled;
}

}  // namespace

void check_attn_pool(const Tensor& q, const Tensor& k, const Tensor& v, int64_t block_q,
                     int64_t block_kv, bool causal, std::optional<double> scale, bool /*per_token*/,
                     const std::optional<Tensor>& cu_seqlens_q,
                     const std::optional<Tensor>& cu_seqlens_kv, int64_t max_rows_q,
                     int64_t max_rows_kv) {
  check_attention(kOp, {q, k, v, block_q, block_kv, causal, scale, cu_seqlens_q, cu_seqlens_kv,
                        max_rows_q, max_rows_kv});
}

std::tuple<Tensor, Tensor, Tensor> attn_pool_cpu_op(const Tensor& q, const Tensor& k,
                                                    const Tensor& v, int64_t block_q,
                                                    int64_t block_kv, bool causal,
                                                    std::optional<double> scale, bool per_token,
                                                    const std::optional<Tensor>& cu_seqlens_q,
                                                    const std::optional<Tensor>& cu_seqlens_kv,
                                                    int64_t max_rows_q, int64_t max_rows_kv) {
  const AttentionArgs args{
      q,          k,          v, block_q, block_kv, causal, scale, cu_seqlens_q, cu_seqlens_kv,
      max_rows_q, max_rows_kv};
  check_attention(kOp, args);
  Tensor out = empty_out(args), lse = empty_lse(args), pooled = zero_pooled(args, per_token);
  auto params = attention_params<AttnPoolParams>(kOp, args, out, lse);
  params.per_token = per_token;
  params.pooled = pooled.mutable_data_ptr<float>();
  kOp.ok(attn_pool_cpu(params, torch_parallel_for()));
  return {out, lse, pooled};
}

}  // namespace seer::binding
