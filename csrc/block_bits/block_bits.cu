// SPDX-License-Identifier: Apache-2.0
// Packing, unpacking and building of block bits on the GPU. All three are bound by memory traffic.
//
// pack    a warp makes 32 consecutive words of the flat [rows * words] output: for each, 32 lanes
//         read 32 mask bytes and a ballot is the word; lane i keeps word i, one store of 128 bytes
// unpack  a warp takes 32 consecutive words; each is shuffled to all lanes and becomes 32 bytes
// indices a warp makes one row: it sets bits in shared memory, 8192 blocks at a time
#include <algorithm>
#include <cstdint>

#include "block_bits/unpack_check.h"
#include "common/cuda_status.h"
#include "seer/block_bits.h"

namespace seer {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxGrid = 1 << 20;  // warps walk on with this stride
constexpr int kWordsInSmem = 256;      // of one row, per warp

__device__ int lane() { return static_cast<int>(threadIdx.x % 32); }
__device__ int64_t first_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
}
__device__ int64_t warp_stride() { return static_cast<int64_t>(gridDim.x) * kWarps; }

// Position of a word in [rows, words]; advancing needs no division.
struct WordPlace {
  int64_t row, word, words;
  __device__ WordPlace(int64_t index, int64_t words)
      : row(index / words), word(index % words), words(words) {}
  __device__ void advance() {
    if (++word == words) ++row, word = 0;
  }
};

__global__ void __launch_bounds__(kThreads) pack(const __grid_constant__ PackBlockBitsParams p) {
  const int64_t words = (p.blocks_kv + 31) / 32, total = p.rows * words;
  for (int64_t base = first_warp() * 32; base < total; base += warp_stride() * 32) {
    WordPlace place(base, words);
    unsigned mine = 0;
#pragma unroll 8
    for (int i = 0; i < 32; ++i) {
      const int64_t block = place.word * 32 + lane();
      const bool kept =
          place.row < p.rows && block < p.blocks_kv && p.mask[place.row * p.blocks_kv + block] != 0;
      const unsigned word = __ballot_sync(kAllLanes, kept);
      if (lane() == i) mine = word;
      place.advance();
    }
    if (base + lane() < total) p.bits[base + lane()] = static_cast<int32_t>(mine);
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack(const __grid_constant__ UnpackBlockBitsParams p) {
  // Only the words that hold a block count; rows may have more.
  const int64_t words = (p.blocks_kv + 31) / 32, total = p.rows * words;
  for (int64_t base = first_warp() * 32; base < total; base += warp_stride() * 32) {
    unsigned mine = 0;
    if (base + lane() < total) {
      const WordPlace own(base + lane(), words);
      mine = static_cast<unsigned>(p.bits[own.row * p.words + own.word]);
    }
    WordPlace place(base, words);
#pragma unroll 8
    for (int i = 0; i < 32; ++i) {
      const unsigned word = __shfl_sync(kAllLanes, mine, i);
      const int64_t block = place.word * 32 + lane();
      if (place.row < p.rows && block < p.blocks_kv) {
        p.mask[place.row * p.blocks_kv + block] = word >> lane() & 1u;
      }
      place.advance();
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    from_indices(const __grid_constant__ BlockBitsFromIndicesParams p) {
  __shared__ unsigned buffer[kWarps][kWordsInSmem];
  unsigned* chunk = buffer[threadIdx.x / 32];
  const int64_t words = (p.blocks_kv + 31) / 32;
  for (int64_t row = first_warp(); row < p.rows; row += warp_stride()) {
    const int64_t count = min(max(int64_t{p.counts[row]}, int64_t{0}), p.capacity);
    const int32_t* indices = p.indices + row * p.capacity;
    for (int64_t start = 0; start < words; start += kWordsInSmem) {
      const int64_t here = min(words - start, int64_t{kWordsInSmem});
      for (int64_t i = lane(); i < here; i += 32) chunk[i] = 0;
      __syncwarp();
      for (int64_t i = lane(); i < count; i += 32) {
        const int64_t block = indices[i], word = block / 32 - start;
        if (block >= 0 && block < p.blocks_kv && word >= 0 && word < here) {
          atomicOr(&chunk[word], 1u << (block % 32));
        }
      }
      __syncwarp();
      for (int64_t i = lane(); i < here; i += 32) {
        p.bits[row * words + start + i] = static_cast<int32_t>(chunk[i]);
      }
      __syncwarp();
    }
  }
}

// Enough CTAs for `warps` warps of work.
unsigned grid_for(int64_t warps) {
  return static_cast<unsigned>(std::min(ceil_div(warps, kWarps), kMaxGrid));
}

}  // namespace

Status launch_pack_block_bits(const PackBlockBitsParams& params, CUstream_st* stream) {
  const unsigned grid = grid_for(ceil_div(params.rows * ceil_div(params.blocks_kv, 32), 32));
  if (grid == 0) return {};
  pack<<<grid, kThreads, 0, stream>>>(params);
  return check_launch("pack_block_bits", grid, 0);
}

Status launch_unpack_block_bits(const UnpackBlockBitsParams& params, CUstream_st* stream) {
  if (Status status = check_unpack(params); !status.ok()) return status;
  const unsigned grid = grid_for(ceil_div(params.rows * ceil_div(params.blocks_kv, 32), 32));
  if (grid == 0) return {};
  unpack<<<grid, kThreads, 0, stream>>>(params);
  return check_launch("unpack_block_bits", grid, 0);
}

Status launch_block_bits_from_indices(const BlockBitsFromIndicesParams& params,
                                      CUstream_st* stream) {
  const unsigned grid = params.blocks_kv == 0 ? 0 : grid_for(params.rows);
  if (grid == 0) return {};
  from_indices<<<grid, kThreads, 0, stream>>>(params);
  return check_launch("block_bits_from_indices", grid, 0);
}

}  // namespace seer
