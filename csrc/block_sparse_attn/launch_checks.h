// SPDX-License-Identifier: Apache-2.0
// What the launches of block_sparse_attn and attn_pool do before they enqueue a kernel.
#pragma once

#include "common/varlen_fill.h"
#include "seer/block_sparse_attn.h"
#include "seer/status.h"

namespace seer {

// What no kernel could work with: rows, strides, alignment, heads, mask.
Status check_launch_params(const BlockSparseAttnParams& params);

VarlenFillParams varlen_fill_params(const BlockSparseAttnParams& params);

}  // namespace seer
