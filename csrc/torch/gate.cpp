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
  const std::optional<Tensor>&weight, &cos, &sin;
  int64_t block, pools;
  Tensor packed, out;
  PoolGateParams params;

  PoolGateCall(const Tensor& x_, const std::optional<Tensor>& weight_,
               const std::optional<Tensor>& cos_, const std::optional<Tensor>& sin_, int64_t block_,
               int64_t pools_)
      : x(x_), weight(weight_), cos(cos_), sin(sin_), block(block_), pools(pools_) {
    check_pool_gate(x, weight, cos, sin, block, pools);
    // Small (heads_out * pools * head_dim * gate_dim): packing it costs less than strided reads.
    if (weight) packed = torch::stable::contiguous(*weight);
    params.dtype = gate_dtype(x);
    params.batch = static_cast<int>(x.size(0));
    params.heads = static_cast<int>(x.size(2));
    params.heads_out = weight ? static_cast<int>(packed.size(0)) : params.heads;
    params.head_dim = static_cast<int>(x.size(3));
    params.gate_dim = weight ? static_cast<int>(packed.size(2))
                             : __builtin_popcount(static_cast<unsigned>(pools)) * params.head_dim;
    params.rows = x.size(1);
    params.block = static_cast<int>(block);
    params.pools = static_cast<int>(pools);
    params.x = const_view(x);
    params.weight = weight ? packed.const_data_ptr() : nullptr;
    if (cos) {
      params.cos = cos->const_data_ptr<float>();
      params.sin = sin->const_data_ptr<float>();
      params.rotary_dim = static_cast<int>(2 * cos->size(cos->dim() - 1));
      params.rope_batch_stride = cos->dim() == 3 && cos->size(0) > 1 ? cos->stride(0) : 0;
    }
  }

  void allocate() {
    out = empty({x.size(0), ceil_div(x.size(1), block), params.heads_out, params.gate_dim},
                x.scalar_type(), x);
    params.out = out.mutable_data_ptr();
  }

  Tensor run() {
    if (x.is_cuda()) {
      CudaScope scope(x);
      if (!pool_gate_served(&params, 1)) {
        return call_op<1>("seer::_pool_gate_torch", x, weight, cos, sin, block, pools)[0];
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

GateScoresParams gate_params(const Tensor& q_gate, const Tensor& k_gate,
                             std::optional<double> scale, bool causal) {
  GateScoresParams params;
  params.dtype = gate_dtype(q_gate);
  params.batch = static_cast<int>(q_gate.size(0));
  params.heads_q = static_cast<int>(q_gate.size(2));
  params.heads_k = static_cast<int>(k_gate.size(2));
  params.gate_dim = static_cast<int>(q_gate.size(3));
  params.blocks_q = q_gate.size(1);
  params.blocks_kv = k_gate.size(1);
  params.causal = causal;
  params.scale =
      static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(params.gate_dim)));
  params.q_gate = const_view(q_gate);
  params.k_gate = const_view(k_gate);
  return params;
}

}  // namespace

Tensor pool_gate(const Tensor& x, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, int64_t block,
                 int64_t pools) {
  return PoolGateCall(x, weight, cos, sin, block, pools).run();
}

std::tuple<Tensor, Tensor> pool_gate_pair(const Tensor& q, const Tensor& k,
                                          const std::optional<Tensor>& weight_q,
                                          const std::optional<Tensor>& weight_k,
                                          const std::optional<Tensor>& cos_q,
                                          const std::optional<Tensor>& sin_q,
                                          const std::optional<Tensor>& cos_k,
                                          const std::optional<Tensor>& sin_k, int64_t block_q,
                                          int64_t block_kv, int64_t pools_q, int64_t pools_k) {
  PoolGateCall call_q(q, weight_q, cos_q, sin_q, block_q, pools_q);
  PoolGateCall call_k(k, weight_k, cos_k, sin_k, block_kv, pools_k);
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

Tensor gate_scores(const Tensor& q_gate, const Tensor& k_gate, std::optional<double> scale,
                   bool causal) {
  check_gate_scores(q_gate, k_gate, scale, causal);
  GateScoresParams params = gate_params(q_gate, k_gate, scale, causal);
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
    return call_op<1>("seer::_gate_scores_torch", q_gate, k_gate, scale, causal)[0];
  }
  Tensor scores = allocate();
  kGateScores.ok(launch_gate_scores(params, scope.stream()));
  return scores;
}

Tensor gate_select(const Tensor& q_gate, const Tensor& k_gate, std::optional<double> scale,
                   bool causal, int64_t method, double value, int64_t sink, int64_t local,
                   int64_t dense_last_rows) {
  check_gate_select(q_gate, k_gate, scale, causal, method, value, sink, local, dense_last_rows);
  GateSelectParams params;
  params.gate = gate_params(q_gate, k_gate, scale, causal);
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
    return call_op<1>("seer::_gate_select_torch", q_gate, k_gate, scale, causal, method, value,
                      sink, local, dense_last_rows)[0];
  }
  Tensor bits = allocate();
  kGateSelect.ok(launch_gate_select(params, scope.stream()));
  return bits;
}

}  // namespace seer::binding
