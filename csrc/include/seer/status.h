// SPDX-License-Identifier: Apache-2.0
// Errors are values: no op of this library throws, prints or ends the process.
#pragma once

#include <string>
#include <utility>

namespace seer {

enum class Code : int { kOk = 0, kInvalidArgument, kUnsupported, kCudaError };

struct Status {
  Code code = Code::kOk;
  std::string text;  // "<argument>: expected ..., got .... <what to do>", without the op's name

  bool ok() const { return code == Code::kOk; }
  static Status invalid(std::string text) { return {Code::kInvalidArgument, std::move(text)}; }
  static Status unsupported(std::string text) { return {Code::kUnsupported, std::move(text)}; }
  static Status cuda(std::string text) { return {Code::kCudaError, std::move(text)}; }
};

}  // namespace seer
