// SPDX-License-Identifier: Apache-2.0
#include "problem.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "common/cpu_dtype.h"

namespace seer::bench {

void Verdict::bound(const char* what, double worst, double allowed) {
  const bool fine = worst <= allowed;  // false for NaN
  char text[96];
  std::snprintf(text, sizeof text, "%s%s %.1e of %.1e", fine ? "" : "WRONG ", what, worst, allowed);
  add(text);
  ok_ = ok_ && fine;
}

std::unique_ptr<Problem> make_problem(const Case& c, const HostMask& mask, const Device& device,
                                      uint64_t seed) {
  const bool attention = c.op == Op::kBlockSparseAttn || c.op == Op::kAttnPool;
  return attention ? make_attention_problem(c, mask, device, seed)
                   : make_gate_problem(c, device, seed);
}

std::vector<float> floats_at(DType dtype, const void* device_data, int64_t count) {
  std::vector<uint16_t> bits(count);
  check(cudaMemcpy(bits.data(), device_data, count * 2, cudaMemcpyDeviceToHost),
        "copying to the host");
  std::vector<float> values(count);
  const bool bfloat = dtype == DType::kBFloat16;
  for (int64_t i = 0; i < count; ++i) {
    values[i] = bfloat ? bfloat16_to_float(bits[i]) : float16_to_float(bits[i]);
  }
  return values;
}

double worst_row_error(const std::vector<float>& got, const std::vector<float>& expected,
                       int64_t dim) {
  double worst = 0.0;
  for (size_t row = 0; row < expected.size(); row += dim) {
    double difference = 0.0, size = 0.0;
    for (size_t at = row; at < row + dim; ++at) {
      difference += std::pow(double{got[at]} - expected[at], 2);
      size += std::pow(double{expected[at]}, 2);
    }
    double error = difference == 0.0 ? 0.0 : std::sqrt(difference / size);
    if (!std::isfinite(error)) error = std::numeric_limits<double>::infinity();
    worst = std::max(worst, error);
  }
  return worst;
}

double row_budget(DType dtype) { return dtype == DType::kBFloat16 ? 1e-2 : 2e-3; }

}  // namespace seer::bench
