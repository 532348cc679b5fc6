// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "seer/types.h"

namespace seer {

// The CUDA type of a dtype that kernels take.
template <DType kDType>
using ElementOf = std::conditional_t<kDType == DType::kBFloat16, __nv_bfloat16, __half>;

}  // namespace seer
