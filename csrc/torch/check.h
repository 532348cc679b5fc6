// SPDX-License-Identifier: Apache-2.0
// Argument checks of the torch binding. Every refusal is one std::runtime_error with the text
//   seer::<op>: <argument>: expected <contract>, got <actual>. <what to do>
// and comes before any kernel runs.
#pragma once

#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "seer/status.h"
#include "seer/types.h"

namespace seer::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string number(int64_t value) { return std::to_string(value); }
inline std::string number(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "device type " + std::to_string(static_cast<int>(tensor.device().type()));
}

inline std::string dtype_of(const Tensor& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

// Refuses unless `condition`. A macro, so that the texts are put together only for a refusal.
#define SEER_EXPECT(op, condition, ...) \
  do {                                  \
    if (!(condition)) [[unlikely]]      \
      (op).fail(__VA_ARGS__);           \
  } while (false)

// The name of one op in front of its checks.
class Op {
 public:
  explicit constexpr Op(const char* name) : name_(name) {}

  [[noreturn]] void fail(const std::string& argument, const std::string& expected,
                         const std::string& got, const std::string& remedy) const {
    throw std::runtime_error("seer::" + std::string(name_) + ": " + argument + ": expected " +
                             expected + ", got " + got + ". " + remedy);
  }

  // A refusal or failure that a kernel library function reported: its text starts at <argument>.
  void ok(const Status& status) const {
    if (!status.ok()) [[unlikely]]
      throw std::runtime_error("seer::" + std::string(name_) + ": " + status.text);
  }

  void rank(const char* argument, const Tensor& tensor, int64_t rank, const char* layout) const {
    if (tensor.dim() != rank) [[unlikely]]
      fail(argument, std::string(layout), "shape " + shape_of(tensor),
           "Reshape it to " + std::to_string(rank) + " dimensions.");
  }

  void same_device(const char* argument, const Tensor& tensor, const char* other_name,
                   const Tensor& other) const {
    if (tensor.device() != other.device()) [[unlikely]]
      fail(argument, "a tensor on " + device_of(other) + " (the device of " + other_name + ")",
           device_of(tensor), "Move it with .to(" + std::string(other_name) + ".device).");
  }

  void same_dtype(const char* argument, const Tensor& tensor, const char* other_name,
                  const Tensor& other) const {
    if (tensor.scalar_type() != other.scalar_type()) [[unlikely]]
      fail(argument, dtype_of(other) + " (the dtype of " + other_name + ")", dtype_of(tensor),
           "Convert it with .to(" + std::string(other_name) + ".dtype).");
  }

  // Kernels count in int along every dimension but `rows` (-1: along all).
  void int_sizes(const char* argument, const Tensor& tensor, int64_t rows) const {
    for (int64_t d = 0; d < tensor.dim(); ++d)
      SEER_EXPECT(*this, d == rows || tensor.size(d) <= std::numeric_limits<int32_t>::max(),
                  argument, rows < 0 ? "sizes below 2^31" : "sizes below 2^31 beside the rows",
                  "shape " + shape_of(tensor), "Split the batch.");
  }

  void dtype(const char* argument, const Tensor& tensor, ScalarType wanted) const {
    if (tensor.scalar_type() != wanted) [[unlikely]]
      fail(argument, torch::headeronly::toString(wanted), dtype_of(tensor),
           "Convert it with .to().");
  }

  void unit_last_stride(const char* argument, const Tensor& tensor) const {
    const int64_t last = tensor.dim() - 1;
    if (tensor.size(last) > 1 && tensor.stride(last) != 1) [[unlikely]]
      fail(argument, "a contiguous last dimension",
           "last stride " + std::to_string(tensor.stride(last)), "Call .contiguous() on it.");
  }

  // Packed sequences: [batch + 1] tokens of a tensor on `other`'s device. Contents are not read.
  void cu_seqlens(const char* argument, const Tensor& tensor, const char* other_name,
                  const Tensor& other) const {
    rank(argument, tensor, 1, "[batch + 1]");
    SEER_EXPECT(*this, tensor.size(0) >= 1, argument, "at least one entry ([batch + 1])",
                "0 entries", "Pass [0] for an empty batch.");
    SEER_EXPECT(*this, tensor.size(0) - 1 <= std::numeric_limits<int32_t>::max(), argument,
                "at most 2^31 entries ([batch + 1])", number(tensor.size(0)), "Split the batch.");
    dtype(argument, tensor, ScalarType::Int);
    same_device(argument, tensor, other_name, other);
    SEER_EXPECT(*this, tensor.is_contiguous(), argument, "a contiguous tensor", "strides with gaps",
                "Call .contiguous() on it.");
  }
  void max_rows(const char* argument, int64_t rows) const {
    SEER_EXPECT(*this, rows >= 1 && rows <= std::numeric_limits<int32_t>::max(), argument,
                "the longest length, at least 1", number(rows),
                "Pass it as an int: reading cu_seqlens would stall the GPU.");
  }

  // The element types of the attention and gate ops: 16-bit everywhere, float32 on the CPU too.
  DType float_dtype(const char* argument, const Tensor& tensor) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Half: return DType::kFloat16;
      case ScalarType::BFloat16: return DType::kBFloat16;
      case ScalarType::Float:
        if (!tensor.is_cuda()) return DType::kFloat32;
        break;
      default: break;
    }
    fail(argument, tensor.is_cuda() ? "bfloat16 or float16" : "bfloat16, float16 or float32",
         dtype_of(tensor), "Convert it with .to(torch.bfloat16).");
  }

 private:
  const char* name_;
};

// Strides of [batch, rows, heads, d] (rank 4) or packed [rows, heads, d] (rank 3).
template <class Pointer>
View<Pointer> view_of(const Tensor& tensor, Pointer data) {
  const int64_t row = tensor.dim() - 3;
  return {data, row == 1 ? tensor.stride(0) : 0, tensor.stride(row), tensor.stride(row + 1)};
}
inline ConstView const_view(const Tensor& tensor) {
  return view_of<const void*>(tensor, tensor.const_data_ptr());
}

}  // namespace seer::binding
