// SPDX-License-Identifier: Apache-2.0
// The CPU attention engine: FlashAttention-2's forward pass (Dao 2023) over the kept blocks, with
// query rows in vector lanes (see cpu_kernels.h).
//
//   parallel for each (sequence, head, query block):
//     qt <- rows * scale * log2(e), transposed, in chunks of `lanes` rows
//     for each kept KV block j, ascending:
//       k_tile, v_tile <- the block's columns that some row sees, as fp32
//       for each chunk that sees one of them:
//         scores <- k_tile x qt; online softmax step; out <- out * carry + v_tile^T x scores
//     out / row_sum and lse are stored; with a map, so are the blocks' largest probabilities, or
//     their sums: kept until row_sum is final as logarithms, which no change of row_max concerns
//
// A job writes only its own rows, so results do not depend on the number of threads. Scratch per
// thread: O((block_q + block_kv) * head_dim), plus blocks_kv * block_q for the map.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <numbers>

#include "common/cpu_attn.h"
#include "common/cpu_buffer.h"
#include "common/cpu_check.h"

namespace seer::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows of one batch entry: of the padded tensors, or of the packed ones between two cu_seqlens.
struct Sequence {
  int64_t batch, q_begin, kv_begin, rows_q, rows_kv;
};

// What all jobs share.
struct Problem {
  const BlockSparseAttnParams& params;
  const PooledMap& pooled;
  const Kernels& kernels;
  int block_q, block_kv;  // those of the mask or the map; without either, a good tile
  int64_t blocks_q, blocks_kv;

  Sequence sequence(int64_t b) const {
    const int32_t *q = params.cu_seqlens_q, *kv = params.cu_seqlens_kv;
    if (q == nullptr) return {b, 0, 0, params.rows_q, params.rows_kv};
    return {b, q[b], kv[b], q[b + 1] - q[b], kv[b + 1] - kv[b]};
  }
  int64_t chunks() const { return ceil_div(block_q, kernels.lanes); }
};

const void* row_of(const ConstView& view, DType dtype, int64_t b, int64_t row, int64_t head) {
  return static_cast<const char*>(view.data) +
         (b * view.batch_stride + row * view.row_stride + head * view.head_stride) * size_of(dtype);
}

// All state of one job, reused from job to job of a thread.
class Worker {
 public:
  explicit Worker(const Problem& problem)
      : problem_(problem),
        params_(problem.params),
        kernels_(problem.kernels),
        scratch_(scratch_floats(problem)) {
    if (!scratch_.ok()) return;
    const int64_t rows = problem.chunks() * kernels_.lanes, dim = params_.head_dim;
    qt_ = scratch_.take(rows * dim);
    out_ = scratch_.take(rows * dim);
    k_tile_ = scratch_.take(problem.block_kv * dim);
    v_tile_ = scratch_.take(problem.block_kv * dim);
    staging_ = scratch_.take(rows * dim);
    scores_ = scratch_.take(problem.block_kv * kernels_.lanes);
    row_max_ = scratch_.take(rows);
    row_sum_ = scratch_.take(rows);
    carry_ = scratch_.take(kernels_.lanes);
    visible_ = reinterpret_cast<int32_t*>(scratch_.take(kernels_.lanes));
    if (problem.pooled.data != nullptr) maxima_ = scratch_.take(rows * problem.blocks_kv);
  }

  static int64_t scratch_floats(const Problem& problem) {
    const int64_t lanes = problem.kernels.lanes, dim = problem.params.head_dim;
    const int64_t rows = problem.chunks() * lanes;
    const int64_t map = problem.pooled.data != nullptr ? rows * problem.blocks_kv : 0;
    return 3 * Scratch::padded(rows * dim) + 2 * Scratch::padded(problem.block_kv * dim) +
           Scratch::padded(problem.block_kv * lanes) + 2 * Scratch::padded(rows) +
           2 * Scratch::padded(lanes) + Scratch::padded(map);
  }

  bool ok() const { return scratch_.ok(); }

  void run(int64_t b, int64_t head, int64_t block) {
    sequence_ = problem_.sequence(b);
    head_ = head;
    block_ = block;
    row_begin_ = block * problem_.block_q;
    rows_ = std::min<int64_t>(problem_.block_q, sequence_.rows_q - row_begin_);
    if (rows_ <= 0) return;
    load_queries();
    const int64_t cols = visible(row_begin_ + rows_ - 1);
    const int64_t blocks = ceil_div(cols, problem_.block_kv);
    for (int64_t j = next_kept(0, blocks); j < blocks; j = next_kept(j + 1, blocks)) {
      const int64_t begin = j * problem_.block_kv;
      visit(j, begin, std::min<int64_t>(problem_.block_kv, cols - begin));
    }
    finish();
  }

 private:
  // Columns [0, visible(row)) of the sequence can be seen by its row: bottom-right causal rule.
  int64_t visible(int64_t row) const {
    if (!params_.causal) return sequence_.rows_kv;
    return std::clamp<int64_t>(row + 1 + sequence_.rows_kv - sequence_.rows_q, 0,
                               sequence_.rows_kv);
  }

  int64_t kv_head() const { return head_ / (params_.heads_q / params_.heads_kv); }

  // The first kept block at or after j, or `blocks` if there is none.
  int64_t next_kept(int64_t j, int64_t blocks) const {
    const BlockBitsView& bits = params_.block_bits;
    if (bits.data == nullptr) return j;
    const int64_t mask_head = bits.heads == params_.heads_q    ? head_
                              : bits.heads == params_.heads_kv ? kv_head()
                                                               : 0;
    const int32_t* row = bits.data + sequence_.batch * bits.batch_stride +
                         mask_head * bits.head_stride + block_ * bits.row_stride;
    while (j < blocks) {
      const uint32_t word = static_cast<uint32_t>(row[j / 32]) >> (j % 32);
      if (word != 0) return std::min(blocks, j + std::countr_zero(word));
      j = (j / 32 + 1) * 32;
    }
    return blocks;
  }

  void load_queries() {
    const int64_t dim = params_.head_dim, lanes = kernels_.lanes;
    kernels_.load_tile(
        params_.dtype,
        row_of(params_.q, params_.dtype, sequence_.batch, sequence_.q_begin + row_begin_, head_),
        params_.q.row_stride, rows_, dim, staging_);
    // The softmax runs in base 2: log2(e) is folded into the scale, and the scale into q.
    const float scale = params_.scale * std::numbers::log2e_v<float>;
    for (int64_t r = 0; r < problem_.chunks() * lanes; ++r) {
      float* column = qt_ + r / lanes * dim * lanes + r % lanes;
      for (int64_t d = 0; d < dim; ++d)
        column[d * lanes] = r < rows_ ? staging_[r * dim + d] * scale : 0.0f;
      row_max_[r] = -kInfinity;
      row_sum_[r] = 0.0f;
    }
    std::fill_n(out_, problem_.chunks() * lanes * dim, 0.0f);
  }

  // Adds `cols` columns from column `begin` of the sequence, all in KV block j.
  void visit(int64_t j, int64_t begin, int64_t cols) {
    const int64_t dim = params_.head_dim, lanes = kernels_.lanes;
    const int64_t row = sequence_.kv_begin + begin;
    kernels_.load_tile(params_.dtype,
                       row_of(params_.k, params_.dtype, sequence_.batch, row, kv_head()),
                       params_.k.row_stride, cols, dim, k_tile_);
    kernels_.load_tile(params_.dtype,
                       row_of(params_.v, params_.dtype, sequence_.batch, row, kv_head()),
                       params_.v.row_stride, cols, dim, v_tile_);
    for (int64_t chunk = 0; chunk * lanes < rows_; ++chunk) {
      const int64_t first = row_begin_ + chunk * lanes;
      const int64_t last = std::min(first + lanes, row_begin_ + rows_) - 1;
      const int64_t seen = std::min(cols, visible(last) - begin);
      if (seen <= 0) continue;
      const bool masked = visible(first) - begin < seen;
      for (int64_t lane = 0; masked && lane < lanes; ++lane)
        visible_[lane] = static_cast<int32_t>(
            std::clamp<int64_t>(visible(std::min(first + lane, last)) - begin, 0, seen));
      float* out = out_ + chunk * lanes * dim;
      float* kept =
          maxima_ != nullptr ? maxima_ + (chunk * problem_.blocks_kv + j) * lanes : nullptr;
      kernels_.multiply(k_tile_, seen, dim, qt_ + chunk * lanes * dim, scores_);
      kernels_.softmax_step(scores_, seen, masked ? visible_ : nullptr, row_max_ + chunk * lanes,
                            row_sum_ + chunk * lanes, carry_, problem_.pooled.sum ? nullptr : kept,
                            problem_.pooled.sum ? kept : nullptr);
      if (problem_.pooled.sum) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const float base = row_max_[chunk * lanes + lane];
          kept[lane] = std::log2(kept[lane]) + (base == -kInfinity ? 0.0f : base);
        }
      }
      if (masked && !all_finite(v_tile_, seen * dim))
        accumulate_visible(seen, out);
      else
        kernels_.accumulate(v_tile_, seen, dim, scores_, carry_, out);
    }
  }

  // On the bits, because an integer reduction vectorises.
  static bool all_finite(const float* values, int64_t count) {
    constexpr uint32_t kExponent = 0x7f800000u;
    uint32_t special = 0;
    for (int64_t i = 0; i < count; ++i)
      special |= (std::bit_cast<uint32_t>(values[i]) & kExponent) == kExponent ? 1u : 0u;
    return special == 0;
  }

  // accumulate() for a masked tile with Inf or NaN in V: its 0 * Inf would leak an invisible
  // column into a row, so here invisible products are not formed at all.
  void accumulate_visible(int64_t cols, float* out) const {
    const int64_t dim = params_.head_dim, lanes = kernels_.lanes;
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        float sum = out[d * lanes + lane] * carry_[lane];
        for (int64_t c = 0; c < std::min<int64_t>(cols, visible_[lane]); ++c)
          sum += v_tile_[c * dim + d] * scores_[c * lanes + lane];
        out[d * lanes + lane] = sum;
      }
    }
  }

  // row_sum is 0 only for a row that saw nothing (or nothing but scores of -inf): its maximum
  // column contributes 1.
  void finish() {
    const int64_t dim = params_.head_dim, lanes = kernels_.lanes;
    const bool packed = params_.cu_seqlens_q != nullptr;
    float* lse = params_.lse + head_ * params_.lse_head_stride + row_begin_ +
                 (packed ? sequence_.q_begin : sequence_.batch * params_.lse_batch_stride);
    for (int64_t r = 0; r < rows_; ++r) {
      const float* column = out_ + r / lanes * dim * lanes + r % lanes;
      const float sum = row_sum_[r];
      const bool empty = sum == 0.0f;
      const float inverse = 1.0f / sum;
      for (int64_t d = 0; d < dim; ++d)
        staging_[r * dim + d] = empty ? 0.0f : column[d * lanes] * inverse;
      lse[r] = empty ? -kInfinity : row_max_[r] * std::numbers::ln2_v<float> + std::log(sum);
    }
    const MutView& out = params_.out;
    const ConstView rows{out.data, out.batch_stride, out.row_stride, out.head_stride};
    kernels_.store_tile(params_.dtype, staging_, rows_, dim,
                        const_cast<void*>(row_of(rows, params_.dtype, sequence_.batch,
                                                 sequence_.q_begin + row_begin_, head_)),
                        out.row_stride);
    if (maxima_ != nullptr) store_map();
  }

  void store_map() {
    const int64_t lanes = kernels_.lanes, blocks_kv = problem_.blocks_kv;
    const bool packed = params_.cu_seqlens_q != nullptr;
    const bool per_token = problem_.pooled.per_token;
    // First row of the map that belongs to this job.
    const int64_t map_row =
        !per_token ? (sequence_.batch * params_.heads_q + head_) * problem_.blocks_q + block_
        : packed   ? head_ * params_.total_q + sequence_.q_begin + row_begin_
                   : (sequence_.batch * params_.heads_q + head_) * params_.rows_q + row_begin_;
    float* map = problem_.pooled.data + map_row * blocks_kv;
    const float share = per_token ? 1.0f : 1.0f / static_cast<float>(rows_);
    for (int64_t chunk = 0; chunk * lanes < rows_; ++chunk) {
      const int64_t first = chunk * lanes, rows = std::min(lanes, rows_ - first);
      float* maxima = maxima_ + chunk * blocks_kv * lanes;
      float* inverse_sum = carry_;
      for (int64_t lane = 0; lane < lanes; ++lane)
        inverse_sum[lane] = row_sum_[first + lane] == 0.0f ? 0.0f : 1.0f / row_sum_[first + lane];
      const int64_t tiles = blocks_of(first + rows - 1);
      kernels_.probabilities(maxima, tiles, row_max_ + first, inverse_sum);
      for (int64_t lane = 0; lane < rows; ++lane) {
        const int64_t seen = blocks_of(first + lane);  // beyond them the map keeps its zeros
        float* map_of_row = per_token ? map + (first + lane) * blocks_kv : map;
        for (int64_t j = 0; j < seen; ++j) {
          const float value = maxima[j * lanes + lane];
          if (problem_.pooled.sum) {
            map_of_row[j] += value * share;
          } else if (value > map_of_row[j] || std::isnan(value)) {
            map_of_row[j] = value;  // a NaN is taken, and stays: no value compares greater
          }
        }
      }
    }
  }

  // KV blocks that row `row` of this job sees at least one column of.
  int64_t blocks_of(int64_t row) const {
    return ceil_div(visible(row_begin_ + row), problem_.block_kv);
  }

  const Problem& problem_;
  const BlockSparseAttnParams& params_;
  const Kernels& kernels_;
  Scratch scratch_;
  // The job.
  Sequence sequence_{};
  int64_t head_ = 0, block_ = 0, row_begin_ = 0, rows_ = 0;
  // Scratch; [chunk] has one entry per `lanes` rows.
  float* qt_ = nullptr;         // [chunk][head_dim][lanes]
  float* out_ = nullptr;        // [chunk][head_dim][lanes], not yet divided by row_sum
  float* k_tile_ = nullptr;     // [block_kv][head_dim]
  float* v_tile_ = nullptr;     // [block_kv][head_dim]
  float* staging_ = nullptr;    // [block_q][head_dim]
  float* scores_ = nullptr;     // [block_kv][lanes]
  float* row_max_ = nullptr;    // [chunk][lanes], in base 2
  float* row_sum_ = nullptr;    // [chunk][lanes]
  float* carry_ = nullptr;      // [lanes]
  int32_t* visible_ = nullptr;  // [lanes]
  float* maxima_ = nullptr;     // [chunk][blocks_kv][lanes], only with a map: maxima or log2(sums)
};

}  // namespace

Status attention(const BlockSparseAttnParams& params, const PooledMap& pooled,
                 const ParallelFor& parallel_for, Isa isa) {
  const Status status = check_attention(params);
  if (!status.ok()) return status;
  // Dense attention has no block size of its own. Long sequences take tall tiles, because each
  // streams K and V from beyond the private caches (8192 rows, head_dim 64, bfloat16, one Zen 4
  // core: 85 GFLOP/s with 128 rows, at best 79 with 64). Short ones are worth more jobs.
  const bool dense = params.block_bits.data == nullptr && pooled.data == nullptr;
  const int block_q = dense ? (params.rows_q >= 2048 ? 128 : 64) : params.block_q;
  const int block_kv = dense ? 64 : params.block_kv;
  const Problem problem{params,
                        pooled,
                        kernels_for(std::min<int64_t>(block_q, params.rows_q), isa),
                        block_q,
                        block_kv,
                        ceil_div(params.rows_q, block_q),
                        ceil_div(params.rows_kv, block_kv)};
  const int64_t blocks_q = problem.blocks_q;
  const int64_t jobs = int64_t{params.batch} * params.heads_q * blocks_q;
  if (jobs == 0) return {};
  std::atomic<bool> exhausted{false};
  parallel_for(jobs, 1, [&](int64_t begin, int64_t end) {
    Worker worker(problem);
    if (!worker.ok()) {
      exhausted = true;
      return;
    }
    for (int64_t job = begin; job < end; ++job) {
      // Thread pools hand out contiguous ranges, and with the causal rule late query blocks cost
      // more: taking blocks from both ends in turn balances the ranges.
      const int64_t turn = job % blocks_q;
      const int64_t block = turn % 2 == 0 ? turn / 2 : blocks_q - 1 - turn / 2;
      worker.run(job / blocks_q / params.heads_q, job / blocks_q % params.heads_q, block);
    }
  });
  return exhausted ? out_of_memory(Worker::scratch_floats(problem)) : Status{};
}

}  // namespace seer::cpu
