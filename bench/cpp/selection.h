// SPDX-License-Identifier: Apache-2.0
// The judge of gate_select: sorts a row's scores and sees what the rule must, and may, keep.
#pragma once

#include <cstdint>

#include "seer/pool_gate.h"

namespace seer::bench {

// Blocks of one row that are kept and must not be, or must be and are not. `scores` [columns], -inf
// where hidden, are known within `slack`: a block whose place that could change may fall either way.
int64_t wrong_choices(SelectMethod method, double value, const float* scores, int64_t columns,
                      const int32_t* bits, double slack);

}  // namespace seer::bench
