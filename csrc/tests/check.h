// SPDX-License-Identifier: Apache-2.0
// What the C++ tests share: a check macro, a random source, and parallel-for stand-ins.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "common/cpu_dtype.h"
#include "common/cpu_kernels.h"
#include "seer/types.h"

namespace seer::test {

inline int failures = 0;

// Counts a failure and prints where, with a printf-style note of the values; the run goes on.
#define SEER_CHECK(condition, ...)                                        \
  do {                                                                    \
    if (!(condition) && ++::seer::test::failures <= 20) {                 \
      std::printf("%s:%d: failed: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                           \
      std::printf("\n");                                                  \
    }                                                                     \
  } while (false)

inline int report(const char* name) {
  std::printf("%s: %s (%d failures)\n", name, failures == 0 ? "passed" : "FAILED", failures);
  return failures == 0 ? 0 : 1;
}

// xorshift64*: the same numbers with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  // Sum of twelve uniforms: close enough to a normal distribution.
  double normal() {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  int64_t below(int64_t bound) { return static_cast<int64_t>(bits() % uint64_t(bound)); }

 private:
  uint64_t state_;
};

// One call of the whole range; the smallest ranges, last first; real threads.
inline void serial_for(int64_t count, int64_t, const ParallelBody& body) { body(0, count); }
inline void scattered_for(int64_t count, int64_t, const ParallelBody& body) {
  for (int64_t i = count - 1; i >= 0; --i) body(i, i + 1);
}
inline void threaded_for(int64_t count, int64_t grain, const ParallelBody& body) {
  const int64_t share = std::max(grain, ceil_div(count, 3));
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += share)
    threads.emplace_back(
        [&body, begin, end = std::min(count, begin + share)] { body(begin, end); });
  for (std::thread& thread : threads) thread.join();
}

inline std::vector<cpu::Isa> isas() {
  std::vector<cpu::Isa> found;
  for (int isa = 0; isa <= static_cast<int>(cpu::best_isa()); ++isa)
    found.push_back(static_cast<cpu::Isa>(isa));
  return found;
}

// Storage of any element type; values enter and leave as floats.
class Buffer {
 public:
  Buffer(DType dtype, int64_t count, float fill)
      : dtype_(dtype),
        narrow_(dtype == DType::kFloat32 ? 0 : count),
        wide_(dtype == DType::kFloat32 ? count : 0) {
    for (int64_t i = 0; i < count; ++i) set(i, fill);
  }
  void set(int64_t i, float value) {
    switch (dtype_) {
      case DType::kFloat32: wide_[i] = value; break;
      case DType::kBFloat16: narrow_[i] = float_to_bfloat16(value); break;
      case DType::kFloat16: narrow_[i] = float_to_float16(value); break;
    }
  }
  float get(int64_t i) const {
    switch (dtype_) {
      case DType::kFloat32: return wide_[i];
      case DType::kBFloat16: return bfloat16_to_float(narrow_[i]);
      case DType::kFloat16: return float16_to_float(narrow_[i]);
    }
    return 0.0f;
  }
  void* data() {
    return dtype_ == DType::kFloat32 ? static_cast<void*>(wide_.data())
                                     : static_cast<void*>(narrow_.data());
  }
  int64_t size() const { return static_cast<int64_t>(wide_.size() + narrow_.size()); }

 private:
  DType dtype_;
  std::vector<uint16_t> narrow_;
  std::vector<float> wide_;
};

// Unit roundoff: the bound of the relative error of one rounding.
inline double rounding(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 0x1p-24;
    case DType::kBFloat16: return 0x1p-8;
    case DType::kFloat16: return 0x1p-11;
  }
  return 0.0;
}

}  // namespace seer::test
