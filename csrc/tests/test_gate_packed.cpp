// SPDX-License-Identifier: Apache-2.0
// pool_gate, gate_scores and gate_select of packed sequences on the CPU: every sequence gets what a
// call of its own gives, bit for bit, and what lies past it is 0, -inf or no bit.
#include <cmath>
#include <vector>

#include "check.h"
#include "seer/pool_gate.h"

namespace {

using namespace seer;
using namespace seer::test;

constexpr int kBlock = 16, kHeadDim = 24, kGateDim = 40, kHeads = 2, kGroup = 3;
constexpr int64_t kMost = 75;  // more than the longest sequence
const std::vector<int32_t> kEdges = {0, 70, 70, 71, 103};
const int kBatch = static_cast<int>(kEdges.size()) - 1;

Buffer random_buffer(DType dtype, int64_t count, uint64_t seed) {
  Random random(seed);
  Buffer buffer(dtype, count, 0.0f);
  for (int64_t i = 0; i < count; ++i) buffer.set(i, static_cast<float>(random.normal()));
  return buffer;
}

int64_t blocks_of(int b) { return ceil_div(int64_t{kEdges[b + 1]} - kEdges[b], kBlock); }

void test_pool(DType dtype, bool weighted, const ParallelFor& parallel_for) {
  const int64_t total = kEdges.back(), row = kHeads * kHeadDim, blocks = ceil_div(kMost, kBlock);
  const int channels = 3 * kHeadDim, heads_out = weighted ? kHeads * kGroup : kHeads;
  const int gate_dim = weighted ? kGateDim : channels;
  Buffer x = random_buffer(dtype, total * row, 1);
  Buffer weight = random_buffer(dtype, int64_t{heads_out} * channels * kGateDim, 2);
  std::vector<float> cos(blocks * 8, 0.8f), sin(blocks * 8, 0.6f);
  PoolGateParams params;
  params.dtype = dtype;
  params.heads = kHeads;
  params.heads_out = heads_out;
  params.head_dim = kHeadDim;
  params.gate_dim = gate_dim;
  params.block = kBlock;
  params.pools = 7;
  params.weight = weighted ? weight.data() : nullptr;
  params.cos = cos.data();
  params.sin = sin.data();
  params.rotary_dim = 16;
  const int64_t size = blocks * heads_out * gate_dim;
  Buffer out(dtype, kBatch * size, 7.0f);

  PoolGateParams packed = params;
  packed.batch = kBatch;
  packed.rows = kMost;
  packed.total = total;
  packed.cu_seqlens = kEdges.data();
  packed.x = {x.data(), 0, row, kHeadDim};
  packed.out = out.data();
  SEER_CHECK(pool_gate_cpu(packed, parallel_for).ok(), "packed");
  for (int b = 0; b < kBatch; ++b) {
    Buffer alone(dtype, size, 0.0f);  // blocks past the sequence stay 0
    params.batch = 1;
    params.rows = kEdges[b + 1] - kEdges[b];
    params.x = {static_cast<char*>(x.data()) + kEdges[b] * row * size_of(dtype), 0, row, kHeadDim};
    params.out = alone.data();
    SEER_CHECK(pool_gate_cpu(params, parallel_for).ok(), "alone");
    for (int64_t i = 0; i < size; ++i)
      SEER_CHECK(out.get(b * size + i) == alone.get(i), "sequence %d element %d", b, int(i));
  }
}

void test_scores_and_bits(bool causal, SelectMethod method, double value) {
  const int64_t most = blocks_of(0) + 1, row = kHeads * kGateDim;
  Buffer q = random_buffer(DType::kFloat32, kBatch * most * row, 3);
  Buffer k = random_buffer(DType::kFloat32, kBatch * most * row, 4);
  GateSelectParams params;
  params.gate.dtype = DType::kFloat32;
  params.gate.heads_q = params.gate.heads_k = kHeads;
  params.gate.gate_dim = kGateDim;
  params.gate.causal = causal;
  params.gate.block_q = params.gate.block_kv = kBlock;
  params.method = method;
  params.value = value;
  params.dense_last_rows = 1;
  std::vector<float> scores(kBatch * kHeads * most * most);
  std::vector<int32_t> bits(kBatch * kHeads * most);
  GateSelectParams packed = params;
  packed.gate.batch = kBatch;
  packed.gate.blocks_q = packed.gate.blocks_kv = most;
  packed.gate.cu_seqlens_q = packed.gate.cu_seqlens_kv = kEdges.data();
  packed.gate.q_gate = {q.data(), most * row, row, kGateDim};
  packed.gate.k_gate = {k.data(), most * row, row, kGateDim};
  packed.gate.scores = scores.data();
  packed.block_bits = bits.data();
  SEER_CHECK(gate_scores_cpu(packed.gate, threaded_for).ok(), "scores");
  SEER_CHECK(gate_select_cpu(packed, threaded_for).ok(), "select");
  for (int b = 0; b < kBatch; ++b) {
    const int64_t own = blocks_of(b);
    std::vector<float> own_scores(kHeads * own * own);
    std::vector<int32_t> own_bits(kHeads * own);
    params.gate.batch = 1;
    params.gate.blocks_q = params.gate.blocks_kv = own;
    params.gate.q_gate = {static_cast<float*>(q.data()) + b * most * row, 0, row, kGateDim};
    params.gate.k_gate = {static_cast<float*>(k.data()) + b * most * row, 0, row, kGateDim};
    params.gate.scores = own_scores.data();
    params.block_bits = own_bits.data();
    SEER_CHECK(gate_scores_cpu(params.gate, serial_for).ok(), "own scores");
    SEER_CHECK(gate_select_cpu(params, serial_for).ok(), "own select");
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t i = 0; i < most; ++i) {
        const int64_t at = (b * kHeads + h) * most + i;
        const int32_t want = i < own ? own_bits[h * own + i] : 0;
        SEER_CHECK(bits[at] == want, "sequence %d row %d: %x, alone %x", b, int(i), bits[at], want);
        for (int64_t j = 0; j < most; ++j) {
          const float score = i < own && j < own ? own_scores[(h * own + i) * own + j] : -INFINITY;
          SEER_CHECK(scores[at * most + j] == score, "sequence %d at %d, %d", b, int(i), int(j));
        }
      }
    }
  }
}

void test_refusals() {
  const std::vector<int32_t> falling = {0, 5, 3};
  PoolGateParams pool;
  pool.batch = 2;
  pool.heads = pool.heads_out = 1;
  pool.head_dim = pool.gate_dim = 8;
  pool.rows = 8;
  pool.total = 3;
  pool.cu_seqlens = falling.data();
  Status status = pool_gate_cpu(pool, serial_for);
  SEER_CHECK(status.text.find("cu_seqlens: expected entries that do not decrease, got ") == 0, "%s",
             status.text.c_str());
  GateScoresParams gate;
  gate.batch = 2;
  gate.heads_q = gate.heads_k = 1;
  gate.gate_dim = 8;
  gate.blocks_q = gate.blocks_kv = 1;
  gate.cu_seqlens_q = falling.data();
  status = gate_scores_cpu(gate, serial_for);
  SEER_CHECK(status.text.find("cu_seqlens_kv: expected cu_seqlens_q and cu_seqlens_kv") == 0, "%s",
             status.text.c_str());
  const std::vector<int32_t> longer = {0, 5, 70};
  gate.cu_seqlens_q = gate.cu_seqlens_kv = longer.data();
  status = gate_scores_cpu(gate, serial_for);
  SEER_CHECK(status.text ==
                 "cu_seqlens_q: expected sequences of at most 64 rows, got sequence 1 "
                 "from 5 to 70. Embed these sequences with pool_gate, and pass the "
                 "block size that it took.",
             "%s", status.text.c_str());
}

}  // namespace

int main() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const bool weighted : {false, true}) {
      test_pool(dtype, weighted, serial_for);
      test_pool(dtype, weighted, scattered_for);
    }
  }
  for (const bool causal : {false, true}) {
    test_scores_and_bits(causal, SelectMethod::kThreshold, 0.2);
    test_scores_and_bits(causal, SelectMethod::kTopK, 2);
    test_scores_and_bits(causal, SelectMethod::kDensity, 0.6);
    test_scores_and_bits(causal, SelectMethod::kTopP, 0.7);
  }
  test_refusals();
  return seer::test::report("gate_packed");
}
