// SPDX-License-Identifier: Apache-2.0
// Argument checks of pool_gate, gate_scores and gate_select.
#include <cmath>
#include <limits>

#include "check.h"
#include "ops.h"
#include "seer/pool_gate.h"

namespace seer::binding {
namespace {

constexpr Op kPoolGate{"pool_gate"};
constexpr Op kGateScores{"gate_scores"};
constexpr Op kGateSelect{"gate_select"};

void check_rope(const Tensor& x, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                int64_t batch, int64_t blocks, int64_t gate_dim) {
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
                      (table.dim() == 2 || table.size(0) == 1 || table.size(0) == batch);
    SEER_EXPECT(kPoolGate, fits, name,
                "[blocks = " + number(blocks) + ", at most " + number(gate_dim / 2) +
                    "], with or without a leading batch of " + number(batch) + " or 1",
                "shape " + shape_of(table),
                "Evaluate RoPE at each block's first token, one column per channel pair.");
    SEER_EXPECT(kPoolGate, table.is_contiguous(), name, "a contiguous tensor", "strides with gaps",
                "Call .contiguous() on it.");
  }
  SEER_EXPECT(kPoolGate, shape_of(*cos) == shape_of(*sin), "sin",
              "the shape of cos, " + shape_of(*cos), "shape " + shape_of(*sin),
              "Build both tables together.");
}

void check_lengths(const Op& op, const GateArgs& args) {
  if (args.cu_seqlens_q.has_value() != args.cu_seqlens_kv.has_value())
    op.fail(args.cu_seqlens_q ? "cu_seqlens_kv" : "cu_seqlens_q",
            "cu_seqlens_q and cu_seqlens_kv together", "only one of them",
            "Pass both for packed sequences, or neither.");
  for (const auto& [name, block] : {std::pair<const char*, int64_t>{"block_q", args.block_q},
                                    std::pair<const char*, int64_t>{"block_kv", args.block_kv}})
    SEER_EXPECT(op, block >= 1 && block <= std::numeric_limits<int32_t>::max(), name,
                "1 to 2^31 - 1 rows", number(block), "Use 64.");
  if (!args.cu_seqlens_q) return;
  for (const auto& [name, cu] :
       {std::pair<const char*, const Tensor&>{"cu_seqlens_q", *args.cu_seqlens_q},
        std::pair<const char*, const Tensor&>{"cu_seqlens_kv", *args.cu_seqlens_kv}}) {
    op.cu_seqlens(name, cu, "q_gate", args.q_gate);
    SEER_EXPECT(op, cu.size(0) == args.q_gate.size(0) + 1, name,
                number(args.q_gate.size(0) + 1) + " entries, batch + 1 of q_gate",
                number(cu.size(0)), "Embed these sequences with pool_gate.");
  }
}

void check_gates(const Op& op, const GateArgs& args) {
  const Tensor &q_gate = args.q_gate, &k_gate = args.k_gate;
  op.rank("q_gate", q_gate, 4, "[batch, blocks_q, heads_q, gate_dim]");
  op.rank("k_gate", k_gate, 4, "[batch, blocks_kv, heads_k, gate_dim]");
  op.int_sizes("q_gate", q_gate, 1);
  op.int_sizes("k_gate", k_gate, 1);
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
  if (args.scale)
    SEER_EXPECT(op, std::isfinite(static_cast<float>(*args.scale)), "scale",
                "a finite float32 number", number(*args.scale),
                "Leave it out for gate_dim ** -0.5.");
  check_lengths(op, args);
}

}  // namespace

void check_pool_gate(const Tensor& x, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                     const std::optional<Tensor>& cu_seqlens, int64_t block, int64_t pools,
                     int64_t max_rows) {
  const int64_t rank = cu_seqlens ? 3 : 4;
  kPoolGate.rank("x", x, rank,
                 cu_seqlens ? "[total, heads, head_dim] with cu_seqlens"
                            : "[batch, rows, heads, head_dim], or cu_seqlens with packed rows");
  kPoolGate.int_sizes("x", x, rank - 3);
  const int64_t head_dim = x.size(rank - 1), heads = x.size(rank - 2);
  if (x.scalar_type() != ScalarType::Float) kPoolGate.float_dtype("x", x);
  kPoolGate.unit_last_stride("x", x);
  SEER_EXPECT(kPoolGate, head_dim >= 1, "x", "head_dim of at least 1", "head_dim 0",
              "Pass q or k before RoPE.");
  SEER_EXPECT(kPoolGate, block >= 1 && block <= std::numeric_limits<int32_t>::max(), "block",
              "1 to 2^31 - 1 rows", number(block), "Use 64.");
  SEER_EXPECT(kPoolGate, pools >= 1 && pools <= 7, "pools", "a bit set of 1 max, 2 min, 4 avg",
              number(pools), "Use 4 for avg or 7 for max, min and avg.");
  const int64_t channels = __builtin_popcountll(static_cast<uint64_t>(pools)) * head_dim;
  SEER_EXPECT(kPoolGate, channels <= std::numeric_limits<int32_t>::max(), "x",
              "pools * head_dim below 2^31", number(channels), "Split the heads.");
  int64_t gate_dim = channels, heads_out = heads;
  if (weight) {
    kPoolGate.rank("weight", *weight, 3, "[heads_out, pools * head_dim, gate_dim]");
    kPoolGate.int_sizes("weight", *weight, -1);
    kPoolGate.same_device("weight", *weight, "x", x);
    kPoolGate.same_dtype("weight", *weight, "x", x);
    SEER_EXPECT(kPoolGate, weight->size(1) == channels, "weight",
                number(channels) + " input channels (pools * head_dim)",
                "shape " + shape_of(*weight), "Match the gate's pooling to its weight.");
    heads_out = weight->size(0);
    SEER_EXPECT(kPoolGate, heads_out == 0 || (heads > 0 && heads_out % heads == 0), "weight",
                "a multiple of x's " + number(heads) + " heads", "heads_out = " + number(heads_out),
                "One matrix per output head; the heads of a group read one input head.");
    gate_dim = weight->size(2);
    SEER_EXPECT(kPoolGate, gate_dim >= 1, "weight", "gate_dim of at least 1", "gate_dim 0",
                "Give the gate a width.");
  }
  int64_t batch = x.size(0), rows = rank == 4 ? x.size(1) : max_rows;
  if (cu_seqlens) {
    kPoolGate.cu_seqlens("cu_seqlens", *cu_seqlens, "x", x);
    kPoolGate.max_rows("max_rows", max_rows);
    batch = cu_seqlens->size(0) - 1;
  }
  constexpr double kMaxElements = 1e15;  // petabytes: a mistake, and far from overflow
  SEER_EXPECT(kPoolGate,
              double(batch) * double(ceil_div(rows, block)) * heads_out * gate_dim < kMaxElements,
              cu_seqlens ? "max_rows" : "x", "embeddings of fewer than 10^15 elements",
              number(ceil_div(rows, block)) + " blocks of " + number(batch) + " sequences",
              "Pass the longest sequence's length.");
  check_rope(x, cos, sin, batch, ceil_div(rows, block), gate_dim);
}

void check_gate_scores(const GateArgs& args) { check_gates(kGateScores, args); }

void check_gate_select(const GateArgs& args, int64_t method, double value, int64_t sink,
                       int64_t local, int64_t dense_last_rows) {
  check_gates(kGateSelect, args);
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

}  // namespace seer::binding
