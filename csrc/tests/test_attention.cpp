// SPDX-License-Identifier: Apache-2.0
// The CPU attention engine and its two ops against double loops: shapes, masks, packed sequences,
// strides, instruction sets, special values, refusals.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "attention_case.h"
#include "seer/attn_pool.h"

namespace {

using namespace seer;
using namespace seer::test;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool matches(double got, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(got);
  return std::isinf(expected) ? got == expected : std::abs(got - expected) <= tolerance;
}

void check_out(const AttentionCase& problem, const char* name) {
  const AttentionShape& shape = problem.shape;
  std::vector<bool> written(problem.out.storage.size());
  for (int64_t b = 0; b < problem.batch(); ++b) {
    for (int64_t h = 0; h < shape.heads_q; ++h) {
      for (int64_t r = 0; r < problem.length_q(b); ++r) {
        const AttentionCase::Row row = problem.expected(b, r, h);
        const float lse = problem.lse[problem.lse_at(b, r, h)];
        SEER_CHECK(matches(lse, row.lse, 1e-5), "%s: lse of b %d h %d r %d: %g, expected %g", name,
                   int(b), int(h), int(r), lse, row.lse);
        for (int64_t d = 0; d < shape.head_dim; ++d) {
          const int64_t at = problem.q_at(b, r, h, d);
          const float out = problem.out.storage.get(at);
          written[at] = true;
          const double tolerance = 1e-5 + 1.01 * rounding(shape.dtype) * std::abs(row.out[d]);
          SEER_CHECK(matches(out, row.out[d], tolerance),
                     "%s: out of b %d h %d r %d d %d: %g, expected %g", name, int(b), int(h),
                     int(r), int(d), out, row.out[d]);
        }
      }
    }
  }
  for (int64_t i = 0; i < problem.out.storage.size(); ++i)
    SEER_CHECK(written[i] || problem.out.storage.get(i) == AttentionCase::kGuard,
               "%s: guard %d overwritten", name, int(i));
}

void run_sparse(AttentionCase& problem, const char* name) {
  for (cpu::Isa isa : isas()) {
    const Status status = cpu::attention(problem.params(), {}, serial_for, isa);
    SEER_CHECK(status.ok(), "%s: %s", name, status.text.c_str());
    check_out(problem, (std::string(name) + ", isa " + std::to_string(int(isa))).c_str());
  }
}

AttnPoolParams pool_params(const BlockSparseAttnParams& p, bool per_token, float* pooled) {
  AttnPoolParams pool;
  pool.dtype = p.dtype;
  pool.batch = p.batch;
  pool.heads_q = p.heads_q;
  pool.heads_kv = p.heads_kv;
  pool.head_dim = p.head_dim;
  pool.rows_q = p.rows_q;
  pool.rows_kv = p.rows_kv;
  pool.total_q = p.total_q;
  pool.total_kv = p.total_kv;
  pool.block_q = p.block_q;
  pool.block_kv = p.block_kv;
  pool.causal = p.causal;
  pool.per_token = per_token;
  pool.scale = p.scale;
  pool.q = p.q;
  pool.k = p.k;
  pool.v = p.v;
  pool.cu_seqlens_q = p.cu_seqlens_q;
  pool.cu_seqlens_kv = p.cu_seqlens_kv;
  pool.out = p.out;
  pool.lse = p.lse;
  pool.lse_batch_stride = p.lse_batch_stride;
  pool.lse_head_stride = p.lse_head_stride;
  pool.pooled = pooled;
  return pool;
}

void run_pool(AttentionCase& problem, bool per_token, const char* name) {
  const AttentionShape& shape = problem.shape;
  const int64_t map_rows =
      per_token ? problem.lse.size() : problem.batch() * shape.heads_q * problem.blocks_q;
  std::vector<float> pooled(map_rows * problem.blocks_kv);
  AttnPoolParams pool = pool_params(problem.params(), per_token, pooled.data());
  SEER_CHECK(attn_pool_map_elements(pool) == int64_t(pooled.size()), "%s: map elements", name);
  pool.block_kv = 0;
  SEER_CHECK(attn_pool_map_elements(pool) == 0, "%s: map elements of block_kv 0", name);
  std::vector<double> expected(pooled.size());
  const Status status =
      attn_pool_cpu(pool_params(problem.params(), per_token, pooled.data()), scattered_for);
  SEER_CHECK(status.ok(), "%s: %s", name, status.text.c_str());
  check_out(problem, name);
  for (int64_t b = 0; b < problem.batch(); ++b) {
    for (int64_t h = 0; h < shape.heads_q; ++h) {
      for (int64_t r = 0; r < problem.length_q(b); ++r) {
        const AttentionCase::Row row = problem.expected(b, r, h);
        const int64_t map_row =
            per_token ? problem.lse_at(b, r, h)
                      : (b * shape.heads_q + h) * problem.blocks_q + r / shape.block_q;
        for (int64_t c = 0; c < problem.length_kv(b); ++c) {
          double& cell = expected[map_row * problem.blocks_kv + c / shape.block_kv];
          const double value = row.probability[c];
          if (value > cell || std::isnan(value)) cell = value;
        }
      }
    }
  }
  for (size_t i = 0; i < pooled.size(); ++i)
    SEER_CHECK(expected[i] == 0.0 ? pooled[i] == 0.0f
                                  : matches(pooled[i], expected[i], 1e-5 * expected[i]),
               "%s: pooled %d: %g, expected %g", name, int(i), pooled[i], expected[i]);
}

void test_shapes() {
  uint64_t seed = 1;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int block_q : {16, 32, 64, 128}) {
      for (int block_kv : {16, 32, 64, 128}) {
        AttentionShape shape{.dtype = dtype,
                             .batch = 2,
                             .heads_q = 4,
                             .heads_kv = 2,
                             .head_dim = 24,
                             .rows_q = 150,
                             .rows_kv = 193,
                             .block_q = block_q,
                             .block_kv = block_kv,
                             .causal = seed % 3 != 0,
                             .mask_heads = 1 << (seed % 3),
                             .mask_batch = 1 + int(seed % 2),
                             .head_major = seed % 2 == 0};
        AttentionCase problem(shape, ++seed);
        run_sparse(problem, "blocks");
      }
    }
  }
  for (int head_dim : {8, 40, 64, 128, 256}) {
    AttentionShape shape{.heads_q = 2,
                         .head_dim = head_dim,
                         .rows_q = 70,
                         .rows_kv = 70,
                         .block_q = 64,
                         .block_kv = 64,
                         .mask_heads = 1,
                         .density = 0.8};
    AttentionCase problem(shape, ++seed);
    run_sparse(problem, "head_dim");
  }
  // Long enough for the tall tiles of dense attention.
  AttentionShape tall{.rows_q = 2050, .rows_kv = 70, .causal = false};
  AttentionCase long_problem(tall, ++seed);
  run_sparse(long_problem, "tall");
  // Decoding, more queries than keys (leading rows see nothing), single elements.
  const int64_t pairs[][2] = {{1, 100}, {100, 40}, {1, 1}, {17, 64}, {64, 65}, {65, 0}, {0, 5}};
  for (const auto& [rows_q, rows_kv] : pairs) {
    for (int mask_heads : {0, 1}) {
      for (bool causal : {true, false}) {
        AttentionShape shape{.rows_q = rows_q,
                             .rows_kv = rows_kv,
                             .block_q = 32,
                             .block_kv = 16,
                             .causal = causal,
                             .mask_heads = mask_heads};
        AttentionCase problem(shape, ++seed);
        run_sparse(problem, "rows");
        if (mask_heads == 0) run_pool(problem, causal, "rows, pooled");
      }
    }
  }
}

void test_packed() {
  for (int mask_heads : {0, 1, 2, 4}) {
    for (bool causal : {true, false}) {
      AttentionShape shape{.heads_q = 4,
                           .heads_kv = 2,
                           .block_q = 16,
                           .block_kv = 32,
                           .causal = causal,
                           .mask_heads = mask_heads,
                           .mask_batch = mask_heads == 1 ? 1 : 5,
                           .lengths_q = {30, 0, 1, 77, 5},
                           .lengths_kv = {64, 9, 0, 77, 33}};
      AttentionCase problem(shape, 40 + mask_heads);
      run_sparse(problem, "packed");
      if (mask_heads == 0)
        for (bool per_token : {false, true}) run_pool(problem, per_token, "packed, pooled");
    }
  }
}

void test_pooled() {
  for (int block : {16, 32, 64, 128}) {
    for (bool per_token : {false, true}) {
      AttentionShape shape{.batch = 2,
                           .heads_q = 4,
                           .heads_kv = 2,
                           .rows_q = 133,
                           .rows_kv = 171,
                           .block_q = block,
                           .block_kv = 192 / block >= 6 ? 32 : 128};
      AttentionCase problem(shape, 60 + block);
      run_pool(problem, per_token, "pooled");
    }
  }
}

// Special values in the keys or values of one column: blocks that are not kept, columns behind
// the diagonal and other sequences must not notice; rows that see the column must.
void test_special_values() {
  for (float special : {kNaN, kInfinity, -kInfinity}) {
    for (bool in_k : {true, false}) {
      for (int mask_heads : {0, 1}) {
        AttentionShape shape{.rows_q = 64,
                             .rows_kv = 64,
                             .block_q = 32,
                             .block_kv = 32,
                             .mask_heads = mask_heads,
                             .density = 0.6};
        AttentionCase problem(shape, 80);
        Strided& tensor = in_k ? problem.k : problem.v;
        // An infinite key gives scores of both signs; finite ones beside -inf stay defined.
        tensor.storage.set(tensor.at(0, 40, 0, 3), special);
        run_sparse(problem, "special value");
        if (mask_heads == 0)
          for (bool per_token : {false, true}) run_pool(problem, per_token, "special, pooled");
      }
    }
  }
  // Nothing kept at all, over K and V full of NaN.
  AttentionShape shape{.mask_heads = 1, .density = 0.0};
  AttentionCase problem(shape, 90);
  for (Strided* tensor : {&problem.k, &problem.v})
    for (int64_t i = 0; i < tensor->storage.size(); ++i) tensor->storage.set(i, kNaN);
  run_sparse(problem, "empty mask");
  // Scores beyond exp's range, and a row whose every score is -inf.
  AttentionShape large{.rows_q = 20, .rows_kv = 33, .block_q = 16, .block_kv = 16};
  AttentionCase extreme(large, 91);
  for (int64_t i = 0; i < extreme.q.storage.size(); ++i)
    extreme.q.storage.set(i, 40.0f * extreme.q.storage.get(i));
  for (int64_t d = 0; d < large.head_dim; ++d) extreme.q.storage.set(extreme.q.at(0, 2, 0, d), 0);
  extreme.q.storage.set(extreme.q.at(0, 2, 0, 0), -1e30f);
  for (int64_t c = 0; c < large.rows_kv; ++c)
    extreme.k.storage.set(extreme.k.at(0, c, 0, 0), 1e30f);
  for (int64_t d = 0; d < large.head_dim; ++d)
    for (int64_t r : {0, 1, 3}) extreme.q.storage.set(extreme.q.at(0, r, 0, d), 0.0f);
  const Status status = block_sparse_attn_cpu(extreme.params(), serial_for);
  SEER_CHECK(status.ok(), "%s", status.text.c_str());
  SEER_CHECK(extreme.lse[2] == -kInfinity, "lse of -inf scores: %g", extreme.lse[2]);
  for (int64_t d = 0; d < large.head_dim; ++d) {
    SEER_CHECK(extreme.out.storage.get(extreme.out.at(0, 2, 0, d)) == 0.0f, "out of -inf scores");
    SEER_CHECK(std::isfinite(extreme.out.storage.get(extreme.out.at(0, 0, 0, d))), "zero query");
  }
}

void test_determinism() {
  AttentionShape shape{.batch = 2,
                       .heads_q = 4,
                       .heads_kv = 2,
                       .rows_q = 200,
                       .rows_kv = 200,
                       .mask_heads = 4,
                       .mask_batch = 2};
  AttentionCase problem(shape, 7);
  std::vector<std::vector<float>> results;
  for (const ParallelFor& loop : {ParallelFor(serial_for), ParallelFor(scattered_for),
                                  ParallelFor(threaded_for), ParallelFor(threaded_for)}) {
    SEER_CHECK(block_sparse_attn_cpu(problem.params(), loop).ok(), "run");
    std::vector<float> result = problem.lse;
    for (int64_t i = 0; i < problem.out.storage.size(); ++i)
      result.push_back(problem.out.storage.get(i));
    results.push_back(result);
  }
  for (const std::vector<float>& result : results)
    SEER_CHECK(result == results[0], "results differ between thread counts");
}

void expect_refusal(const BlockSparseAttnParams& params, const char* text) {
  const Status status = block_sparse_attn_cpu(params, serial_for);
  SEER_CHECK(status.code == Code::kInvalidArgument && status.text.find(text) == 0,
             "expected \"%s\", got \"%s\"", text, status.text.c_str());
}

void test_refusals() {
  AttentionShape shape{.heads_q = 4, .heads_kv = 2, .mask_heads = 1};
  AttentionCase problem(shape, 3);
  const BlockSparseAttnParams good = problem.params();
  BlockSparseAttnParams bad = good;
  bad.head_dim = 12;
  expect_refusal(bad, "q: expected head_dim a multiple of 8 from 8 to 256, got head_dim 12. ");
  bad = good;
  bad.block_kv = 48;
  expect_refusal(bad, "block_kv: expected 16, 32, 64 or 128, got 48. ");
  bad = good;
  bad.heads_kv = 3;
  expect_refusal(bad, "k: expected heads_kv that divides heads_q = 4, got heads_kv = 3. ");
  bad = good;
  bad.block_bits.heads = 3;
  expect_refusal(bad, "block_bits: expected 1, heads_kv or heads_q heads, got 3. ");
  bad = good;
  bad.block_bits.words = 0;
  expect_refusal(bad, "block_bits: expected at least 1 words per row, got 0. ");

  AttentionShape packed{.lengths_q = {10, 20}, .lengths_kv = {10, 20}};
  AttentionCase sequences(packed, 4);
  const BlockSparseAttnParams right = sequences.params();
  const auto expect_cu = [&](std::vector<int32_t> cu, const char* text) {
    bad = right;
    bad.cu_seqlens_kv = cu.data();
    expect_refusal(bad, text);
  };
  expect_cu({1, 10, 30}, "cu_seqlens_kv: expected a first entry of 0, got 1. ");
  expect_cu({0, 31, 30}, "cu_seqlens_kv: expected sequences of at most 20 rows, got sequence 0 ");
  expect_cu({0, 12, 10}, "cu_seqlens_kv: expected entries that do not decrease, got sequence 1 ");
  expect_cu({0, 10, 29}, "cu_seqlens_kv: expected a last entry of 30, the packed rows, got 29. ");
  bad = right;
  bad.cu_seqlens_kv = nullptr;
  expect_refusal(bad, "cu_seqlens_kv: expected cu_seqlens_q and cu_seqlens_kv together, got ");
}

}  // namespace

int main() {
  test_shapes();
  test_packed();
  test_pooled();
  test_special_values();
  test_determinism();
  test_refusals();
  return seer::test::report("attention");
}
