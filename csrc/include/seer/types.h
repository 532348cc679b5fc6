// SPDX-License-Identifier: Apache-2.0
// Plain types shared by every op: element types, strided views, the parallel-for seam.
#pragma once

#include <cstdint>
#include <functional>

namespace seer {

// CUDA kernels take the two 16-bit types; CPU kernels take all three.
enum class DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat32: return "float32";
  }
  return "unknown";
}

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Element (b, row, head, d) of a [batch, rows, heads, head_dim] tensor lies at
// data + b * batch_stride + row * row_stride + head * head_stride + d, strides in elements.
// Packed varlen tensors [total, heads, head_dim] have batch_stride 0.
template <class Pointer>
struct View {
  Pointer data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};
using ConstView = View<const void*>;
using MutView = View<void*>;

// Block bits [batch|1, heads_q|heads_kv|1, blocks_q, words], words = ceil(blocks_kv / 32):
// bit j % 32 of word j / 32 set means "query block i attends to KV block j" (docs/mask-format.md).
struct BlockBitsView {
  const int32_t* data = nullptr;  // nullptr: every block is kept (dense attention)
  int heads = 1;                  // 1, heads_kv or heads_q
  int64_t batch_stride = 0;       // in words; 0 broadcasts one mask to the whole batch
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  int words = 0;  // readable words per row
};

// CPU kernels run their outer loop through this, so that the host program's thread pool is used:
// it calls body(begin, end) on disjoint ranges that cover [0, count).
using ParallelBody = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const ParallelBody& body)>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace seer
