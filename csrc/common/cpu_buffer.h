// SPDX-License-Identifier: Apache-2.0
// Scratch memory of one thread, in cache-line aligned pieces of one allocation.
#pragma once

#include <cstdint>
#include <new>
#include <string>

#include "seer/status.h"

namespace seer::cpu {

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

class Scratch {
 public:
  // Never throws: the threads of a foreign pool must not. data() is null if memory ran out.
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(::operator new(static_cast<size_t>(floats) * sizeof(float),
                                                 kAlignment, std::nothrow))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return data_ != nullptr; }
  float* take(int64_t floats) {
    float* piece = data_ + used_;
    used_ += padded(floats);
    return piece;
  }

  // What take(floats) consumes: sum these to size the allocation.
  static constexpr int64_t padded(int64_t floats) { return round_up(floats, 16); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
  int64_t used_ = 0;
};

inline Status out_of_memory(int64_t floats) {
  return Status::unsupported("scratch memory: expected " + std::to_string(floats * 4) +
                             " bytes per thread, got none. Use fewer threads or free memory.");
}

}  // namespace seer::cpu
