// SPDX-License-Identifier: Apache-2.0
// A case with its tensors on the device: what is launched, and how its result is judged.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "device.h"
#include "masks.h"

namespace seer::bench {

// What a comparison with the reference found.
class Verdict {
 public:
  // The largest error found and the largest allowed; NaN is never allowed.
  void bound(const char* what, double worst, double allowed);
  void note(const std::string& text) { add(text); }

  bool ok() const { return ok_; }
  // "out 2.4e-03 of 1.0e-02, lse 9.5e-07 of 1.0e-04, 2048 rows"
  const std::string& text() const { return text_; }

 private:
  void add(const std::string& text) { text_ += (text_.empty() ? "" : ", ") + text; }
  bool ok_ = true;
  std::string text_;
};

class Problem {
 public:
  virtual ~Problem() = default;
  // Enqueues the operator once. Throws CudaError.
  virtual void launch(cudaStream_t stream) const = 0;
  // Compares what the last launch left, which must be done, with the reference.
  virtual Verdict verify() const = 0;
  // The kernel that serves the case, e.g. "attn_pool_sm90_bf16_d128".
  virtual std::string kernel() const = 0;
};

// Allocates and fills. Throws CudaError, also where no kernel serves the case.
std::unique_ptr<Problem> make_problem(const Case& c, const HostMask& mask, const Device& device,
                                      uint64_t seed);

// The two kinds of problems; make_problem chooses.
std::unique_ptr<Problem> make_attention_problem(const Case& c, const HostMask& mask,
                                                const Device& device, uint64_t seed);
std::unique_ptr<Problem> make_gate_problem(const Case& c, const Device& device, uint64_t seed);

// `count` elements of device memory as floats.
std::vector<float> floats_at(DType dtype, const void* device_data, int64_t count);

// Largest |got - expected| / |expected| (Euclidean) over rows of `dim` values. A row that should be
// zero must be; one with NaN or infinity is infinitely wrong.
double worst_row_error(const std::vector<float>& got, const std::vector<float>& expected,
                       int64_t dim);

// Relative error that a row of 16-bit results may have: as in bench/problem.py.
double row_budget(DType dtype);

}  // namespace seer::bench
