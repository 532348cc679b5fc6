// SPDX-License-Identifier: Apache-2.0
// pool_gate, gate_scores and gate_select on CUDA: picks the kernel, plans its tiles, enqueues it.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>

#include "common/cuda_status.h"
#include "common/device.h"
#include "common/variant_key.h"
#include "pool_gate/gate_check.h"
#include "pool_gate/variant.h"

namespace seer {
namespace {

// Same order as the tables of variants.cpp.
#define SEER_VARIANT(name, sm, dtype, dim) \
  &launch_pool_gate_variant<GateKey{sm, dtype_named(#dtype), dim}>,
constexpr int (*kLaunchPoolGate[])(const PoolGateLaunch&, int, int, CUstream_st*) = {
#include "pool_gate_variants.inc"
};
#undef SEER_VARIANT
#define SEER_VARIANT(name, sm, dtype, dim) \
  &launch_gate_scores_variant<GateKey{sm, dtype_named(#dtype), dim}>,
constexpr int (*kLaunchGateScores[])(const GateScoresParams&, CUstream_st*) = {
#include "gate_scores_variants.inc"
};
#undef SEER_VARIANT
#define SEER_VARIANT(name, sm, dtype, dim) \
  &launch_gate_select_variant<GateKey{sm, dtype_named(#dtype), dim}>,
constexpr int (*kLaunchGateSelect[])(const GateSelectParams&, CUstream_st*) = {
#include "gate_select_variants.inc"
};
#undef SEER_VARIANT

constexpr int64_t kMaxGrid = INT32_MAX;

int channels(const PoolGateParams& p) {
  return std::popcount(static_cast<unsigned>(p.pools)) * p.head_dim;
}

// At most 42 KB: no kernel needs a raised limit.
int smem_bytes(const PoolGateParams& p) {
  if (p.weight == nullptr) return kPoolWarps * channels(p) * int{sizeof(float)};
  const int units = p.heads_out / p.heads * p.gate_dim / kUnit;
  const int columns = std::min(units, kPoolWarps) * kUnit;
  return kWeightedBlocks * pooled_row_bytes(channels(p)) + 16 * (columns + 4) * int{sizeof(float)};
}

Status check_grid(const char* argument, int64_t grid) {
  if (grid <= kMaxGrid) return {};
  return Status::unsupported(std::string(argument) +
                             ": expected batch * heads * tiles below 2^31, got " +
                             std::to_string(grid) + ". Split the batch.");
}

Status launched(int error, const GateVariant& variant) {
  return cuda_status(static_cast<cudaError_t>(error), std::string("launching ") + variant.name);
}

struct Plan {
  PoolGateLaunch work = {};
  int index = -1;  // of the variant; -1: nothing to do
  int64_t grid = 0;
  int smem_bytes = 0;
};

int64_t ctas(const PoolGateParams& p, int tile) {
  return int64_t{p.batch} * p.heads * ceil_div(ceil_div(p.rows, p.block), tile);
}

// Blocks per CTA: the most, halved while there would be fewer than `wanted` CTAs.
int tile_of(const PoolGateParams& p, int most, int fewest, int64_t wanted) {
  int tile = most;
  while (tile > fewest && ctas(p, tile) < wanted) tile /= 2;
  return tile;
}

// With weight, a tile reads the weights of its group from L2 whatever its size, and waits for them:
// large tiles, as long as every second multiprocessor has one. Without, a warp does two blocks of
// a tile or four, where enough CTAs remain for an even end.
int tile_of(const PoolGateParams& p, int multiprocessors) {
  return p.weight != nullptr ? tile_of(p, kWeightedBlocks, kPoolWarps, (multiprocessors + 1) / 2)
                             : tile_of(p, 4 * kPoolWarps, 2 * kPoolWarps, 3 * multiprocessors);
}

// Blocks per CTA of a tensor without weight beside `weighted` CTAs with: where all can run at once,
// they should, alone on a multiprocessor or two on each. q and k of 4k, 8k and 16k tokens, 32 and 8
// heads: 0.0249, 0.0341 and 0.0478 ms instead of 0.0285, 0.0389 and 0.0507.
int tile_beside(const PoolGateParams& p, int64_t weighted, int multiprocessors) {
  for (const int per_multiprocessor : {1, 2}) {
    for (int tile = 2 * kPoolWarps; tile <= 4 * kPoolWarps * per_multiprocessor; tile *= 2) {
      if (weighted + ctas(p, tile) <= int64_t{per_multiprocessor} * multiprocessors) return tile;
    }
  }
  return tile_of(p, multiprocessors);
}

// One CTA with weight per multiprocessor, then one for every so many blocks without. Were all CTAs
// with weight first, those of a wave would load at the same time and then, at the same time, wait
// for weights. 128k tokens of 32 and 8 heads take 0.380 ms so; with one for every 32, 64 or 128
// blocks 0.350, 0.341, 0.336.
constexpr uint32_t kPlainBlocksPerTurn = 128;

void interleave(PoolGateLaunch* work, int64_t grid, int multiprocessors) {
  if (work->problems[0].weight == nullptr || work->problems[1].weight != nullptr) return;
  const auto plain = static_cast<uint32_t>(grid) - work->first_ctas;
  work->per_turn = kPlainBlocksPerTurn / static_cast<uint32_t>(work->tile_blocks[1]);
  work->lead = std::min(work->first_ctas, static_cast<uint32_t>(multiprocessors));
  work->turns = std::min(work->first_ctas - work->lead, plain / work->per_turn);
}

// One launch for all problems that have work, projections first: their CTAs live longest.
Status plan(const PoolGateParams* problems, int count, Plan* plan) {
  int sm = 0, multiprocessors = 0;
  if (Status status = device_sm(&sm); !status.ok()) return status;
  if (Status status = device_multiprocessors(&multiprocessors); !status.ok()) return status;
  if (count < 1 || count > kMaxPoolProblems) {
    return Status::invalid("count: expected 1 or 2 tensors, got " + std::to_string(count) +
                           ". Launch them separately.");
  }
  int used = 0;
  for (const bool weighted : {true, false}) {
    for (int i = 0; i < count; ++i) {
      const PoolGateParams& p = problems[i];
      if ((p.weight != nullptr) != weighted) continue;
      if (Status status = check_pool_gate(p); !status.ok()) return status;
      std::string why_not;
      const int index = find_pool_gate_variant(p, sm, &why_not);
      if (index < 0) return Status::unsupported(why_not);
      if (p.batch == 0 || p.heads == 0 || p.heads_out == 0 || p.rows == 0) continue;
      if (used > 0 && index != plan->index) {
        return Status::unsupported(
            "x: expected tensors of one dtype and head_dim, got two. Launch them separately.");
      }
      const bool beside =
          used > 0 && p.weight == nullptr && plan->work.problems[0].weight != nullptr;
      const int tile =
          beside ? tile_beside(p, plan->grid, multiprocessors) : tile_of(p, multiprocessors);
      plan->index = index;
      plan->work.problems[used] = p;
      plan->work.tile_blocks[used] = tile;
      plan->smem_bytes = std::max(plan->smem_bytes, smem_bytes(p));
      plan->grid += ctas(p, tile);
      if (Status status = check_grid("x", plan->grid); !status.ok()) return status;
      if (used == 0) plan->work.first_ctas = plan->work.lead = static_cast<uint32_t>(plan->grid);
      ++used;
    }
  }
  if (used == 2) interleave(&plan->work, plan->grid, multiprocessors);
  return {};
}

// The variant for gate_scores or gate_select, whose params passed `check`; -1: nothing to do.
template <class Params>
Status plan_rows(const Params& params, const Status& check,
                 int (*find)(const Params&, int, std::string*), const GateScoresParams& gate,
                 int* index) {
  if (!check.ok()) return check;
  int sm = 0;
  if (Status status = device_sm(&sm); !status.ok()) return status;
  std::string why_not;
  *index = find(params, sm, &why_not);
  if (*index < 0) return Status::unsupported(why_not);
  const int64_t rows = int64_t{gate.batch} * gate.heads_q * gate.blocks_q;
  if (rows == 0 || gate.blocks_kv == 0) *index = -1;
  return check_grid("q_gate", rows);
}

}  // namespace

Status launch_pool_gate(const PoolGateParams* problems, int count, CUstream_st* stream) {
  Plan launch;
  Status status = plan(problems, count, &launch);
  if (!status.ok() || launch.index < 0) return status;
  return launched(kLaunchPoolGate[launch.index](launch.work, static_cast<int>(launch.grid),
                                                launch.smem_bytes, stream),
                  pool_gate_variants()[launch.index]);
}

bool pool_gate_served(const PoolGateParams* problems, int count) {
  Plan unused;
  return plan(problems, count, &unused).code != Code::kUnsupported;
}

bool gate_scores_served(const GateScoresParams& p) {
  int unused = 0;
  return plan_rows(p, check_gate(p), &find_gate_scores_variant, p, &unused).code !=
         Code::kUnsupported;
}

bool gate_select_served(const GateSelectParams& p) {
  int unused = 0;
  return plan_rows(p, check_gate_select(p), &find_gate_select_variant, p.gate, &unused).code !=
         Code::kUnsupported;
}

Status launch_gate_scores(const GateScoresParams& p, CUstream_st* stream) {
  int index = -1;
  Status status = plan_rows(p, check_gate(p), &find_gate_scores_variant, p, &index);
  if (!status.ok() || index < 0) return status;
  return launched(kLaunchGateScores[index](p, stream), gate_scores_variants()[index]);
}

Status launch_gate_select(const GateSelectParams& p, CUstream_st* stream) {
  int index = -1;
  Status status = plan_rows(p, check_gate_select(p), &find_gate_select_variant, p.gate, &index);
  if (!status.ok() || index < 0) return status;
  return launched(kLaunchGateSelect[index](p, stream), gate_select_variants()[index]);
}

}  // namespace seer
