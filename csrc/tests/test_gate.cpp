// SPDX-License-Identifier: Apache-2.0
// pool_gate, gate_scores and gate_select on the CPU against double loops and a full sort.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "pool_gate/variant.h"
#include "seer/pool_gate.h"

namespace {

using namespace seer;
using namespace seer::test;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- pool_gate ----------------------------------------------------------------------------------

struct GateShape {
  DType dtype;
  int batch, heads, heads_out, head_dim, gate_dim, block, pools, rotary_dim;
  int64_t rows;
  bool weighted, batched_rope;
};

float rounded(DType dtype, double value) {
  Buffer one(dtype, 1, static_cast<float>(value));
  return one.get(0);
}

void test_pool_gate(const GateShape& shape, const ParallelFor& parallel_for) {
  Random random(shape.rows + shape.gate_dim);
  const int64_t blocks = ceil_div(shape.rows, shape.block), half = shape.rotary_dim / 2;
  const int64_t kinds = __builtin_popcount(shape.pools), channels = kinds * shape.head_dim;
  // Head-major storage, so that the strides of x are not those of its shape.
  const int64_t row_stride = shape.head_dim + 2, head_stride = shape.rows * row_stride;
  const int64_t batch_stride = shape.heads * head_stride;
  Buffer x(shape.dtype, shape.batch * batch_stride, 0.0f);
  Buffer weight(shape.dtype, shape.heads_out * channels * shape.gate_dim, 0.0f);
  Buffer out(shape.dtype, shape.batch * blocks * shape.heads_out * shape.gate_dim, 0.0f);
  for (int64_t i = 0; i < x.size(); ++i) x.set(i, static_cast<float>(random.normal()));
  for (int64_t i = 0; i < weight.size(); ++i)
    weight.set(i, static_cast<float>(random.normal() / std::sqrt(double(channels))));
  const int64_t rope_batch = shape.batched_rope ? blocks * half : 0;
  std::vector<float> cos(shape.batch * blocks * half), sin(cos.size());
  for (size_t i = 0; i < cos.size(); ++i) {
    const double angle = 6.3 * random.uniform();
    cos[i] = static_cast<float>(std::cos(angle));
    sin[i] = static_cast<float>(std::sin(angle));
  }
  PoolGateParams params;
  params.dtype = shape.dtype;
  params.batch = shape.batch;
  params.heads = shape.heads;
  params.heads_out = shape.heads_out;
  params.head_dim = shape.head_dim;
  params.gate_dim = shape.gate_dim;
  params.rows = shape.rows;
  params.block = shape.block;
  params.pools = shape.pools;
  params.x = {x.data(), batch_stride, row_stride, head_stride};
  params.weight = shape.weighted ? weight.data() : nullptr;
  params.cos = half > 0 ? cos.data() : nullptr;
  params.sin = half > 0 ? sin.data() : nullptr;
  params.rotary_dim = shape.rotary_dim;
  params.rope_batch_stride = rope_batch;
  params.out = out.data();
  SEER_CHECK(pool_gate_cpu(params, parallel_for).ok(), "run");

  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t i = 0; i < blocks; ++i) {
      for (int64_t h = 0; h < shape.heads_out; ++h) {
        const int64_t head = h / (shape.heads_out / shape.heads);
        std::vector<double> pooled;
        for (int kind : {1, 2, 4}) {
          for (int64_t d = 0; (shape.pools & kind) != 0 && d < shape.head_dim; ++d) {
            double largest = -INFINITY, smallest = INFINITY, sum = 0.0;
            const int64_t end = std::min<int64_t>(shape.rows, (i + 1) * shape.block);
            for (int64_t r = i * shape.block; r < end; ++r) {
              const double value =
                  x.get(b * batch_stride + r * row_stride + head * head_stride + d);
              largest = std::max(largest, value);
              smallest = std::min(smallest, value);
              sum += value / double(end - i * shape.block);
            }
            pooled.push_back(kind == 1 ? largest : kind == 2 ? smallest : sum);
          }
        }
        std::vector<double> result = pooled;
        if (shape.weighted) {
          result.assign(shape.gate_dim, 0.0);
          for (int64_t c = 0; c < channels; ++c)
            for (int64_t n = 0; n < shape.gate_dim; ++n)
              result[n] += rounded(shape.dtype, pooled[c]) *
                           double{weight.get((h * channels + c) * shape.gate_dim + n)};
        }
        for (int64_t c = 0; c < half; ++c) {
          const size_t angle = b * rope_batch + i * half + c;
          const double x1 = result[c], x2 = result[c + half];
          result[c] = x1 * cos[angle] - x2 * sin[angle];
          result[c + half] = x2 * cos[angle] + x1 * sin[angle];
        }
        for (int64_t n = 0; n < shape.gate_dim; ++n) {
          const float got = out.get(((b * blocks + i) * shape.heads_out + h) * shape.gate_dim + n);
          // Besides the final rounding: an average on the edge of a 16-bit rounding may fall to
          // the other side in fp32, one ulp of one input of the product.
          const double tolerance =
              1e-5 + rounding(shape.dtype) * (1.01 * std::abs(result[n]) + 0.1);
          SEER_CHECK(std::abs(got - result[n]) <= tolerance,
                     "%s b %d block %d head %d channel %d: %g, expected %g", name_of(shape.dtype),
                     int(b), int(i), int(h), int(n), got, result[n]);
        }
      }
    }
  }
}

void test_pool_gates() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const ParallelFor& loop : {ParallelFor(serial_for), ParallelFor(scattered_for)}) {
      test_pool_gate({dtype, 2, 2, 4, 24, 40, 16, 7, 40, 16 * 18 + 5, true, true}, loop);
      test_pool_gate({dtype, 1, 2, 2, 16, 128, 64, 5, 64, 200, true, false}, loop);
      test_pool_gate({dtype, 2, 3, 3, 8, 16, 32, 3, 0, 31, false, false}, loop);
      test_pool_gate({dtype, 2, 1, 1, 32, 32, 1000, 4, 16, 70, false, true}, loop);
      test_pool_gate({dtype, 1, 1, 2, 5, 7, 3, 1, 2, 10, true, false}, loop);
    }
  }
}

// ---- gate_scores and gate_select ----------------------------------------------------------------

struct ScoreProblem {
  GateScoresParams params;
  Buffer q, k;

  ScoreProblem(DType dtype, int64_t blocks_q, int64_t blocks_kv, bool causal, uint64_t seed)
      : q(dtype, 2 * blocks_q * 4 * kDim, 0.0f), k(dtype, 2 * blocks_kv * 2 * kDim, 0.0f) {
    Random random(seed);
    for (Buffer* buffer : {&q, &k})
      for (int64_t i = 0; i < buffer->size(); ++i)
        buffer->set(i, static_cast<float>(random.normal()));
    params.dtype = dtype;
    params.batch = 2;
    params.heads_q = 4;
    params.heads_k = 2;
    params.gate_dim = kDim;
    params.blocks_q = blocks_q;
    params.blocks_kv = blocks_kv;
    params.causal = causal;
    params.scale = 0.4f;
    params.q_gate = {q.data(), blocks_q * 4 * kDim, 4 * kDim, kDim};
    params.k_gate = {k.data(), blocks_kv * 2 * kDim, kDim, blocks_kv * kDim};  // head-major
  }
  int64_t rows() const { return 2 * 4 * params.blocks_q; }
  std::vector<float> scores(const ParallelFor& parallel_for) {
    std::vector<float> result(rows() * params.blocks_kv, 99.0f);
    params.scores = result.data();
    SEER_CHECK(gate_scores_cpu(params, parallel_for).ok(), "run");
    return result;
  }
  int64_t visible(int64_t row) const {
    if (!params.causal) return params.blocks_kv;
    const int64_t last = row % params.blocks_q + params.blocks_kv - params.blocks_q;
    return std::max<int64_t>(0, std::min(params.blocks_kv, last + 1));
  }

  static constexpr int kDim = 20;
};

void test_scores(DType dtype, int64_t blocks_q, int64_t blocks_kv, bool causal) {
  ScoreProblem problem(dtype, blocks_q, blocks_kv, causal, blocks_q + blocks_kv);
  const std::vector<float> scores = problem.scores(scattered_for);
  SEER_CHECK(scores == problem.scores(threaded_for), "scores differ between thread counts");
  const GateScoresParams& p = problem.params;
  for (int64_t row = 0; row < problem.rows(); ++row) {
    const int64_t b = row / blocks_q / 4, h = row / blocks_q % 4, i = row % blocks_q;
    for (int64_t j = 0; j < blocks_kv; ++j) {
      double expected = 0.0;
      for (int64_t d = 0; d < p.gate_dim; ++d)
        expected += double{problem.q.get(b * p.q_gate.batch_stride + i * p.q_gate.row_stride +
                                         h * p.q_gate.head_stride + d)} *
                    problem.k.get(b * p.k_gate.batch_stride + j * p.k_gate.row_stride +
                                  h / 2 * p.k_gate.head_stride + d);
      const float got = scores[row * blocks_kv + j];
      if (j >= problem.visible(row))
        SEER_CHECK(got == -kInfinity, "row %d block %d: %g", int(row), int(j), got);
      else
        SEER_CHECK(std::abs(got - expected * p.scale) < 1e-5, "row %d block %d: %g, expected %g",
                   int(row), int(j), got, expected * p.scale);
    }
  }
}

// The selected blocks of one row by definition: a stable sort of all scores.
std::vector<bool> expected_row(const GateSelectParams& params, const float* scores, int64_t row,
                               int64_t visible) {
  const int64_t blocks_kv = params.gate.blocks_kv;
  std::vector<bool> selected(blocks_kv);
  std::vector<int64_t> order;
  for (int64_t j = 0; j < visible; ++j)
    if (!std::isnan(scores[j])) order.push_back(j);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  double sum = 0.0;
  for (int64_t j : order) sum += std::exp(double{scores[j]} - scores[order[0]]);
  const auto mass = [&](int64_t j) { return std::exp(double{scores[j]} - scores[order[0]]) / sum; };
  int64_t count = 0;
  double total = 0.0;
  switch (params.method) {
    case SelectMethod::kThreshold:
      while (count < int64_t(order.size()) && mass(order[count]) > params.value) ++count;
      break;
    case SelectMethod::kTopK:
      count = static_cast<int64_t>(std::min(params.value, double(order.size())));
      break;
    case SelectMethod::kDensity:
      count = std::max<int64_t>(1, int64_t((1 - std::sqrt(1 - params.value)) * blocks_kv));
      break;
    case SelectMethod::kTopP:
      while (count < int64_t(order.size()) && (count == 0 || total < params.value - 1e-9))
        total += mass(order[count++]);
      break;
  }
  for (int64_t i = 0; i < std::min<int64_t>(count, order.size()); ++i) selected[order[i]] = true;
  for (int64_t j = 0; j < visible; ++j)
    if (j < params.sink || j >= visible - params.local ||
        row >= params.gate.blocks_q - params.dense_last_rows)
      selected[j] = true;
  return selected;
}

void test_select(ScoreProblem& problem, SelectMethod method, double value, int64_t forced,
                 const char* name) {
  const std::vector<float> scores = problem.scores(serial_for);
  const int64_t blocks_kv = problem.params.blocks_kv, words = ceil_div(blocks_kv, 32);
  GateSelectParams params;
  params.gate = problem.params;
  params.method = method;
  params.value = value;
  params.sink = forced;
  params.local = 2 * forced;
  params.dense_last_rows = forced;
  std::vector<int32_t> bits(problem.rows() * words, -1), again(bits);
  params.block_bits = again.data();
  SEER_CHECK(gate_select_cpu(params, threaded_for).ok(), "%s", name);
  params.block_bits = bits.data();
  SEER_CHECK(gate_select_cpu(params, scattered_for).ok(), "%s", name);
  SEER_CHECK(bits == again, "%s: bits differ between thread counts", name);
  for (int64_t row = 0; row < problem.rows(); ++row) {
    const std::vector<bool> expected =
        expected_row(params, scores.data() + row * blocks_kv, row % problem.params.blocks_q,
                     problem.visible(row));
    for (int64_t j = 0; j < words * 32; ++j) {
      const bool got = static_cast<uint32_t>(bits[row * words + j / 32]) >> (j % 32) & 1u;
      SEER_CHECK(got == (j < blocks_kv && expected[j]),
                 "%s: method %d value %g row %d block %d: "
                 "%d",
                 name, int(method), value, int(row), int(j), int(got));
    }
  }
}

void test_selects(ScoreProblem& problem, const char* name) {
  for (int64_t forced : {0, 1, 3}) {
    for (double value : {0.0, 0.02, 0.1001, 1.0})
      test_select(problem, SelectMethod::kThreshold, value, forced, name);
    for (double value : {0.0, 1.0, 5.0, 1e30})
      test_select(problem, SelectMethod::kTopK, value, forced, name);
    for (double value : {0.0, 0.3, 0.75, 1.0})
      test_select(problem, SelectMethod::kDensity, value, forced, name);
    for (double value : {0.0, 0.4003, 0.9007})
      test_select(problem, SelectMethod::kTopP, value, forced, name);
  }
}

void test_selection() {
  const int64_t pairs[][2] = {{1, 1}, {7, 7}, {40, 40}, {3, 70}, {20, 9}, {0, 4}, {4, 0}};
  for (const auto& [blocks_q, blocks_kv] : pairs) {
    for (bool causal : {true, false}) {
      for (DType dtype : {DType::kFloat32, DType::kBFloat16})
        test_scores(dtype, blocks_q, blocks_kv, causal);
      ScoreProblem problem(DType::kFloat32, blocks_q, blocks_kv, causal, 5);
      test_selects(problem, "random");
    }
  }
  // Ties: all keys equal, then keys whose scores underflow to -0 and 0 in turn.
  ScoreProblem ties(DType::kFloat32, 40, 40, true, 6);
  const int64_t dim = ScoreProblem::kDim;
  for (int64_t i = 0; i < ties.k.size(); ++i) ties.k.set(i, ties.k.get(i % dim));
  test_selects(ties, "ties");
  for (int64_t i = 0; i < ties.q.size(); ++i) ties.q.set(i, 1.0f);
  for (int64_t i = 0; i < ties.k.size(); ++i)
    ties.k.set(i, i % dim != 0 ? 0.0f : i / dim % 2 == 0 ? -0x1p-149f : 0x1p-149f);
  test_selects(ties, "zeros");
  // A NaN key: its block is selected only by a forced rule.
  ScoreProblem nan(DType::kFloat32, 40, 40, true, 8);
  for (int64_t block : {0, 3, 17}) nan.k.set(block * dim + 2, kNaN);
  test_selects(nan, "NaN");
  // An infinite score takes the whole mass.
  ScoreProblem infinite(DType::kFloat32, 8, 8, false, 9);
  for (int64_t i = 0; i < infinite.q.size(); ++i) infinite.q.set(i, 1.0f);
  infinite.k.set(2 * dim, kInfinity);
  std::vector<int32_t> bits(infinite.rows());
  for (SelectMethod method : {SelectMethod::kThreshold, SelectMethod::kTopP}) {
    GateSelectParams params{.gate = infinite.params, .method = method, .value = 0.5};
    params.block_bits = bits.data();
    SEER_CHECK(gate_select_cpu(params, serial_for).ok(), "infinite");
    SEER_CHECK(bits[0] == 1 << 2, "method %d: %x", int(method), bits[0]);
  }
}

void test_refusals() {
  const auto expect = [](const GateSelectParams& params, const char* text) {
    const Status status = gate_select_cpu(params, serial_for);
    SEER_CHECK(status.code == Code::kInvalidArgument && status.text.find(text) == 0,
               "expected \"%s\", got \"%s\"", text, status.text.c_str());
  };
  GateSelectParams params;
  params.value = std::nan("");
  expect(params, "value: expected a finite number, got nan. ");
  params.value = 1.5;
  params.method = SelectMethod::kDensity;
  expect(params, "value: expected a density from 0 to 1, got 1.5");
  params.value = 0.5;
  params.local = -1;
  expect(params, "local: expected a count of blocks, at least 0, got -1. ");
  params = {};
  params.method = static_cast<SelectMethod>(4);
  expect(params, "method: expected one of SelectMethod, 0 to 3, got 4. ");
}

// Refused before anything is read or written: the params point nowhere.
void test_pool_gate_refusals() {
  const auto expect = [](const char* text, auto change) {
    static const float memory[1] = {};
    PoolGateParams params;
    params.batch = params.rows = 1;
    params.heads = params.heads_out = 2;
    params.head_dim = params.gate_dim = 8;
    change(params, memory);
    const Status status = pool_gate_cpu(params, serial_for);
    SEER_CHECK(status.code == Code::kInvalidArgument && status.text.find(text) == 0,
               "expected \"%s\", got \"%s\"", text, status.text.c_str());
  };
  const char* no_weight =
      "weight: expected one, or heads_out = 2 and gate_dim = 8 as pooling gives";
  expect(no_weight, [](auto& p, auto) { p.heads_out = 4; });
  expect(no_weight, [](auto& p, auto) { p.gate_dim = 16; });
  expect("weight: expected heads_out a multiple of heads = 2, got -2. ",
         [](auto& p, auto) { p.heads_out = -2; });
  expect("weight: expected gate_dim of at least 1, got 0. ", [](auto& p, auto* memory) {
    p.weight = memory;
    p.gate_dim = 0;
  });
  expect("x: expected head_dim of at least 1, got 0. ",
         [](auto& p, auto) { p.head_dim = p.gate_dim = 0; });
  const auto half_rope = [](auto field) {
    return [field](auto& p, auto* memory) {
      p.*field = memory;
      p.rotary_dim = 8;
    };
  };
  expect("sin: expected cos and sin together, got only one of them. ",
         half_rope(&PoolGateParams::cos));
  expect("cos: expected cos and sin together, got only one of them. ",
         half_rope(&PoolGateParams::sin));
}

// Every CTA of both problems has one place in a launch; those of a problem come in order.
void test_order_of_ctas() {
  struct Order {
    uint32_t first, second, lead, turns, per_turn;
  };
  for (const Order& o : {Order{5, 0, 5, 0, 0}, Order{5, 9, 5, 0, 0}, Order{10, 40, 4, 6, 4},
                         Order{10, 7, 2, 3, 2}, Order{3, 100, 1, 2, 8}, Order{50, 1, 8, 0, 2}}) {
    PoolGateLaunch launch = {};
    launch.first_ctas = o.first;
    launch.lead = o.lead;
    launch.turns = o.turns;
    launch.per_turn = o.per_turn;
    uint32_t next[2] = {0, 0};
    for (uint32_t cta = 0; cta < o.first + o.second; ++cta) {
      const PoolPlace place = pool_place(launch, cta);
      SEER_CHECK(place.cta == next[place.problem]++, "cta %u: cta %u of problem %d", cta, place.cta,
                 place.problem);
    }
    SEER_CHECK(next[0] == o.first && next[1] == o.second, "%u and %u CTAs", next[0], next[1]);
  }
}

}  // namespace

int main() {
  test_order_of_ctas();
  test_pool_gates();
  test_selection();
  test_refusals();
  test_pool_gate_refusals();
  return seer::test::report("gate");
}
