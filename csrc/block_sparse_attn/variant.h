// SPDX-License-Identifier: Apache-2.0
// What names a compiled block_sparse_attn kernel, and the function each generated source defines.
//
// csrc/variants.json is the one list of kernels. The build turns a row of it into a source (from
// the template of its family) that instantiates launch_variant, and into a line of the table that
// variants.cpp and launch.cpp read.
#pragma once

#include <cstdint>

#include "common/variant_key.h"
#include "seer/block_sparse_attn.h"

namespace seer {

struct BlockSparseAttnKey {
  int sm;
  DType dtype;
  int head_dim;
  int block_q;
  int tile_kv;
  int threads;  // this and smem_bytes are asserted to be the kernel's own
  int smem_bytes;
};

// Portable kernels (family 80) run on every GPU from the lowest architecture on that this build was
// made for; the others only on the compute capability they name.
bool family_runs_on(int family, int sm);

// Whether TMA can address q, k and v: it takes neither an empty tensor nor a stride of 0 (an
// expanded dimension), and 40 bits of a stride in bytes. A stride along a dimension of size 1 is
// never used.
bool sm90_addressable(const BlockSparseAttnParams& params);

// Enqueues one kernel with params that were checked; returns the cudaError_t.
template <BlockSparseAttnKey kKey>
int launch_variant(const BlockSparseAttnParams& params, CUstream_st* stream);

}  // namespace seer
