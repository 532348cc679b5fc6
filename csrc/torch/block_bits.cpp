// SPDX-License-Identifier: Apache-2.0
// pack_block_bits, unpack_block_bits, block_bits_from_indices. The last dimension is the KV block;
// all leading dimensions are kept.
#include "seer/block_bits.h"

#include <limits>
#include <vector>

#include "ops.h"
#include "runtime.h"

namespace seer::binding {
namespace {

constexpr Op kPack{"pack_block_bits"};
constexpr Op kUnpack{"unpack_block_bits"};
constexpr Op kFromIndices{"block_bits_from_indices"};

// Contiguous tensor of `like`'s leading dimensions and a new last one.
Tensor empty_with_last(const Tensor& like, int64_t leading, int64_t last, ScalarType dtype) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < leading; ++d) shape.push_back(like.size(d));
  shape.push_back(last);
  try {
    return torch::stable::new_empty(like, shape, dtype);
  } catch (const std::exception&) {
    double elements = 1;
    for (int64_t size : shape) elements *= double(size);
    no_memory(like, elements, dtype);
  }
}

int64_t rows_before_last(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return rows;
}

void check_blocks_kv(const Op& op, int64_t blocks_kv) {
  SEER_EXPECT(op, blocks_kv >= 0 && blocks_kv <= std::numeric_limits<int32_t>::max(), "blocks_kv",
              "a count from 0 to 2^31 - 1", std::to_string(blocks_kv),
              "Pass ceil(rows_kv / block_kv).");
}

}  // namespace

Tensor pack_block_bits(const Tensor& mask) {
  kPack.dtype("mask", mask, ScalarType::Bool);
  SEER_EXPECT(kPack, mask.dim() >= 1, "mask", "[..., blocks_kv]", "a scalar", "Pass a block mask.");
  const Tensor packed_mask = torch::stable::contiguous(mask);
  PackBlockBitsParams params;
  params.rows = rows_before_last(mask);
  params.blocks_kv = mask.size(mask.dim() - 1);
  Tensor bits =
      empty_with_last(mask, mask.dim() - 1, ceil_div(params.blocks_kv, 32), ScalarType::Int);
  params.mask = static_cast<const uint8_t*>(packed_mask.const_data_ptr());
  params.bits = bits.mutable_data_ptr<int32_t>();
  if (mask.is_cuda()) {
    CudaScope cuda(mask);
    kPack.ok(launch_pack_block_bits(params, cuda.stream()));
  } else {
    kPack.ok(pack_block_bits_cpu(params, torch_parallel_for()));
  }
  return bits;
}

Tensor unpack_block_bits(const Tensor& block_bits, int64_t blocks_kv) {
  kUnpack.dtype("block_bits", block_bits, ScalarType::Int);
  SEER_EXPECT(kUnpack, block_bits.dim() >= 1, "block_bits", "[..., words]", "a scalar",
              "Pass packed block bits.");
  check_blocks_kv(kUnpack, blocks_kv);
  const int64_t words = block_bits.size(block_bits.dim() - 1);
  SEER_EXPECT(kUnpack, words * 32 >= blocks_kv, "block_bits",
              "at least " + std::to_string(ceil_div(blocks_kv, 32)) + " words per row",
              std::to_string(words), "Pass the number of blocks that the bits were packed for.");
  const Tensor packed = torch::stable::contiguous(block_bits);
  Tensor mask = empty_with_last(block_bits, block_bits.dim() - 1, blocks_kv, ScalarType::Bool);
  UnpackBlockBitsParams params;
  params.bits = packed.const_data_ptr<int32_t>();
  params.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  params.rows = rows_before_last(block_bits);
  params.words = words;
  params.blocks_kv = blocks_kv;
  if (block_bits.is_cuda()) {
    CudaScope cuda(block_bits);
    kUnpack.ok(launch_unpack_block_bits(params, cuda.stream()));
  } else {
    kUnpack.ok(unpack_block_bits_cpu(params, torch_parallel_for()));
  }
  return mask;
}

Tensor block_bits_from_indices(const Tensor& indices, const Tensor& counts, int64_t blocks_kv) {
  kFromIndices.dtype("indices", indices, ScalarType::Int);
  kFromIndices.dtype("counts", counts, ScalarType::Int);
  kFromIndices.same_device("counts", counts, "indices", indices);
  SEER_EXPECT(kFromIndices, indices.dim() >= 1, "indices", "[..., capacity]", "a scalar",
              "Pass one list of block indices per row.");
  bool same_rows = counts.dim() == indices.dim() - 1;
  for (int64_t d = 0; same_rows && d < counts.dim(); ++d)
    same_rows = counts.size(d) == indices.size(d);
  SEER_EXPECT(kFromIndices, same_rows, "counts", "the shape of indices without its last dimension",
              "shape " + shape_of(counts) + " beside indices " + shape_of(indices),
              "Pass one count per list.");
  check_blocks_kv(kFromIndices, blocks_kv);
  const Tensor lists = torch::stable::contiguous(indices);
  const Tensor lengths = torch::stable::contiguous(counts);
  Tensor bits =
      empty_with_last(indices, indices.dim() - 1, ceil_div(blocks_kv, 32), ScalarType::Int);
  BlockBitsFromIndicesParams params;
  params.indices = lists.const_data_ptr<int32_t>();
  params.counts = lengths.const_data_ptr<int32_t>();
  params.bits = bits.mutable_data_ptr<int32_t>();
  params.rows = rows_before_last(indices);
  params.capacity = indices.size(indices.dim() - 1);
  params.blocks_kv = blocks_kv;
  if (indices.is_cuda()) {
    CudaScope cuda(indices);
    kFromIndices.ok(launch_block_bits_from_indices(params, cuda.stream()));
  } else {
    kFromIndices.ok(block_bits_from_indices_cpu(params, torch_parallel_for()));
  }
  return bits;
}

}  // namespace seer::binding
