// SPDX-License-Identifier: Apache-2.0
// pool_gate, gate_scores, gate_select.
#include <cmath>
#include <limits>

#include "check.h"
#include "ops.h"
#include "runtime.h"
#include "seer/pool_gate.h"

namespace seer::binding {
namespace {

constexpr Op kPoolGate{"pool_gate"};
constexpr Op kGateScores{"gate_scores"};
constexpr Op kGateSelect{"gate_select"};

void check_rope(const Tensor& x, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                int64_t blocks, int64_t gate_dim) {
  if (cos.has_value() != sin.has_value())
    kPoolGate.fail(cos ? "sin" : "cos", "cos and sin together", "only one of them",
                   "Pass both for RoPE, or neither.");
  if (!cos) return;
  for (const auto& [name, table] : {std::pair<const char*, const Tensor&>{"cos", *cos},
                                    std::pair<const char*, const Tensor&>{"sin", *sin}}) {
    kPoolGate.same_device(name, table, "x", x);
    kPoolGate.dtype(name, table, ScalarType::Float);
    const bool rank = table.dim() == 2 || table.dim() == 3;
    const bool fits = rank && table.size(table.dim() - 2) == blocks &&
                      2 * table.size(table.dim() - 1) <= gate_dim &&
                      (table.dim() == 2 || table.size(0) == 1 || table.size(0) == x.size(0));
    SEER_EXPECT(kPoolGate, fits, name,
                "[blocks = " + number(blocks) + ", at most " + number(gate_dim / 2) +
                    "], with or without a leading batch of " + number(x.size(0)) + " or 1",
                "shape " + shape_of(table),
                "Evaluate RoPE at each block's first token, one column per channel pair.");
    SEER_EXPECT(kPoolGate, table.is_contiguous(), name, "a contiguous tensor", "strides with gaps",
                "Call .contiguous() on it.");
  }
  SEER_EXPECT(kPoolGate, shape_of(*cos) == shape_of(*sin), "sin",
              "the shape of cos, " + shape_of(*cos), "shape " + shape_of(*sin),
              "Build both tables together.");
}

GateScoresParams gate_params(const Op& op, const Tensor& q_gate, const Tensor& k_gate,
                             std::optional<double> scale, bool causal) {
  GateScoresParams params;
  params.dtype = op.float_dtype("q_gate", q_gate);
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

void check_gates(const Op& op, const Tensor& q_gate, const Tensor& k_gate,
                 std::optional<double> scale) {
  op.rank("q_gate", q_gate, 4, "[batch, blocks_q, heads_q, gate_dim]");
  op.rank("k_gate", k_gate, 4, "[batch, blocks_kv, heads_k, gate_dim]");
  op.same_device("k_gate", k_gate, "q_gate", q_gate);
  // The gate is small, so float32 embeddings are welcome on every device.
  if (q_gate.scalar_type() != ScalarType::Float) op.float_dtype("q_gate", q_gate);
  op.same_dtype("k_gate", k_gate, "q_gate", q_gate);
  SEER_EXPECT(op, q_gate.size(3) >= 1, "q_gate", "gate_dim of at least 1", "gate_dim 0",
              "Embed the blocks with pool_gate.");
  SEER_EXPECT(op, k_gate.size(0) == q_gate.size(0) && k_gate.size(3) == q_gate.size(3), "k_gate",
              "batch " + number(q_gate.size(0)) + " and gate_dim " + number(q_gate.size(3)) +
                  " as q_gate has",
              "shape " + shape_of(k_gate), "Embed q and k with the same gate.");
  const int64_t heads_q = q_gate.size(2), heads_k = k_gate.size(2);
  SEER_EXPECT(op, heads_q == 0 || (heads_k > 0 && heads_q % heads_k == 0), "k_gate",
              "heads that divide heads_q = " + number(heads_q), "heads_k = " + number(heads_k),
              "Use heads_q or heads_kv heads.");
  op.unit_last_stride("q_gate", q_gate);
  op.unit_last_stride("k_gate", k_gate);
  if (scale)
    SEER_EXPECT(op, std::isfinite(static_cast<float>(*scale)), "scale", "a finite float32 number",
                number(*scale), "Leave it out for gate_dim ** -0.5.");
}

}  // namespace

void check_pool_gate(const Tensor& x, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                     int64_t block, int64_t pools) {
  kPoolGate.rank("x", x, 4, "[batch, rows, heads, head_dim]");
  if (x.scalar_type() != ScalarType::Float) kPoolGate.float_dtype("x", x);
  kPoolGate.unit_last_stride("x", x);
  SEER_EXPECT(kPoolGate, x.size(3) >= 1, "x", "head_dim of at least 1", "head_dim 0",
              "Pass q or k before RoPE.");
  SEER_EXPECT(kPoolGate, block >= 1 && block <= std::numeric_limits<int32_t>::max(), "block",
              "1 to 2^31 - 1 rows", number(block), "Use 64.");
  SEER_EXPECT(kPoolGate, pools >= 1 && pools <= 7, "pools", "a bit set of 1 max, 2 min, 4 avg",
              number(pools), "Use 4 for avg or 7 for max, min and avg.");
  const int64_t channels = __builtin_popcountll(static_cast<uint64_t>(pools)) * x.size(3);
  int64_t gate_dim = channels;
  if (weight) {
    kPoolGate.rank("weight", *weight, 3, "[heads_out, pools * head_dim, gate_dim]");
    kPoolGate.same_device("weight", *weight, "x", x);
    kPoolGate.same_dtype("weight", *weight, "x", x);
    SEER_EXPECT(kPoolGate, weight->size(1) == channels, "weight",
                number(channels) + " input channels (pools * head_dim)",
                "shape " + shape_of(*weight), "Match the gate's pooling to its weight.");
    const int64_t heads = x.size(2), heads_out = weight->size(0);
    SEER_EXPECT(kPoolGate, heads_out == 0 || (heads > 0 && heads_out % heads == 0), "weight",
                "a multiple of x's " + number(heads) + " heads", "heads_out = " + number(heads_out),
                "One matrix per output head; the heads of a group read one input head.");
    gate_dim = weight->size(2);
    SEER_EXPECT(kPoolGate, gate_dim >= 1, "weight", "gate_dim of at least 1", "gate_dim 0",
                "Give the gate a width.");
  }
  check_rope(x, cos, sin, ceil_div(x.size(1), block), gate_dim);
}

Tensor pool_gate_cpu_op(const Tensor& x, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                        int64_t block, int64_t pools) {
  check_pool_gate(x, weight, cos, sin, block, pools);
  // Small (heads_out * pools * head_dim * gate_dim): packing it costs less than strided reads.
  Tensor packed;
  if (weight) packed = torch::stable::contiguous(*weight);
  PoolGateParams params;
  params.dtype = kPoolGate.float_dtype("x", x);
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
  Tensor out = empty({x.size(0), ceil_div(x.size(1), block), params.heads_out, params.gate_dim},
                     x.scalar_type(), x);
  params.out = out.mutable_data_ptr();
  kPoolGate.ok(pool_gate_cpu(params, torch_parallel_for()));
  return out;
}

void check_gate_scores(const Tensor& q_gate, const Tensor& k_gate, std::optional<double> scale,
                       bool /*causal*/) {
  check_gates(kGateScores, q_gate, k_gate, scale);
}

Tensor gate_scores_cpu_op(const Tensor& q_gate, const Tensor& k_gate, std::optional<double> scale,
                          bool causal) {
  check_gate_scores(q_gate, k_gate, scale, causal);
  GateScoresParams params = gate_params(kGateScores, q_gate, k_gate, scale, causal);
  Tensor scores = empty({q_gate.size(0), q_gate.size(2), params.blocks_q, params.blocks_kv},
                        ScalarType::Float, q_gate);
  params.scores = scores.mutable_data_ptr<float>();
  kGateScores.ok(gate_scores_cpu(params, torch_parallel_for()));
  return scores;
}

void check_gate_select(const Tensor& q_gate, const Tensor& k_gate, std::optional<double> scale,
                       bool /*causal*/, int64_t method, double value, int64_t sink, int64_t local,
                       int64_t dense_last_rows) {
  check_gates(kGateSelect, q_gate, k_gate, scale);
  const std::string got = number(value);
  const char* help = "See seer_cuda.gate_select for the methods and their values.";
  switch (static_cast<SelectMethod>(method)) {
    case SelectMethod::kThreshold:
      SEER_EXPECT(kGateSelect, std::isfinite(value) && value >= 0, "value",
                  "a softmax threshold of at least 0", got, help);
      break;
    case SelectMethod::kTopK:
      SEER_EXPECT(kGateSelect, value >= 1 && value == std::floor(value) && std::isfinite(value),
                  "value", "a whole number of blocks, at least 1", got, help);
      break;
    case SelectMethod::kDensity:
      SEER_EXPECT(kGateSelect, value > 0 && value <= 1, "value", "a density in (0, 1]", got, help);
      break;
    case SelectMethod::kTopP:
      SEER_EXPECT(kGateSelect, value > 0 && value <= 1, "value", "a softmax mass in (0, 1]", got,
                  help);
      break;
    default:
      kGateSelect.fail("method", "0 threshold, 1 top-k, 2 density or 3 top-p", number(method),
                       help);
  }
  for (const auto& [name, count] :
       {std::pair<const char*, int64_t>{"sink", sink},
        std::pair<const char*, int64_t>{"local", local},
        std::pair<const char*, int64_t>{"dense_last_rows", dense_last_rows}})
    SEER_EXPECT(kGateSelect, count >= 0, name, "a count of blocks, at least 0", number(count),
                "Use 0 to force nothing.");
}

Tensor gate_select_cpu_op(const Tensor& q_gate, const Tensor& k_gate, std::optional<double> scale,
                          bool causal, int64_t method, double value, int64_t sink, int64_t local,
                          int64_t dense_last_rows) {
  check_gate_select(q_gate, k_gate, scale, causal, method, value, sink, local, dense_last_rows);
  GateSelectParams params;
  params.gate = gate_params(kGateSelect, q_gate, k_gate, scale, causal);
  params.method = static_cast<SelectMethod>(method);
  params.value = value;
  params.sink = sink;
  params.local = local;
  params.dense_last_rows = dense_last_rows;
  Tensor bits = empty(
      {q_gate.size(0), q_gate.size(2), params.gate.blocks_q, ceil_div(params.gate.blocks_kv, 32)},
      ScalarType::Int, q_gate);
  params.block_bits = bits.mutable_data_ptr<int32_t>();
  kGateSelect.ok(gate_select_cpu(params, torch_parallel_for()));
  return bits;
}

}  // namespace seer::binding
