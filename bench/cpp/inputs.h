// SPDX-License-Identifier: Apache-2.0
// Inputs: standard normal values. A GPU multiplies zeros and constants faster than random numbers,
// because it is limited by power.
#pragma once

#include <cstdint>

#include "device.h"
#include "seer/types.h"

namespace seer::bench {

// `count` normal values times `spread`, of a stream of numbers of their own for each seed.
DeviceBuffer normal(DType dtype, int64_t count, uint64_t seed, float spread = 1.0f);

}  // namespace seer::bench
