// SPDX-License-Identifier: Apache-2.0
// Words of csrc/variants.json as C++ values.
#pragma once

#include <string_view>

#include "seer/types.h"

namespace seer {

constexpr DType dtype_named(std::string_view name) {
  return name == "bfloat16"  ? DType::kBFloat16
         : name == "float16" ? DType::kFloat16
                             : DType::kFloat32;
}

}  // namespace seer
