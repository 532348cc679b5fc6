// SPDX-License-Identifier: Apache-2.0
#include "seer/attn_pool.h"

#include <cstring>
#include <optional>
#include <tuple>

#include "attention_args.h"
#include "ops.h"
#include "runtime.h"

namespace seer::binding {
namespace {

constexpr Op kOp{"attn_pool"};

Tensor empty_pooled(const AttentionArgs& args, bool per_token) {
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
  if (!per_token)
    return empty({batch_of(args), heads_q, map_rows, blocks_kv}, ScalarType::Float, q);
  if (args.varlen()) return empty({heads_q, map_rows, blocks_kv}, ScalarType::Float, q);
  return empty({batch_of(args), heads_q, map_rows, blocks_kv}, ScalarType::Float, q);
}

void check(const AttentionArgs& args, int64_t reduce) {
  check_attention(kOp, args);
  SEER_EXPECT(kOp, reduce == 0 || reduce == 1, "reduce", "0 (max) or 1 (sum)", number(reduce),
              "Call seer_cuda.attn_pool, which takes names.");
}

// Bytes of workspace for the kernel of family `arch` (0: any) that serves checked arguments on the
// current device, or nothing if none does. A family that was asked for by name must serve them.
std::optional<int64_t> workspace_bytes(const AttentionArgs& args, int64_t arch) {
  auto params = problem_params<AttnPoolParams>(kOp, args);
  params.arch = static_cast<int>(arch);
  int64_t bytes = 0;
  const Status status = attn_pool_workspace(params, &bytes);
  if (arch == 0 && status.code == Code::kUnsupported) return std::nullopt;
  kOp.ok(status);  // an error of the device is told, not hidden behind slower code
  return bytes;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attn_pool_on(const Tensor& q, const Tensor& k, const Tensor& v,
                                                int64_t block_q, int64_t block_kv, bool causal,
                                                std::optional<double> scale, bool per_token,
                                                const std::optional<Tensor>& cu_seqlens_q,
                                                const std::optional<Tensor>& cu_seqlens_kv,
                                                int64_t max_rows_q, int64_t max_rows_kv,
                                                int64_t reduce, int64_t arch) {
  const AttentionArgs args{
      q,          k,          v, block_q, block_kv, causal, scale, cu_seqlens_q, cu_seqlens_kv,
      max_rows_q, max_rows_kv};
  check(args, reduce);
  std::optional<CudaScope> scope;
  std::optional<int64_t> bytes;
  if (q.is_cuda()) {
    scope.emplace(q);
    bytes = workspace_bytes(args, arch);
    if (!bytes) {
      auto [out, lse, pooled] =
          call_op<3>("seer::_attn_pool_torch", q, k, v, block_q, block_kv, causal, scale, per_token,
                     cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv, reduce);
      return {out, lse, pooled};
    }
  }
  Tensor out = empty_out(args), lse = empty_lse(args), pooled = empty_pooled(args, per_token);
  auto params = attention_params<AttnPoolParams>(kOp, args, out, lse);
  params.per_token = per_token;
  params.reduce = static_cast<PoolReduce>(reduce);
  params.pooled = pooled.mutable_data_ptr<float>();
  if (!q.is_cuda()) {
    if (pooled.numel() > 0)
      std::memset(params.pooled, 0, static_cast<size_t>(pooled.numel()) * sizeof(float));
    kOp.ok(attn_pool_cpu(params, torch_parallel_for()));
    return {out, lse, pooled};
  }
  params.arch = static_cast<int>(arch);
  // Freed behind the launch, in the order of the stream: the allocator gives it to nobody earlier.
  const Tensor workspace = empty({*bytes}, ScalarType::Byte, q);
  params.workspace = workspace.mutable_data_ptr();
  kOp.ok(launch_attn_pool(params, scope->stream()));
  return {out, lse, pooled};
}

std::tuple<Tensor, Tensor, Tensor> attn_pool(const Tensor& q, const Tensor& k, const Tensor& v,
                                             int64_t block_q, int64_t block_kv, bool causal,
                                             std::optional<double> scale, bool per_token,
                                             const std::optional<Tensor>& cu_seqlens_q,
                                             const std::optional<Tensor>& cu_seqlens_kv,
                                             int64_t max_rows_q, int64_t max_rows_kv,
                                             int64_t reduce) {
  return attn_pool_on(q, k, v, block_q, block_kv, causal, scale, per_token, cu_seqlens_q,
                      cu_seqlens_kv, max_rows_q, max_rows_kv, reduce, 0);
}

}  // namespace seer::binding
