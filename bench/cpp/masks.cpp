// SPDX-License-Identifier: Apache-2.0
#include "masks.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <random>

namespace seer::bench {
namespace {

constexpr int64_t kNeighbours = 8;  // query blocks that share the random columns of their stripes
constexpr int64_t kWindow = 4;      // blocks up to the diagonal

int64_t kept_per_row(const Case& c, int64_t i) {
  const int64_t visible = visible_blocks(c, i);
  const auto wanted = static_cast<int64_t>(std::nearbyint(c.density * double(visible)));
  return std::min(std::max<int64_t>(wanted, 1), visible);
}

void set_bit(int32_t* row, int64_t j) {
  row[j / 32] = static_cast<int32_t>(static_cast<uint32_t>(row[j / 32]) | 1u << (j % 32));
}

bool bit(const int32_t* row, int64_t j) {
  return static_cast<uint32_t>(row[j / 32]) >> (j % 32) & 1u;
}

// The first `count` places of `order` become a uniform choice of its first `range` entries.
void choose(std::vector<int64_t>* order, int64_t count, int64_t range, std::mt19937_64* random) {
  for (int64_t at = 0; at < count; ++at) {
    const int64_t other = at + static_cast<int64_t>((*random)() % uint64_t(range - at));
    std::swap((*order)[at], (*order)[other]);
  }
}

void fill_random_row(const Case& c, int64_t i, std::vector<int64_t>* order, std::mt19937_64* random,
                     int32_t* row) {
  const int64_t visible = visible_blocks(c, i), kept = kept_per_row(c, i);
  if (kept == 0) return;
  set_bit(row, visible - 1);
  std::iota(order->begin(), order->begin() + visible - 1, 0);
  choose(order, kept - 1, visible - 1, random);
  for (int64_t n = 0; n < kept - 1; ++n) set_bit(row, (*order)[n]);
}

// `stripes`: all columns in the order in which this group of rows prefers them.
void fill_structured_row(const Case& c, int64_t i, const std::vector<int64_t>& stripes,
                         int32_t* row) {
  const int64_t visible = visible_blocks(c, i);
  int64_t left = kept_per_row(c, i);
  const auto keep = [&](int64_t j) {
    if (left == 0 || j < 0 || j >= visible || bit(row, j)) return;
    set_bit(row, j);
    --left;
  };
  for (int64_t distance = 1; distance <= kWindow; ++distance) keep(visible - distance);
  keep(0);
  for (const int64_t j : stripes) keep(j);
}

// KV blocks [0, whole) are those that every row of query block i sees all of; the diagonal crosses
// the visible blocks after them, which count half.
int64_t whole_blocks(const Case& c, int64_t i) {
  const int64_t seen_by_first = i * c.block.q + 1 + c.rows_kv - c.rows_q;
  if (!c.causal || seen_by_first >= c.rows_kv) return c.blocks_kv();
  return std::max<int64_t>(seen_by_first, 0) / c.block.kv;
}

// Scores of one head: the gate's causal rule counts in blocks.
double visible_scores(const Case& c) {
  double scores = 0.0;
  for (int64_t i = 0; i < c.blocks_q(); ++i) {
    const int64_t last = c.causal ? i + c.blocks_kv() - c.blocks_q() : c.blocks_kv() - 1;
    scores += double(std::clamp<int64_t>(last + 1, 0, c.blocks_kv()));
  }
  return scores;
}

}  // namespace

int64_t visible_blocks(const Case& c, int64_t i) {
  if (!c.causal) return c.blocks_kv();
  const int64_t last_row = std::min((i + 1) * c.block.q, c.rows_q);
  return ceil_div(std::max<int64_t>(last_row + c.rows_kv - c.rows_q, 0), c.block.kv);
}

HostMask make_mask(const Case& c, uint64_t seed) {
  HostMask mask;
  if (c.mask == MaskKind::kDense) return mask;
  mask.heads = c.mask == MaskKind::kKvHead ? c.heads_kv : c.heads_q;
  mask.blocks_q = c.blocks_q();
  mask.words = static_cast<int>(ceil_div(c.blocks_kv(), 32));
  mask.bits.assign(int64_t{c.batch} * mask.heads * mask.blocks_q * mask.words, 0);
  std::mt19937_64 random(seed);
  std::vector<int64_t> order(c.blocks_kv());
  int32_t* row = mask.bits.data();
  for (int64_t head = 0; head < int64_t{c.batch} * mask.heads; ++head) {
    for (int64_t i = 0; i < mask.blocks_q; ++i, row += mask.words) {
      if (c.mask != MaskKind::kStructured) {
        fill_random_row(c, i, &order, &random, row);
        continue;
      }
      if (i % kNeighbours == 0) {
        std::iota(order.begin(), order.end(), 0);
        choose(&order, c.blocks_kv(), c.blocks_kv(), &random);
      }
      fill_structured_row(c, i, order, row);
    }
  }
  return mask;
}

double kept_share(const Case& c, const HostMask& mask) {
  if (mask.dense()) return 1.0;
  double kept = 0.0, visible = 0.0;
  for (int64_t i = 0; i < mask.blocks_q; ++i) visible += double(visible_blocks(c, i));
  for (const int32_t word : mask.bits) kept += std::popcount(static_cast<uint32_t>(word));
  return kept / (visible * c.batch * mask.heads);
}

namespace {

double attention_flop(const Case& c, const HostMask& mask) {
  double blocks = 0.0;  // of all sequences and query heads
  for (int64_t i = 0; i < c.blocks_q(); ++i) {
    const int64_t visible = visible_blocks(c, i), whole = whole_blocks(c, i);
    if (mask.dense()) {
      blocks += 0.5 * double(visible + whole) * c.batch * c.heads_q;
      continue;
    }
    for (int b = 0; b < c.batch; ++b) {
      for (int head = 0; head < mask.heads; ++head) {
        const int32_t* row = mask.row(b, head, i);
        for (int64_t j = 0; j < visible; ++j) {
          if (bit(row, j)) blocks += (j < whole ? 1.0 : 0.5) * (c.heads_q / mask.heads);
        }
      }
    }
  }
  return 4.0 * c.head_dim * c.block.q * c.block.kv * blocks;
}

}  // namespace

Work work_of(const Case& c, const HostMask& mask) {
  const double size = double(size_of(c.dtype)), batch = c.batch, dim = c.head_dim;
  const double q = batch * double(c.rows_q) * c.heads_q * dim;
  const double k = batch * double(c.rows_kv) * c.heads_kv * dim;
  const double embedded_q = batch * double(c.blocks_q()) * c.heads_q * dim;
  const double embedded_k = batch * double(c.blocks_kv()) * c.heads_q * dim;
  const double kinds = count_of_pools(c.pools);
  const double weights = c.heads_q * kinds * dim * dim;
  const double q_side = size * (q + embedded_q * (c.op == Op::kPoolGate ? kinds : 1.0));
  const double k_side = size * (k + weights + embedded_k);
  const double projection = 2.0 * weights * batch * double(c.blocks_kv());
  switch (c.op) {
    case Op::kBlockSparseAttn:
    case Op::kAttnPool: {
      const double rows = batch * double(c.rows_q) * c.heads_q;
      double bytes = size * (2.0 * q + 2.0 * k) + 4.0 * rows + 4.0 * double(mask.bits.size());
      if (c.op == Op::kAttnPool) {
        const double map_rows = c.per_token ? rows : batch * double(c.blocks_q()) * c.heads_q;
        bytes += 4.0 * map_rows * double(c.blocks_kv());
      }
      return {attention_flop(c, mask), bytes};
    }
    case Op::kPoolGate: return c.side == Side::kQ ? Work{0.0, q_side} : Work{projection, k_side};
    case Op::kPoolGatePair: return {projection, q_side + k_side};
    case Op::kGateScores:
    case Op::kGateSelect: {
      const double rows = batch * double(c.blocks_q()) * c.heads_q;
      const double result = c.op == Op::kGateScores
                                ? 4.0 * rows * double(c.blocks_kv())
                                : 4.0 * rows * double(ceil_div(c.blocks_kv(), 32));
      return {2.0 * dim * visible_scores(c) * batch * c.heads_q,
              size * (embedded_q + embedded_k) + result};
    }
  }
  return {};
}

}  // namespace seer::bench
