// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <limits>

#include "common/cpu_gate_strip.h"
#include "pool_gate/gate_check.h"
#include "seer/pool_gate.h"

namespace seer {

Status gate_scores_cpu(const GateScoresParams& params, const ParallelFor& parallel_for) {
  if (params.heads_q == 0) return {};
  if (Status status = check_gate(params); !status.ok()) return status;
  if (Status status = cpu::check_gate_lengths(params); !status.ok()) return status;
  const int64_t lanes = cpu::GateStrip::lanes(params);
  const int64_t strips = ceil_div(params.blocks_q, lanes);
  const int64_t jobs = int64_t{params.batch} * params.heads_q * strips;
  if (jobs == 0 || params.blocks_kv == 0) return {};
  std::atomic<bool> exhausted{false};
  parallel_for(jobs, 1, [&](int64_t begin, int64_t end) {
    cpu::GateStrip strip(params);
    if (!strip.ok()) {
      exhausted = true;
      return;
    }
    for (int64_t job = begin; job < end; ++job) {
      const int64_t head = job / strips, first = job % strips * lanes;
      const int64_t count = std::min(lanes, params.blocks_q - first);
      const cpu::GateExtent extent = cpu::gate_extent(params, head / params.heads_q);
      strip.compute(head / params.heads_q, head % params.heads_q, first, count);
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t row = first + lane;
        const int64_t visible = cpu::visible_blocks(extent, params.causal, row);
        float* scores = params.scores + (head * params.blocks_q + row) * params.blocks_kv;
        strip.copy_row(lane, visible, scores);
        std::fill(scores + visible, scores + params.blocks_kv,
                  -std::numeric_limits<float>::infinity());
      }
    }
  });
  return exhausted ? cpu::out_of_memory(cpu::GateStrip::scratch_floats(params)) : Status{};
}

}  // namespace seer
