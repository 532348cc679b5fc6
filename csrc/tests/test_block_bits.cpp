// SPDX-License-Identifier: Apache-2.0
// Packing, unpacking and building block bits: round trips and the documented bit positions.
#include <vector>

#include "block_bits/unpack_check.h"
#include "check.h"

namespace {

using seer::test::Random;

const seer::ParallelFor kLoops[] = {seer::test::serial_for, seer::test::scattered_for,
                                    seer::test::threaded_for};

bool bit(const std::vector<int32_t>& bits, int64_t words, int64_t row, int64_t j) {
  return static_cast<uint32_t>(bits[row * words + j / 32]) >> (j % 32) & 1u;
}

void test_round_trip(int64_t rows, int64_t blocks_kv, const seer::ParallelFor& parallel_for) {
  Random random(rows + blocks_kv);
  const int64_t words = seer::ceil_div(blocks_kv, 32);
  std::vector<uint8_t> mask(rows * blocks_kv);
  // Any value but 0 counts as kept, and bits past blocks_kv are written 0.
  for (uint8_t& value : mask) value = random.below(2) ? static_cast<uint8_t>(random.below(256)) : 0;
  std::vector<int32_t> bits(rows * words, -1);
  const seer::PackBlockBitsParams pack{mask.data(), bits.data(), rows, blocks_kv};
  SEER_CHECK(seer::pack_block_bits_cpu(pack, parallel_for).ok(), "pack");
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < words * 32; ++j)
      SEER_CHECK(bit(bits, words, row, j) == (j < blocks_kv && mask[row * blocks_kv + j] != 0),
                 "row %d block %d", int(row), int(j));

  // A wider row whose spare word is full of set bits, which must be ignored.
  std::vector<int32_t> wide(rows * (words + 1), -1);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t word = 0; word < words; ++word)
      wide[row * (words + 1) + word] = bits[row * words + word];
  std::vector<uint8_t> back(rows * blocks_kv, 9);
  const seer::UnpackBlockBitsParams unpack{wide.data(), back.data(), rows, words + 1, blocks_kv};
  SEER_CHECK(seer::unpack_block_bits_cpu(unpack, parallel_for).ok(), "unpack");
  for (size_t i = 0; i < mask.size(); ++i)
    SEER_CHECK(back[i] == (mask[i] != 0 ? 1 : 0), "element %d", int(i));
}

void test_from_indices(int64_t blocks_kv, const seer::ParallelFor& parallel_for) {
  Random random(blocks_kv);
  const int64_t rows = 9, capacity = 12, words = seer::ceil_div(blocks_kv, 32);
  std::vector<int32_t> indices(rows * capacity), counts(rows), bits(rows * words, -1);
  // Unsorted, with duplicates and entries out of range; counts beyond capacity and below 0.
  for (int32_t& index : indices) index = static_cast<int32_t>(random.below(blocks_kv + 8)) - 4;
  for (int64_t row = 0; row < rows; ++row)
    counts[row] = static_cast<int32_t>(random.below(capacity + 6)) - 2;
  const seer::BlockBitsFromIndicesParams params{indices.data(), counts.data(), bits.data(),
                                                rows,           capacity,      blocks_kv};
  SEER_CHECK(seer::block_bits_from_indices_cpu(params, parallel_for).ok(), "from indices");
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < words * 32; ++j) {
      bool listed = false;
      for (int64_t i = 0; i < std::min<int64_t>(counts[row], capacity); ++i)
        listed = listed || (indices[row * capacity + i] == j && j < blocks_kv);
      SEER_CHECK(bit(bits, words, row, j) == listed, "row %d block %d", int(row), int(j));
    }
  }
}

}  // namespace

int main() {
  for (const seer::ParallelFor& parallel_for : kLoops) {
    for (int64_t blocks_kv : {0, 1, 31, 32, 33, 64, 100})
      for (int64_t rows : {0, 1, 7}) test_round_trip(rows, blocks_kv, parallel_for);
    for (int64_t blocks_kv : {1, 32, 70}) test_from_indices(blocks_kv, parallel_for);
  }
  // The CUDA launch asks the same function as the CPU kernel.
  const seer::UnpackBlockBitsParams narrow = {nullptr, nullptr, 1, 1, 33};
  for (const seer::Status& refused :
       {seer::check_unpack(narrow), seer::unpack_block_bits_cpu(narrow, seer::test::serial_for)})
    SEER_CHECK(refused.code == seer::Code::kInvalidArgument &&
                   refused.text.find("block_bits: expected at least 2 words per row, got 1.") == 0,
               "%s", refused.text.c_str());
  SEER_CHECK(seer::check_unpack({nullptr, nullptr, 1, 1, 32}).ok(), "32 blocks in a word");
  return seer::test::report("block_bits");
}
