// SPDX-License-Identifier: Apache-2.0
// block_sparse_attn and attn_pool.
#include <algorithm>
#include <cmath>
#include <limits>

#include "inputs.h"
#include "problem.h"
#include "reference.h"

namespace seer::bench {
namespace {

// What two fp32 sums of a score may differ by (docs/numerics.md section 4: about 2e-5 for normal
// inputs), with room: lse has this error, a probability that of its score and of lse.
constexpr double kScoreBudget = 1e-4;
constexpr int64_t kVerifyBytes = int64_t{1} << 30;  // of reference probabilities

// Contiguous [batch, rows, heads, head_dim].
template <class Pointer>
View<Pointer> contiguous(Pointer data, int64_t rows, int heads, int head_dim) {
  return {data, rows * heads * head_dim, int64_t{heads} * head_dim, head_dim};
}

class AttentionProblem : public Problem {
 public:
  AttentionProblem(const Case& c, const HostMask& mask, const Device& device, uint64_t seed);

  void launch(cudaStream_t stream) const override {
    check(c_.op == Op::kAttnPool ? launch_attn_pool(pool_, stream)
                                 : launch_block_sparse_attn(sparse_, stream));
  }
  Verdict verify() const override;
  std::string kernel() const override { return kernel_; }

 private:
  std::vector<QueryBlock> blocks_to_verify() const;
  double worst_lse(const std::vector<QueryBlock>& blocks, const std::vector<float>& exact) const;
  double worst_map(const std::vector<QueryBlock>& blocks, const std::vector<float>& exact) const;
  std::vector<float> rows_of_out(const std::vector<QueryBlock>& blocks) const;

  Case c_;
  DeviceBuffer q_, k_, v_, out_, lse_, bits_, map_, workspace_;
  BlockSparseAttnParams sparse_;
  AttnPoolParams pool_;
  std::string kernel_;
};

AttentionProblem::AttentionProblem(const Case& c, const HostMask& mask, const Device& device,
                                   uint64_t seed)
    : c_(c) {
  const int64_t q_count = int64_t{c.batch} * c.rows_q * c.heads_q * c.head_dim;
  const int64_t kv_count = int64_t{c.batch} * c.rows_kv * c.heads_kv * c.head_dim;
  sparse_.dtype = c.dtype;
  sparse_.batch = c.batch;
  sparse_.heads_q = c.heads_q;
  sparse_.heads_kv = c.heads_kv;
  sparse_.head_dim = c.head_dim;
  sparse_.rows_q = c.rows_q;
  sparse_.rows_kv = c.rows_kv;
  sparse_.block_q = c.block.q;
  sparse_.block_kv = c.block.kv;
  sparse_.causal = c.causal;
  sparse_.scale = 1.0f / std::sqrt(float(c.head_dim));
  sparse_.arch = c.arch;
  // The addresses decide nothing, but the strides do: find the kernel before allocating.
  sparse_.q = contiguous<const void*>(nullptr, c.rows_q, c.heads_q, c.head_dim);
  sparse_.k = sparse_.v = contiguous<const void*>(nullptr, c.rows_kv, c.heads_kv, c.head_dim);
  pool_.dtype = c.dtype;
  pool_.batch = c.batch;
  pool_.heads_q = c.heads_q;
  pool_.heads_kv = c.heads_kv;
  pool_.head_dim = c.head_dim;
  pool_.rows_q = c.rows_q;
  pool_.rows_kv = c.rows_kv;
  pool_.block_q = c.block.q;
  pool_.block_kv = c.block.kv;
  pool_.causal = c.causal;
  pool_.per_token = c.per_token;
  pool_.reduce = c.reduce;
  pool_.scale = sparse_.scale;
  pool_.arch = c.arch;
  pool_.q = sparse_.q;
  pool_.k = sparse_.k;
  pool_.v = sparse_.v;
  std::string why_not;
  const int index = c.op == Op::kAttnPool
                        ? find_attn_pool_variant(pool_, device.sm, &why_not)
                        : find_block_sparse_attn_variant(sparse_, device.sm, &why_not);
  if (index < 0) throw CudaError(why_not);
  kernel_ = c.op == Op::kAttnPool ? attn_pool_variants()[index].name
                                  : block_sparse_attn_variants()[index].name;

  q_ = normal(c.dtype, q_count, 4 * seed);
  k_ = normal(c.dtype, kv_count, 4 * seed + 1);
  v_ = normal(c.dtype, kv_count, 4 * seed + 2);
  out_ = DeviceBuffer::poisoned(q_count * size_of(c.dtype));
  lse_ = DeviceBuffer::poisoned(int64_t{c.batch} * c.heads_q * c.rows_q * int64_t{sizeof(float)});
  sparse_.q.data = q_.as<>();
  sparse_.k.data = k_.as<>();
  sparse_.v.data = v_.as<>();
  sparse_.out = contiguous(out_.as<>(), c.rows_q, c.heads_q, c.head_dim);
  sparse_.lse = lse_.as<float>();
  sparse_.lse_head_stride = c.rows_q;
  sparse_.lse_batch_stride = c.heads_q * c.rows_q;
  if (!mask.dense()) {
    bits_ = DeviceBuffer::copy_of(mask.bits);
    const int64_t head_stride = mask.blocks_q * mask.words;
    sparse_.block_bits = {bits_.as<int32_t>(), mask.heads, mask.heads * head_stride,
                          head_stride,         mask.words, mask.words};
  }
  if (c.op == Op::kBlockSparseAttn) {
    workspace_ = DeviceBuffer::poisoned(kBlockSparseAttnWorkspaceBytes);
    sparse_.workspace = workspace_.as<int32_t>();
    return;
  }
  pool_.q = sparse_.q;
  pool_.k = sparse_.k;
  pool_.v = sparse_.v;
  pool_.out = sparse_.out;
  pool_.lse = sparse_.lse;
  pool_.lse_head_stride = sparse_.lse_head_stride;
  pool_.lse_batch_stride = sparse_.lse_batch_stride;
  int64_t bytes = 0;
  check(attn_pool_workspace(pool_, &bytes));
  workspace_ = DeviceBuffer::poisoned(bytes);
  pool_.workspace = workspace_.as<>();
  map_ = DeviceBuffer::poisoned(attn_pool_map_elements(pool_) * int64_t{sizeof(float)});
  pool_.pooled = map_.as<float>();
}

// All query blocks of all heads where their probabilities fit kVerifyBytes, else as many as do,
// spread evenly, the first and the last among them.
std::vector<QueryBlock> AttentionProblem::blocks_to_verify() const {
  const int64_t all = int64_t{c_.batch} * c_.heads_q * c_.blocks_q();
  const int64_t bytes = c_.block.q * c_.rows_kv * int64_t{sizeof(float)};
  const int64_t count = std::clamp<int64_t>(kVerifyBytes / bytes, 1, all);
  std::vector<QueryBlock> blocks;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t at = count == 1 ? all - 1 : n * (all - 1) / (count - 1);
    const int64_t head = at / c_.blocks_q(), row = at % c_.blocks_q() * c_.block.q;
    blocks.push_back({static_cast<int>(head / c_.heads_q), static_cast<int>(head % c_.heads_q), row,
                      std::min<int64_t>(c_.block.q, c_.rows_q - row)});
  }
  return blocks;
}

std::vector<float> AttentionProblem::rows_of_out(const std::vector<QueryBlock>& blocks) const {
  int64_t rows = 0;
  for (const QueryBlock& block : blocks) rows += block.rows;
  const int64_t size = size_of(c_.dtype), width = c_.head_dim * size;
  const DeviceBuffer gathered(rows * width);
  char* to = gathered.as<char>();
  for (const QueryBlock& block : blocks) {
    const MutView& out = sparse_.out;
    const int64_t first = block.batch * out.batch_stride + block.first_row * out.row_stride +
                          block.head * out.head_stride;
    check(cudaMemcpy2D(to, width, out_.as<char>() + first * size, out.row_stride * size, width,
                       block.rows, cudaMemcpyDeviceToDevice),
          "gathering rows");
    to += block.rows * width;
  }
  return floats_at(c_.dtype, gathered.as<>(), rows * c_.head_dim);
}

double AttentionProblem::worst_lse(const std::vector<QueryBlock>& blocks,
                                   const std::vector<float>& exact) const {
  const std::vector<float> lse = lse_.to_host<float>();
  double worst = 0.0;
  size_t row = 0;
  for (const QueryBlock& block : blocks) {
    const float* got = lse.data() + block.batch * sparse_.lse_batch_stride +
                       block.head * sparse_.lse_head_stride + block.first_row;
    for (int64_t r = 0; r < block.rows; ++r, ++row) {
      if (got[r] == exact[row]) continue;  // -inf of a row that sees nothing, too
      const double error = std::abs(double{got[r]} - exact[row]);
      worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
    }
  }
  return worst;
}

// `exact`: one row of KV blocks per query row. Probabilities are compared relative to each. What is 0
// must be 0, but for what is below the normal numbers of fp32 (in a sum: of every key). Sums over the
// rows of a query block are made of multiples of 2^-23, one for each 16 rows (docs/attn_pool.md):
// half of that is no error.
double AttentionProblem::worst_map(const std::vector<QueryBlock>& blocks,
                                   const std::vector<float>& exact) const {
  const std::vector<float> map = map_.to_host<float>();
  const int64_t columns = c_.blocks_kv();
  const bool sum = c_.reduce == PoolReduce::kSum;
  const double flushed = double{std::numeric_limits<float>::min()} * (sum ? c_.block.kv : 1);
  const double rounding =
      sum && !c_.per_token ? 0x1p-24 * double(ceil_div(c_.block.q, 16)) : flushed;
  double worst = 0.0;
  const auto compare = [&](double got, double expected) {
    const double error = std::abs(got - expected) - rounding;
    const double relative = error <= 0.0 ? 0.0 : error / expected;
    worst =
        std::isnan(relative) ? std::numeric_limits<double>::infinity() : std::max(worst, relative);
  };
  const float* row = exact.data();
  for (const QueryBlock& block : blocks) {
    const int64_t head = int64_t{block.batch} * c_.heads_q + block.head;
    if (c_.per_token) {
      const float* got = map.data() + (head * c_.rows_q + block.first_row) * columns;
      for (int64_t at = 0; at < block.rows * columns; ++at) compare(got[at], row[at]);
    } else {
      const float* got =
          map.data() + (head * c_.blocks_q() + block.first_row / c_.block.q) * columns;
      for (int64_t j = 0; j < columns; ++j) {
        double expected = 0.0;
        for (int64_t r = 0; r < block.rows; ++r) {
          const double value = row[r * columns + j];
          expected = sum ? expected + value / double(block.rows) : std::max(expected, value);
        }
        compare(got[j], expected);
      }
    }
    row += block.rows * columns;
  }
  return worst;
}

Verdict AttentionProblem::verify() const {
  const std::vector<QueryBlock> blocks = blocks_to_verify();
  MapOf map = MapOf::kNothing;
  if (c_.op == Op::kAttnPool) map = c_.reduce == PoolReduce::kSum ? MapOf::kSum : MapOf::kMax;
  const AttentionRows exact = reference_attention(sparse_, blocks, map);
  Verdict verdict;
  verdict.bound("out", worst_row_error(rows_of_out(blocks), exact.out, c_.head_dim),
                row_budget(c_.dtype));
  verdict.bound("lse", worst_lse(blocks, exact.lse), kScoreBudget);
  if (map != MapOf::kNothing)
    verdict.bound("map", worst_map(blocks, exact.map), 2.0 * kScoreBudget);
  verdict.note(std::to_string(exact.lse.size()) + " rows");
  return verdict;
}

}  // namespace

std::unique_ptr<Problem> make_attention_problem(const Case& c, const HostMask& mask,
                                                const Device& device, uint64_t seed) {
  return std::make_unique<AttentionProblem>(c, mask, device, seed);
}

}  // namespace seer::bench
