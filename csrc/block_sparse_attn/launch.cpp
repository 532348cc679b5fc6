// SPDX-License-Identifier: Apache-2.0
// block_sparse_attn on CUDA: checks the params, picks the kernel, enqueues it.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "block_sparse_attn/launch_checks.h"
#include "block_sparse_attn/variant.h"
#include "common/cuda_status.h"
#include "common/device.h"
#include "common/varlen_fill.h"

namespace seer {
namespace {

using Launch = int (*)(const BlockSparseAttnParams&, CUstream_st*);

// Same order as block_sparse_attn_variants().
constexpr Launch kLaunch[] = {
#define SEER_VARIANT(name, sm, dtype, ...) \
  &launch_variant<BlockSparseAttnKey{sm, dtype_named(#dtype), __VA_ARGS__}>,
#include "block_sparse_attn_variants.inc"
#undef SEER_VARIANT
};

constexpr int64_t kMaxGrid = INT32_MAX;

Status check_workspace(const BlockSparseAttnVariant& variant, const int32_t* workspace) {
  if (variant.sm != 90) return {};
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  if (workspace != nullptr && address % alignof(int32_t) == 0) return {};
  return Status::invalid("workspace: expected " + std::to_string(kBlockSparseAttnWorkspaceBytes) +
                         " bytes of device memory aligned to 4 bytes, got address " +
                         std::to_string(address) + ". Allocate it beside lse.");
}

}  // namespace

Status launch_block_sparse_attn(const BlockSparseAttnParams& params, CUstream_st* stream) {
  int sm = 0;
  if (Status status = device_sm(&sm); !status.ok()) return status;
  std::string why_not;
  const int index = find_block_sparse_attn_variant(params, sm, &why_not);
  if (index < 0) return Status::unsupported(why_not);
  if (params.heads_q == 0) return {};
  if (Status status = check_launch_params(params); !status.ok()) return status;

  const BlockSparseAttnVariant& variant = block_sparse_attn_variants()[index];
  const int64_t grid =
      int64_t{params.batch} * params.heads_q * ceil_div(params.rows_q, params.block_q);
  if (grid > kMaxGrid) {
    return Status::unsupported("q: expected batch * heads * query blocks below 2^31, got " +
                               std::to_string(grid) + ". Split the batch.");
  }
  if (grid > 0) {
    if (Status status = check_workspace(variant, params.workspace); !status.ok()) return status;
  }
  if (params.cu_seqlens_q != nullptr) {
    if (Status status = fill_uncovered_rows(varlen_fill_params(params), stream); !status.ok()) {
      return status;
    }
  }
  if (grid == 0) return {};
  const auto error = static_cast<cudaError_t>(kLaunch[index](params, stream));
  return check_launch(variant.name, grid, variant.smem_bytes, error);
}

}  // namespace seer
