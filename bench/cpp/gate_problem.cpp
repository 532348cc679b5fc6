// SPDX-License-Identifier: Apache-2.0
// pool_gate, alone or as the pair that embeds q and k in one launch, gate_scores and gate_select.
#include <algorithm>
#include <cmath>
#include <limits>

#include "inputs.h"
#include "problem.h"
#include "reference.h"
#include "selection.h"

namespace seer::bench {
namespace {

// Spread of the weights: scores of random inputs then differ by about 1 within a row.
constexpr float kWeightSpread = 0.5f;
// Two fp32 sums of a score (docs/numerics.md section 4).
constexpr double kScoreBudget = 1e-4;
constexpr int64_t kRowsToVerify = 4096;

// Angles of rotary embedding at each block's first token, base 10000: [blocks, rotary_dim / 2].
std::vector<float> rope_table(int64_t blocks, int block, int rotary_dim,
                              double (*function)(double)) {
  std::vector<float> table;
  for (int64_t i = 0; i < blocks; ++i) {
    for (int c = 0; c < rotary_dim / 2; ++c) {
      const double frequency = std::pow(10000.0, -2.0 * c / rotary_dim);
      table.push_back(static_cast<float>(function(double(i * block) * frequency)));
    }
  }
  return table;
}

// One tensor of pool_gate with its storage.
struct Embedding {
  DeviceBuffer x, weight, cos, sin, out;
  PoolGateParams params;

  Embedding(const Case& c, Side side, int pools, uint64_t seed) {
    const bool weighted = side == Side::kK;
    params.dtype = c.dtype;
    params.batch = c.batch;
    params.heads = weighted ? c.heads_kv : c.heads_q;
    params.heads_out = c.heads_q;
    params.head_dim = c.head_dim;
    params.gate_dim = weighted ? c.head_dim : count_of_pools(pools) * c.head_dim;
    params.rows = weighted ? c.rows_kv : c.rows_q;
    params.block = c.block.q;
    params.pools = pools;
    params.rotary_dim = c.head_dim;
    const int64_t row = int64_t{params.heads} * c.head_dim;
    params.x = {nullptr, params.rows * row, row, c.head_dim};
    if (weighted) {
      const int64_t count = int64_t{c.heads_q} * count_of_pools(pools) * c.head_dim * c.head_dim;
      weight = normal(c.dtype, count, seed + 1, kWeightSpread);
      params.weight = weight.as<>();
    }
    const int64_t blocks = ceil_div(params.rows, params.block);
    x = normal(c.dtype, c.batch * params.rows * row, seed);
    cos = DeviceBuffer::copy_of(rope_table(blocks, params.block, params.rotary_dim, std::cos));
    sin = DeviceBuffer::copy_of(rope_table(blocks, params.block, params.rotary_dim, std::sin));
    out = DeviceBuffer::poisoned(elements() * size_of(c.dtype));
    params.x.data = x.as<>();
    params.cos = cos.as<float>();
    params.sin = sin.as<float>();
    params.out = out.as<>();
  }
  int64_t elements() const {
    return params.batch * ceil_div(params.rows, params.block) * params.heads_out * params.gate_dim;
  }
};

class PoolGateProblem : public Problem {
 public:
  PoolGateProblem(const Case& c, const Device& device, uint64_t seed) {
    if (c.op == Op::kPoolGate) {
      sides_.emplace_back(c, c.side, c.pools, 4 * seed);
    } else {
      sides_.emplace_back(c, Side::kQ, kPoolAvg, 4 * seed);
      sides_.emplace_back(c, Side::kK, c.pools, 4 * seed + 1);
    }
    for (const Embedding& side : sides_) {
      std::string why_not;
      const int index = find_pool_gate_variant(side.params, device.sm, &why_not);
      if (index < 0) throw CudaError(why_not);
      kernel_ = pool_gate_variants()[index].name;
      params_.push_back(side.params);
    }
  }
  void launch(cudaStream_t stream) const override {
    check(launch_pool_gate(params_.data(), static_cast<int>(params_.size()), stream));
  }
  Verdict verify() const override {
    Verdict verdict;
    for (const Embedding& side : sides_) {
      const PoolGateParams& p = side.params;
      const std::vector<float> got = floats_at(p.dtype, side.out.as<>(), side.elements());
      verdict.bound(p.weight == nullptr ? "pooled" : "projected",
                    worst_row_error(got, reference_pool_gate(p), p.gate_dim), row_budget(p.dtype));
    }
    return verdict;
  }
  std::string kernel() const override { return kernel_; }

 private:
  std::vector<Embedding> sides_;
  std::vector<PoolGateParams> params_;
  std::string kernel_;
};

// Block embeddings of normal values, as many heads of k as of q: weights are per query head.
class RankProblem : public Problem {
 public:
  RankProblem(const Case& c, const Device& device, uint64_t seed) : c_(c) {
    const int64_t row = int64_t{c.heads_q} * c.head_dim;
    const int64_t blocks_q = c.blocks_q(), blocks_kv = c.blocks_kv();
    q_ = normal(c.dtype, c.batch * blocks_q * row, 4 * seed);
    k_ = normal(c.dtype, c.batch * blocks_kv * row, 4 * seed + 1);
    GateScoresParams& gate = select_.gate;
    gate.dtype = c.dtype;
    gate.batch = c.batch;
    gate.heads_q = gate.heads_k = c.heads_q;
    gate.gate_dim = c.head_dim;
    gate.blocks_q = blocks_q;
    gate.blocks_kv = blocks_kv;
    gate.causal = c.causal;
    gate.scale = 1.0f / std::sqrt(float(c.head_dim));
    gate.q_gate = {q_.as<>(), blocks_q * row, row, c.head_dim};
    gate.k_gate = {k_.as<>(), blocks_kv * row, row, c.head_dim};
    select_.method = c.method;
    select_.value = c.value;
    std::string why_not;
    const int index = scores() ? find_gate_scores_variant(gate, device.sm, &why_not)
                               : find_gate_select_variant(select_, device.sm, &why_not);
    if (index < 0) throw CudaError(why_not);
    kernel_ = (scores() ? gate_scores_variants() : gate_select_variants())[index].name;
    const int64_t rows = int64_t{c.batch} * c.heads_q * blocks_q;
    result_ = DeviceBuffer::poisoned(4 * rows * (scores() ? blocks_kv : ceil_div(blocks_kv, 32)));
    gate.scores = scores() ? result_.as<float>() : nullptr;
    select_.block_bits = scores() ? nullptr : result_.as<int32_t>();
  }
  void launch(cudaStream_t stream) const override {
    check(scores() ? launch_gate_scores(select_.gate, stream)
                   : launch_gate_select(select_, stream));
  }
  Verdict verify() const override {
    const std::vector<float> exact = reference_gate_scores(select_.gate);
    Verdict verdict;
    if (scores()) {
      verdict.bound("scores", worst_score(exact), kScoreBudget);
    } else {
      verify_selection(exact, &verdict);
    }
    return verdict;
  }
  std::string kernel() const override { return kernel_; }

 private:
  bool scores() const { return c_.op == Op::kGateScores; }

  double worst_score(const std::vector<float>& exact) const {
    const std::vector<float> got = result_.to_host<float>();
    double worst = 0.0;
    for (size_t i = 0; i < got.size(); ++i) {
      if (got[i] == exact[i]) continue;  // -inf of a hidden block, too
      const double error = std::abs(double{got[i]} - exact[i]);
      worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
    }
    return worst;
  }

  void verify_selection(const std::vector<float>& exact, Verdict* verdict) const {
    const std::vector<int32_t> bits = result_.to_host<int32_t>();
    const int64_t columns = c_.blocks_kv(), words = ceil_div(columns, 32);
    const int64_t rows = int64_t{c_.batch} * c_.heads_q * c_.blocks_q();
    const int64_t step = ceil_div(rows, kRowsToVerify);
    int64_t wrong = 0, checked = 0;
    for (int64_t row = rows - 1; row >= 0; row -= step, ++checked) {
      wrong += wrong_choices(c_.method, c_.value, exact.data() + row * columns, columns,
                             bits.data() + row * words, kScoreBudget);
    }
    verdict->bound("wrong blocks", double(wrong), 0.0);
    verdict->note(std::to_string(checked) + " rows");
  }

  Case c_;
  DeviceBuffer q_, k_, result_;
  GateSelectParams select_;
  std::string kernel_;
};

}  // namespace

std::unique_ptr<Problem> make_gate_problem(const Case& c, const Device& device, uint64_t seed) {
  if (c.op == Op::kPoolGate || c.op == Op::kPoolGatePair) {
    return std::make_unique<PoolGateProblem>(c, device, seed);
  }
  return std::make_unique<RankProblem>(c, device, seed);
}

}  // namespace seer::bench
