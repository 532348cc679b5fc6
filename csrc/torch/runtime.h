// SPDX-License-Identifier: Apache-2.0
// What the binding needs from the running torch: allocation, the current stream, the thread pool.
#pragma once

#include <array>
#include <cstddef>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "seer/types.h"

// Lives in libtorch_cuda, so it is absent on a CPU-only torch: declared weak, the same file then
// loads on both, and only a call on a CUDA tensor could miss it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

struct CUstream_st;

// Since torch 2.13, absent before: what the last exception said that torch's C interface swallowed.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace seer::binding {

// For a call of torch's C interface that gave nothing: no memory is left, or an earlier fault has
// spoilt the CUDA context.
[[noreturn]] inline void torch_failed(const std::string& expected, const std::string& remedy) {
  std::string text = "seer: torch: expected " + expected + ", got none. " + remedy;
  if (torch_exception_get_what_without_backtrace != nullptr)
    text += std::string(" torch says: ") + torch_exception_get_what_without_backtrace();
  throw std::runtime_error(text);
}

[[noreturn]] inline void no_memory(const Tensor& like, double elements, ScalarType dtype) {
  torch_failed("memory for " + number(elements) + " elements of " +
                   torch::headeronly::toString(dtype) + " on " + device_of(like),
               "Free some, or take fewer rows or heads at a time.");
}

inline void torch_ok(AOTITorchError error, const char* call) {
  if (error != TORCH_SUCCESS) [[unlikely]]
    torch_failed("a result of " + std::string(call),
                 "Free memory if there is none; see also the error before this one.");
}

// Contiguous tensor on like's device, `tail` more elements in the same allocation behind it.
// aoti_torch_empty_strided is the cheapest allocator of the stable ABI (2.6 us a call against 5.5
// for the empty_like op).
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like,
                    int64_t tail = 0) {
  constexpr int kMaxRank = 5;
  int64_t shape[kMaxRank], strides[kMaxRank];
  int rank = 0;
  for (int64_t size : sizes) shape[rank++] = size;
  int64_t stride = 1, elements = 1;
  for (int d = rank - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= shape[d] > 0 ? shape[d] : 1;
    elements *= shape[d];
  }
  const auto allocate = [&](int dims, const int64_t* extents, const int64_t* steps) {
    AtenTensorHandle handle = nullptr;
    const AOTITorchError error = aoti_torch_empty_strided(
        dims, extents, steps,
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        static_cast<int32_t>(like.device().type()), like.device().index(), &handle);
    if (error != TORCH_SUCCESS) [[unlikely]]
      no_memory(like, double(elements) + double(tail), dtype);
    return Tensor(handle);
  };
  if (tail == 0) return allocate(rank, shape, strides);
  const int64_t room = elements + tail, unit = 1;
  AtenTensorHandle handle = nullptr;
  torch_ok(aoti_torch__reinterpret_tensor(allocate(1, &room, &unit).get(), rank, shape, strides, 0,
                                          &handle),
           "aoti_torch__reinterpret_tensor");
  return Tensor(handle);
}

// The current stream of `tensor`'s device, with that device made current for the scope.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr)
      throw std::runtime_error(
          "seer: libtorch_cuda: expected a torch built with CUDA, got a CPU-only torch. "
          "Install a CUDA build of torch.");
    void* stream = nullptr;
    torch_ok(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream),
             "aoti_torch_get_current_cuda_stream");
    stream_ = static_cast<CUstream_st*>(stream);
  }
  CUstream_st* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CUstream_st* stream_ = nullptr;
};

// Calls an op that returns `kResults` tensors. The dispatcher takes over the boxed arguments, once it
// has found the schema: `name` must be one that this library registers, or they would leak.
template <size_t kResults, class... Args>
std::array<Tensor, kResults> call_op(const char* name, const Args&... args) {
  static_assert(kResults <= sizeof...(Args), "results take the places of the arguments");
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  torch_ok(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION), name);
  std::array<Tensor, kResults> results;
  for (size_t i = 0; i < kResults; ++i) results[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return results;
}

// torch's intra-op thread pool behind the library's parallel-for seam.
inline ParallelFor torch_parallel_for() {
  return [](int64_t count, int64_t grain, const ParallelBody& body) {
    torch::stable::parallel_for(0, count, grain,
                                [&](int64_t begin, int64_t end) { body(begin, end); });
  };
}

}  // namespace seer::binding
