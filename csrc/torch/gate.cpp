// SPDX-License-Identifier: Apache-2.0
// pool_gate, gate_scores, gate_select. On CUDA, what no compiled kernel serves (float32, other
// dimensions, misaligned strides) runs as torch operations: the ops seer::_*_torch, which
// seer_cuda/_composite.py implements.
#include <cmath>

#include "check.h"
#include "ops.h"
#include "runtime.h"
#include "seer/pool_gate.h"

namespace seer::binding {
namespace {

constexpr Op kPoolGate{"pool_gate"};
constexpr Op kGateScores{"gate_scores"};
constexpr Op kGateSelect{"gate_select"};

// Checked before. The gate is small, so float32 is welcome on every device.
DType gate_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

// One call of pool_gate; `out` is allocated and `weight` packed here.
struct PoolGateCall {
  const Tensor& x;
  const std::optional<Tensor>&weight, &cos, &sin, &cu_seqlens;
  int64_t block, pools, max_rows;
  Tensor packed, out;
  PoolGateParams params;

  PoolGateCall(const Tensor& x_, const std::optional<Tensor>& weight_,
               const std::optional<Tensor>& cos_, const std::optional<Tensor>& sin_,
               const std::optional<Tensor>& cu_seqlens_, int64_t block_, int64_t pools_,
               int64_t max_rows_)
      : x(x_),
        weight(weight_),
        cos(cos_),
        sin(sin_),
        cu_seqlens(cu_seqlens_),
        block(block_),
        pools(pools_),
        max_rows(max_rows_) {
    check_pool_gate(x, weight, cos, sin, cu_seqlens, block, pools, max_rows);
    // Small (heads_out * pools * head_dim * gate_dim): packing it costs less than strided reads.
    if (weight) packed = torch::stable::contiguous(*weight);
    params.dtype = gate_dtype(x);
    const int64_t heads_dim = x.dim() - 2;
    params.batch = static_cast<int>(cu_seqlens ? cu_seqlens->size(0) - 1 : x.size(0));
    params.heads = static_cast<int>(x.size(heads_dim));
    params.heads_out = weight ? static_cast<int>(packed.size(0)) : params.heads;
    params.head_dim = static_cast<int>(x.size(heads_dim + 1));
    params.gate_dim = weight ? static_cast<int>(packed.size(2))
                             : __builtin_popcount(static_cast<unsigned>(pools)) * params.head_dim;
    params.rows = cu_seqlens ? max_rows : x.size(1);
    params.block = static_cast<int>(block);
    params.pools = static_cast<int>(pools);
    params.x = const_view(x);
    if (cu_seqlens) {
      params.total = x.size(0);
      params.cu_seqlens = cu_seqlens->const_data_ptr<int32_t>();
    }
    params.weight = weight ? packed.const_data_ptr() : nullptr;
    if (cos) {
      params.cos = cos->const_data_ptr<float>();
      params.sin = sin->const_data_ptr<float>();
      params.rotary_dim = static_cast<int>(2 * cos->size(cos->dim() - 1));
      params.rope_batch_stride = cos->dim() == 3 && cos->size(0) > 1 ? cos->stride(0) : 0;
    }
  }

  void allocate() {
    out = empty({params.batch, ceil_div(params.rows, block), params.heads_out, params.gate_dim},
                x.scalar_type(), x);
    params.out = out.mutable_data_ptr();
  }

  Tensor run() {
    if (x.is_cuda()) {
      CudaScope scope(x);
      if (!pool_gate_served(&params, 1)) {
        return call_op<1>("seer::_pool_gate_torch", x, weight, cos, sin, cu_seqlens, block, pools,
                          max_rows)[0];
      }
      allocate();
      kPoolGate.ok(launch_pool_gate(&params, 1, scope.stream()));
    } else {
      allocate();
      kPoolGate.ok(pool_gate_cpu(params, torch_parallel_for()));
    }
    return out;
  }
};

GateScoresParams gate_params(const GateArgs& args) {
  const Tensor &q_gate = args.q_gate, &k_gate = args.k_gate;
  GateScoresParams params;
  params.dtype = gate_dtype(q_gate);
  params.batch = static_cast<int>(q_gate.size(0));
  params.heads_q = static_cast<int>(q_gate.size(2));
  params.heads_k = static_cast<int>(k_gate.size(2));
  params.gate_dim = static_cast<int>(q_gate.size(3));
  params.blocks_q = q_gate.size(1);
  params.blocks_kv = k_gate.size(1);
  params.causal = args.causal;
  if (args.cu_seqlens_q) {
    params.cu_seqlens_q = args.cu_seqlens_q->const_data_ptr<int32_t>();
    params.cu_seqlens_kv = args.cu_seqlens_kv->const_data_ptr<int32_t>();
  }
  params.block_q = static_cast<int>(args.block_q);
  params.block_kv = static_cast<int>(args.block_kv);
  params.scale = static_cast<float>(
      args.scale ? *args.scale : 1.0 / std::sqrt(static_cast<double>(params.gate_dim)));
  params.q_gate = const_view(q_gate);
  params.k_gate = const_view(k_gate);
  return params;
}

}  // namespace

Tensor pool_gate(const Tensor& x, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 const std::optional<Tensor>& cu_seqlens, int64_t block, int64_t pools,
                 int64_t max_rows) {
  return PoolGateCall(x, weight, cos, sin, cu_seqlens, block, pools, max_rows).run();
}

std::tuple<Tensor, Tensor> pool_gate_pair(
    const Tensor& q, const Tensor& k, const std::optional<Tensor>& weight_q,
    const std::optional<Tensor>& weight_k, const std::optional<Tensor>& cos_q,
    const std::optional<Tensor>& sin_q, const std::optional<Tensor>& cos_k,
    const std::optional<Tensor>& sin_k, int64_t block_q, int64_t block_kv, int64_t pools_q,
    int64_t pools_k, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_kv, int64_t max_rows_q, int64_t max_rows_kv) {
  PoolGateCall call_q(q, weight_q, cos_q, sin_q, cu_seqlens_q, block_q, pools_q, max_rows_q);
  PoolGateCall call_k(k, weight_k, cos_k, sin_k, cu_seqlens_kv, block_kv, pools_k, max_rows_kv);
  kPoolGate.same_device("k", k, "q", q);
  if (q.is_cuda()) {
    CudaScope scope(q);
    PoolGateParams problems[2] = {call_q.params, call_k.params};
    if (pool_gate_served(problems, 2)) {
      call_q.allocate();
      call_k.allocate();
      problems[0].out = call_q.params.out;
      problems[1].out = call_k.params.out;
      kPoolGate.ok(launch_pool_gate(problems, 2, scope.stream()));
      return {call_q.out, call_k.out};
    }
  }
  return {call_q.run(), call_k.run()};
}

Tensor gate_scores(const Tensor& q_gate, const Tensor& k_gate,
                   const std::optional<Tensor>& cu_seqlens_q,
                   const std::optional<Tensor>& cu_seqlens_kv, std::optional<double> scale,
                   bool causal, int64_t block_q, int64_t block_kv) {
  const GateArgs args = {q_gate, k_gate, cu_seqlens_q, cu_seqlens_kv,
                         scale,  causal, block_q,      block_kv};
  check_gate_scores(args);
  GateScoresParams params = gate_params(args);
  const auto allocate = [&] {
    Tensor scores = empty({q_gate.size(0), q_gate.size(2), params.blocks_q, params.blocks_kv},
                          ScalarType::Float, q_gate);
    params.scores = scores.mutable_data_ptr<float>();
    return scores;
  };
  if (!q_gate.is_cuda()) {
    Tensor scores = allocate();
    kGateScores.ok(gate_scores_cpu(params, torch_parallel_for()));
    return scores;
  }
  CudaScope scope(q_gate);
  if (!gate_scores_served(params)) {
    return call_op<1>("seer::_gate_scores_torch", q_gate, k_gate, cu_seqlens_q, cu_seqlens_kv,
                      scale, causal, block_q, block_kv)[0];
  }
  Tensor scores = allocate();
  kGateScores.ok(launch_gate_scores(params, scope.stream()));
  return scores;
}

Tensor gate_select(const Tensor& q_gate, const Tensor& k_gate,
                   const std::optional<Tensor>& cu_seqlens_q,
                   const std::optional<Tensor>& cu_seqlens_kv, std::optional<double> scale,
                   bool causal, int64_t method, double value, int64_t sink, int64_t local,
                   int64_t dense_last_rows, int64_t block_q, int64_t block_kv) {
  const GateArgs args = {q_gate, k_gate, cu_seqlens_q, cu_seqlens_kv,
                         scale,  causal, block_q,      block_kv};
  check_gate_select(args, method, value, sink, local, dense_last_rows);
  GateSelectParams params;
  params.gate = gate_params(args);
  params.method = static_cast<SelectMethod>(method);
  params.value = value;
  params.sink = sink;
  params.local = local;
  params.dense_last_rows = dense_last_rows;
  const auto allocate = [&] {
    Tensor bits = empty(
        {q_gate.size(0), q_gate.size(2), params.gate.blocks_q, ceil_div(params.gate.blocks_kv, 32)},
        ScalarType::Int, q_gate);
    params.block_bits = bits.mutable_data_ptr<int32_t>();
    return bits;
  };
  if (!q_gate.is_cuda()) {
    Tensor bits = allocate();
    kGateSelect.ok(gate_select_cpu(params, torch_parallel_for()));
    return bits;
  }
  CudaScope scope(q_gate);
  if (!gate_select_served(params)) {
    return call_op<1>("seer::_gate_select_torch", q_gate, k_gate, cu_seqlens_q, cu_seqlens_kv,
                      scale, causal, method, value, sink, local, dense_last_rows, block_q,
                      block_kv)[0];
  }
  Tensor bits = allocate();
  kGateSelect.ok(launch_gate_select(params, scope.stream()));
  return bits;
}

}  // namespace seer::binding
