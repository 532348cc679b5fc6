// SPDX-License-Identifier: Apache-2.0
// pool_gate, gate_scores and gate_select on CUDA: picks the kernel, plans its tiles, enqueues it.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>

#include "common/cuda_status.h"
#include "common/device.h"
#include "common/variant_key.h"
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

// One launch for all problems that have work, projections first: their CTAs live longest.
Status plan(const PoolGateParams* problems, int count, Plan* plan) {
  int sm = 0;
  if (Status status = device_sm(&sm); !status.ok()) return status;
  if (count < 1 || count > kMaxPoolProblems) {
    return Status::invalid("count: expected 1 or 2 tensors, got " + std::to_string(count) +
                           ". Launch them separately.");
  }
  int used = 0;
  for (const bool weighted : {true, false}) {
    for (int i = 0; i < count; ++i) {
      const PoolGateParams& p = problems[i];
      if ((p.weight != nullptr) != weighted) continue;
      std::string why_not;
      const int index = find_pool_gate_variant(p, sm, &why_not);
      if (index < 0) return Status::unsupported(why_not);
      if (p.batch == 0 || p.heads == 0 || p.heads_out == 0 || p.rows == 0) continue;
      if (used > 0 && index != plan->index) {
        return Status::unsupported(
            "x: expected tensors of one dtype and head_dim, got two. Launch them separately.");
      }
      const int tile = weighted ? kWeightedBlocks : kPlainBlocks;
      const int64_t tiles = ceil_div(ceil_div(p.rows, p.block), tile);
      plan->index = index;
      plan->work.problems[used] = p;
      plan->work.tile_blocks[used] = tile;
      plan->smem_bytes = std::max(plan->smem_bytes, smem_bytes(p));
      plan->grid += int64_t{p.batch} * p.heads * tiles;
      if (Status status = check_grid("x", plan->grid); !status.ok()) return status;
      // CTAs from here on are the next problem's: none, unless one follows.
      for (int next = ++used; next <= kMaxPoolProblems; ++next) {
        plan->work.first_cta[next] = static_cast<uint32_t>(plan->grid);
      }
    }
  }
  return {};
}

// The variant for gate_scores or gate_select; -1 if there is nothing to do.
template <class Params>
Status plan_rows(const Params& params, int (*find)(const Params&, int, std::string*),
                 const GateScoresParams& gate, int* index) {
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
  return plan_rows(p, &find_gate_scores_variant, p, &unused).code != Code::kUnsupported;
}

bool gate_select_served(const GateSelectParams& p) {
  int unused = 0;
  return plan_rows(p, &find_gate_select_variant, p.gate, &unused).code != Code::kUnsupported;
}

Status launch_gate_scores(const GateScoresParams& p, CUstream_st* stream) {
  int index = -1;
  Status status = plan_rows(p, &find_gate_scores_variant, p, &index);
  if (!status.ok() || index < 0) return status;
  return launched(kLaunchGateScores[index](p, stream), gate_scores_variants()[index]);
}

Status launch_gate_select(const GateSelectParams& p, CUstream_st* stream) {
  int index = -1;
  Status status = plan_rows(p, &find_gate_select_variant, p.gate, &index);
  if (!status.ok() || index < 0) return status;
  return launched(kLaunchGateSelect[index](p, stream), gate_select_variants()[index]);
}

}  // namespace seer
