// SPDX-License-Identifier: Apache-2.0
// Block selection, one query-block row at a time: scores, softmax over the visible blocks,
// selection by one of four methods, forced blocks, bits.
//
// A NaN score is never selected except by a forced rule, and takes no part in the softmax.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "common/cpu_gate_strip.h"
#include "pool_gate/gate_check.h"
#include "seer/pool_gate.h"

namespace seer {
namespace {

// Orders like (score descending, index ascending) when compared as greater-first integers: the
// score's bits made monotonic above, the inverted index below. Adding 0 makes -0 equal to 0.
uint64_t rank_key(float score, int64_t index) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);
  const uint32_t monotonic = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{monotonic} << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
}
int64_t index_of(uint64_t key) { return static_cast<uint32_t>(~static_cast<uint32_t>(key)); }

class RowSelector {
 public:
  explicit RowSelector(const GateSelectParams& params)
      : params_(params),
        value_(static_cast<float>(params.value)),
        blocks_kv_(params.gate.blocks_kv) {
    if (params.method == SelectMethod::kTopK) {
      // Clamped first: a double beyond int64 has no defined conversion.
      keep_ = static_cast<int64_t>(std::clamp(params.value, 0.0, double(blocks_kv_)));
    }
  }

  // The rows that follow belong to this sequence.
  void start(const cpu::GateExtent& extent) {
    extent_ = extent;
    if (params_.method != SelectMethod::kDensity) return;
    // Causal rows keep k of at most i + 1 blocks: k N - k (k - 1) / 2 of N (N + 1) / 2 in all.
    const double share = (1.0 - std::sqrt(1.0 - params_.value)) * double(extent.blocks_kv);
    keep_ = std::max<int64_t>(1, static_cast<int64_t>(std::floor(share)));
  }

  // Workspace: the scores of one row and their ranking keys.
  static int64_t workspace_floats(int64_t blocks_kv) {
    return cpu::Scratch::padded(blocks_kv) + cpu::Scratch::padded(2 * blocks_kv);
  }
  void use(float* scores, uint64_t* keys) {
    scores_ = scores;
    keys_ = keys;
  }

  float* scores() { return scores_; }

  // Selects among the first `visible` scores (overwriting them) and adds the forced blocks.
  void select(int64_t row, int64_t visible, int32_t* words) {
    words_ = words;
    std::fill_n(words, ceil_div(blocks_kv_, 32), 0);
    switch (params_.method) {
      case SelectMethod::kThreshold: select_threshold(visible); break;
      case SelectMethod::kTopK:
      case SelectMethod::kDensity: select_best(visible); break;
      case SelectMethod::kTopP: select_mass(visible); break;
    }
    const bool dense = row >= extent_.blocks_q - params_.dense_last_rows;
    for (int64_t j = 0; j < (dense ? visible : std::min(params_.sink, visible)); ++j) keep(j);
    for (int64_t j = std::max<int64_t>(0, visible - params_.local); j < visible; ++j) keep(j);
  }

 private:
  void keep(int64_t j) {
    auto* words = reinterpret_cast<uint32_t*>(words_);
    words[j / 32] |= 1u << (j % 32);
  }

  // Ranking keys of the scores that are numbers; returns how many.
  int64_t fill_keys(int64_t visible) {
    int64_t count = 0;
    for (int64_t j = 0; j < visible; ++j)
      if (!std::isnan(scores_[j])) keys_[count++] = rank_key(scores_[j], j);
    return count;
  }

  // Replaces the scores by their softmax. Scores equal to the maximum count as exp(0) even if it
  // is infinite, so that an overflow of the gate shares the mass instead of spreading NaN.
  void softmax(int64_t visible) {
    float maximum = -std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < visible; ++j)
      if (scores_[j] > maximum) maximum = scores_[j];
    double sum = 0.0;
    for (int64_t j = 0; j < visible; ++j) {
      scores_[j] = scores_[j] == maximum ? 1.0f : std::exp(scores_[j] - maximum);
      if (!std::isnan(scores_[j])) sum += scores_[j];
    }
    const float total = static_cast<float>(sum);
    for (int64_t j = 0; j < visible; ++j) scores_[j] /= total;
  }

  void select_threshold(int64_t visible) {
    softmax(visible);
    for (int64_t j = 0; j < visible; ++j)
      if (scores_[j] > value_) keep(j);
  }

  void select_best(int64_t visible) {
    const int64_t count = fill_keys(visible), kept = std::min(keep_, count);
    if (kept < count)
      std::nth_element(keys_, keys_ + kept, keys_ + count, std::greater<uint64_t>());
    for (int64_t i = 0; i < kept; ++i) keep(index_of(keys_[i]));
  }

  // A heap yields the blocks in descending order and stops at the mass: no full sort.
  void select_mass(int64_t visible) {
    const int64_t count = fill_keys(visible);
    softmax(visible);
    std::make_heap(keys_, keys_ + count);
    double mass = 0.0;
    for (int64_t left = count; left > 0; --left) {
      std::pop_heap(keys_, keys_ + left);
      const int64_t j = index_of(keys_[left - 1]);
      keep(j);
      mass += scores_[j];
      if (static_cast<float>(mass) >= value_) break;
    }
  }

  const GateSelectParams& params_;
  // Compared in fp32 like the probabilities: 1/10 of the mass must not exceed a value of 0.1.
  float value_;
  int64_t blocks_kv_;
  cpu::GateExtent extent_ = {};
  int64_t keep_ = 0;
  float* scores_ = nullptr;
  uint64_t* keys_ = nullptr;
  int32_t* words_ = nullptr;
};

}  // namespace

Status gate_select_cpu(const GateSelectParams& params, const ParallelFor& parallel_for) {
  if (Status status = check_gate_select(params); !status.ok()) return status;
  if (params.gate.heads_q == 0) return {};
  const GateScoresParams& gate = params.gate;
  if (Status status = cpu::check_gate_lengths(gate); !status.ok()) return status;
  const int64_t lanes = cpu::GateStrip::lanes(gate);
  const int64_t strips = ceil_div(gate.blocks_q, lanes);
  const int64_t jobs = int64_t{gate.batch} * gate.heads_q * strips;
  if (jobs == 0 || gate.blocks_kv == 0) return {};
  const int64_t words = ceil_div(gate.blocks_kv, 32);
  const int64_t workspace_floats = RowSelector::workspace_floats(gate.blocks_kv);
  std::atomic<bool> exhausted{false};
  parallel_for(jobs, 1, [&](int64_t begin, int64_t end) {
    cpu::GateStrip strip(gate);
    cpu::Scratch workspace(workspace_floats);
    if (!strip.ok() || !workspace.ok()) {
      exhausted = true;
      return;
    }
    RowSelector selector(params);
    float* scores = workspace.take(gate.blocks_kv);
    selector.use(scores, reinterpret_cast<uint64_t*>(workspace.take(2 * gate.blocks_kv)));
    for (int64_t job = begin; job < end; ++job) {
      const int64_t head = job / strips, first = job % strips * lanes;
      const int64_t count = std::min(lanes, gate.blocks_q - first);
      const cpu::GateExtent extent = cpu::gate_extent(gate, head / gate.heads_q);
      selector.start(extent);
      strip.compute(head / gate.heads_q, head % gate.heads_q, first, count);
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t row = first + lane;
        const int64_t visible = cpu::visible_blocks(extent, gate.causal, row);
        strip.copy_row(lane, visible, scores);
        selector.select(row, visible, params.block_bits + (head * gate.blocks_q + row) * words);
      }
    }
  });
  return exhausted ? cpu::out_of_memory(cpu::GateStrip::scratch_floats(gate) + workspace_floats)
                   : Status{};
}

}  // namespace seer
