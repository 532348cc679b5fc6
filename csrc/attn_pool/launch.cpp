// SPDX-License-Identifier: Apache-2.0
// attn_pool on CUDA: checks the params, picks the kernel, enqueues it.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "attn_pool/dense.h"
#include "attn_pool/variant.h"
#include "block_sparse_attn/launch_checks.h"
#include "common/cuda_status.h"
#include "common/device.h"
#include "common/varlen_fill.h"

namespace seer {
namespace {

// What a generated source defines, in the order of attn_pool_variants().
struct Kernel {
  int (*launch)(const AttnPoolParams&, CUstream_st*);
  int (*rows_at_a_time)(int64_t*);
};
constexpr Kernel kKernels[] = {
#define SEER_VARIANT(name, sm, dtype, ...)                                       \
  {&launch_attn_pool_variant<AttnPoolKey{sm, dtype_named(#dtype), __VA_ARGS__}>, \
   &attn_pool_rows_at_a_time<AttnPoolKey{sm, dtype_named(#dtype), __VA_ARGS__}>},
#include "attn_pool_variants.inc"
#undef SEER_VARIANT
};

Status find(const AttnPoolParams& params, int* index) {
  int sm = 0;
  if (Status status = device_sm(&sm); !status.ok()) return status;
  std::string why_not;
  *index = find_attn_pool_variant(params, sm, &why_not);
  return *index < 0 ? Status::unsupported(why_not) : Status{};
}

// Units of work of the launch: 0 if it has no rows.
int64_t tiles_of(const AttnPoolParams& params) {
  return int64_t{params.batch} * params.heads_q * ceil_div(params.rows_q, 64);
}

Status check_aligned(const char* name, const void* data, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  if (data != nullptr && address % bytes == 0) return {};
  return Status::invalid(std::string(name) + ": expected device memory aligned to " +
                         std::to_string(bytes) + " bytes, got address " + std::to_string(address) +
                         ". Allocate it by itself.");
}

}  // namespace

Status attn_pool_workspace(const AttnPoolParams& params, int64_t* bytes) {
  *bytes = 0;
  int index = 0;
  if (Status status = find(params, &index); !status.ok()) return status;
  if (tiles_of(params) == 0) return {};
  int64_t rows = 0;
  const auto error = static_cast<cudaError_t>(kKernels[index].rows_at_a_time(&rows));
  *bytes =
      kAttnPoolStripsOffset + rows * attn_pool_strip_tiles(params.rows_kv) * int64_t{sizeof(float)};
  return cuda_status(error, "asking how many rows of attn_pool fit on the device");
}

Status launch_attn_pool(const AttnPoolParams& params, CUstream_st* stream) {
  int index = 0;
  if (Status status = find(params, &index); !status.ok()) return status;
  if (params.heads_q == 0) return {};
  const BlockSparseAttnParams dense = as_dense(params);
  if (Status status = check_launch_params(dense); !status.ok()) return status;
  const int64_t tiles = tiles_of(params), elements = attn_pool_map_elements(params);
  if (tiles > INT32_MAX) {
    return Status::unsupported("q: expected batch * heads * query tiles below 2^31, got " +
                               std::to_string(tiles) + ". Split the batch.");
  }
  if (elements > 0) {
    if (Status s = check_aligned("pooled", params.pooled, 16); !s.ok()) return s;
  }
  if (tiles > 0) {
    if (Status s = check_aligned("workspace", params.workspace, 256); !s.ok()) return s;
  }
  // Nothing was enqueued so far: a refused call leaves the outputs as they were.
  if (elements > 0 && attn_pool_wants_zeros(params)) {
    const cudaError_t error = cudaMemsetAsync(params.pooled, 0, elements * sizeof(float), stream);
    if (error != cudaSuccess) return cuda_status(error, "zeroing the map of attn_pool");
  }
  if (params.cu_seqlens_q != nullptr) {
    if (Status status = fill_uncovered_rows(varlen_fill_params(dense), stream); !status.ok()) {
      return status;
    }
  }
  if (tiles == 0) return {};
  const auto error = static_cast<cudaError_t>(kKernels[index].launch(params, stream));
  const AttnPoolVariant& variant = attn_pool_variants()[index];
  return check_launch(variant.name, tiles, variant.smem_bytes, error);
}

}  // namespace seer
