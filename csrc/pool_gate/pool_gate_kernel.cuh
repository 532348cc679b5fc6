// SPDX-License-Identifier: Apache-2.0
// Block pooling, per-head projection and RoPE in one kernel.
//
// A CTA takes a tile of consecutive blocks of one input head.
//   1. Pooling. A warp reads a block alone, kBatch 16-byte loads per lane in flight. Maxima and
//      minima stay packed (exact in the input type), sums are fp32.
//   2. Without weight the warp rotates and stores its block: warps never wait for each other.
//      With weight the pooled rows, rounded to the input type, lie in shared memory, and the warps
//      share the columns of all output heads that read this input head, 32 columns each. Fewer such
//      units than warps: several warps split the channels of one unit.
//
// Weights go from L2 straight into mma operands. A lane wants two channels of one column in a
// register but memory has two columns of one channel, so it loads 8 bytes (4 columns) of each of
// its four channels and swaps halves. n-tile t of the mma then stands for columns 4 * c + t, which
// gives every lane 4 neighbouring columns of the result.
//
// Theory. Traffic is x once: 32k tokens, 32 + 8 heads of 128 in bf16 are 268 + 67 MB, 78 us at the
// 4.3 TB/s of a copy on an H200. What could add to it is the weight: the group of 4 matrices of
// 384 x 128 is 393 KB, read once per kWeightedBlocks = 32 blocks of 64 rows, that is 524 KB of x:
// 50 MB of L2 traffic for k at 32k, none of it from DRAM (all heads: 3.1 MB). The product is 1.6
// GFLOP. In flight: 16 warps * 32 lanes * 16 * 16 B = 131 KB per SM, four times what 4.3 TB/s over
// 132 SMs at 1 us of latency needs. Launched with q, the weight phase of k's CTAs runs under q's
// loads.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/mma_sm80.cuh"
#include "common/varlen.cuh"
#include "common/warp.cuh"
#include "pool_gate/block_pool.cuh"
#include "pool_gate/variant.h"

namespace seer::dev {

constexpr int kPoolThreads = 32 * kPoolWarps;

// Rotates (if asked to), rounds once and stores 8 channels from `channel` on of the embedding
// `row` (fp32, shared memory) of a block.
template <class Element>
__device__ __forceinline__ void rotate_and_store(const PoolGateParams& p, const float* row,
                                                 int channel, int batch, int block, int blocks,
                                                 int head_out) {
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] = row[channel + i];
  const int half = p.rotary_dim / 2;
  if (p.cos != nullptr && channel < 2 * half) {
    const int64_t angle = batch * p.rope_batch_stride + int64_t{block} * half;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int c = channel + i;
      if (c >= 2 * half) break;
      const bool first = c < half;
      const int turn = first ? c : c - half;
      const float cosine = __ldg(p.cos + angle + turn), sine = __ldg(p.sin + angle + turn);
      const float other = row[first ? c + half : turn];
      y[i] = first ? y[i] * cosine - other * sine : y[i] * cosine + other * sine;
    }
  }
  const int64_t at =
      ((int64_t{batch} * blocks + block) * p.heads_out + head_out) * p.gate_dim + channel;
  *reinterpret_cast<uint4*>(static_cast<Element*>(p.out) + at) = {
      pack_pair<Element>(y[0], y[1]), pack_pair<Element>(y[2], y[3]),
      pack_pair<Element>(y[4], y[5]), pack_pair<Element>(y[6], y[7])};
}

// The tile of a CTA: cheap to find again, dear to hold in registers through a product.
struct PoolTile {
  int batch, head;
  int first, count;     // blocks that exist
  int padded;           // blocks of the output: those behind `count` are past a packed sequence
  int blocks;           // of the output, per batch entry
  int64_t start, rows;  // of the sequence

  __device__ __forceinline__ PoolTile(const PoolGateParams& p, uint32_t cta, int tile_blocks) {
    // Neighbouring CTAs read neighbouring heads of the same rows.
    head = static_cast<int>(cta % p.heads);
    const uint32_t rest = cta / p.heads;
    blocks = static_cast<int>((p.rows + p.block - 1) / p.block);
    const uint32_t tiles = static_cast<uint32_t>(blocks + tile_blocks - 1) / tile_blocks;
    batch = static_cast<int>(rest / tiles);
    first = static_cast<int>(rest % tiles) * tile_blocks;
    padded = min(tile_blocks, blocks - first);
    start = 0;
    rows = p.rows;
    count = padded;
    if (p.cu_seqlens != nullptr) {
      const RowRange range = sequence_rows(p.cu_seqlens, batch, p.total, p.rows);
      start = range.start;
      rows = range.rows;
      const int existing = range.rows == 0 ? 0 : (range.rows - 1) / p.block + 1;
      count = min(max(existing - first, 0), padded);
    }
  }
};

template <class Element, int kHeadDim>
class PoolGateCta {
 public:
  __device__ __forceinline__ PoolGateCta(const PoolGateParams& p, char* smem, uint32_t cta,
                                         int tile_blocks)
      : p_(p), smem_(smem), cta_(cta), tile_blocks_(tile_blocks) {}

  __device__ __forceinline__ void run() {
    if (p_.weight != nullptr) prefetch_weight();
    switch (p_.pools) {
      case 1: run_pools<1>(); break;
      case 2: run_pools<2>(); break;
      case 3: run_pools<3>(); break;
      case 4: run_pools<4>(); break;
      case 5: run_pools<5>(); break;
      case 6: run_pools<6>(); break;
      default: run_pools<7>(); break;
    }
    if (p_.cu_seqlens != nullptr) clear_rest();
    if (p_.weight == nullptr || tile().count == 0) return;
    __syncthreads();
    p_.gate_dim == 64 ? project<64>() : project<128>();
  }

 private:
  // Read anew, not held.
  static __device__ __forceinline__ int lane() { return lane_id(); }
  static __device__ __forceinline__ int warp() { return thread_id() / 32; }
  __device__ __forceinline__ PoolTile tile() const {
    return PoolTile(p_, recompute_from(cta_), tile_blocks_);
  }
  __device__ __forceinline__ int channels() const { return __popc(p_.pools) * kHeadDim; }

  template <int kPools>
  __device__ __forceinline__ void run_pools() {
    using Pool = BlockPool<Element, kHeadDim, kPools>;
    const int lane = lane_id();
    const PoolTile at = tile();
    const int row = lane / Pool::kLanesPerRow, chunk = lane % Pool::kLanesPerRow;
    for (int i = warp(); i < at.count; i += kPoolWarps) {
      const int block = at.first + i;
      const int64_t start = int64_t{block} * p_.block;
      const int rows = static_cast<int>(min(int64_t{p_.block}, at.rows - start));
      const char* x =
          static_cast<const char*>(p_.x.data) +
          2 * (at.batch * p_.x.batch_stride + (at.start + start + row) * p_.x.row_stride +
               at.head * p_.x.head_stride + chunk * 8);
      Pool pool;
      pool.read(x, 2 * Pool::kRowsPerLoad * p_.x.row_stride, rows);
      pool.reduce(rows);
      if (p_.weight != nullptr) {
        pool.store_rounded(smem_ + i * pooled_row_bytes(channels()), lane);
        continue;
      }
      float* embedding = reinterpret_cast<float*>(smem_) + warp() * channels();
      pool.store_exact(embedding, lane);
      __syncwarp();
      for (int c = lane * 8; c < channels(); c += 32 * 8) {
        rotate_and_store<Element>(p_, embedding, c, at.batch, block, at.blocks, at.head);
      }
      __syncwarp();
    }
  }

  // Blocks past the end of a packed sequence are 0.
  __device__ __forceinline__ void clear_rest() {
    const PoolTile at = tile();
    const int group = p_.heads_out / p_.heads, chunks = group * p_.gate_dim / 8;
    const int64_t row = int64_t{p_.heads_out} * p_.gate_dim;
    Element* out = static_cast<Element*>(p_.out) +
                   (int64_t{at.batch} * at.blocks + at.first) * row +
                   int64_t{at.head} * group * p_.gate_dim;
    for (int i = at.count * chunks + thread_id(); i < at.padded * chunks; i += kPoolThreads) {
      *reinterpret_cast<uint4*>(out + i / chunks * row + i % chunks * 8) = uint4{0, 0, 0, 0};
    }
  }

  // A share of this input head's weights, from DRAM to L2 while x is read: those of its tiles
  // together are all. First in the launch, so that the product does not wait for DRAM.
  __device__ __forceinline__ void prefetch_weight() const {
    constexpr int kLine = 128;
    const PoolTile at = tile();
    const int64_t bytes = int64_t{p_.heads_out / p_.heads} * channels() * p_.gate_dim * 2;
    const auto share = static_cast<uint32_t>(at.first / tile_blocks_);
    const uint32_t line =
        (share * kPoolThreads + thread_id()) % static_cast<uint32_t>(bytes / kLine);
    const char* w = static_cast<const char*>(p_.weight) + at.head * bytes + int64_t{line} * kLine;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(w));
  }

  // The product with the matrices of all output heads, kPoolWarps units at a time.
  template <int kGateDim>
  __device__ __forceinline__ void project() {
    constexpr int kPerHead = kGateDim / kUnit;
    const int units = p_.heads_out / p_.heads * kPerHead;
    const int splits = max(1, kPoolWarps / units), steps = channels() / 16;
    const int per_split = (steps + splits - 1) / splits;
    const int columns = min(units, kPoolWarps) * kUnit;
    float* result = reinterpret_cast<float*>(
        smem_ + kWeightedBlocks * pooled_row_bytes(channels()));  // [16][columns + 4]
    for (int pass = 0; pass < units; pass += kPoolWarps) {
      const int here = min(units - pass, kPoolWarps);
      const int split = warp() / here;
      float c[kWeightedBlocks / 16][4][4] = {};
      const int count = tile().count;
      if (split < splits) {
        multiply<kGateDim>(c, pass + warp() % here, split * per_split,
                           min(steps, (split + 1) * per_split), count);
      }
#pragma unroll
      for (int m = 0; m < kWeightedBlocks / 16; ++m) {
        const PoolTile at = tile();
        if (m * 16 >= at.count) break;
        for (int turn = 0; turn < splits; ++turn) {  // in this order: the sum never varies
          if (split == turn) add_to(result, columns + 4, warp() % here * kUnit, c[m], turn > 0);
          __syncthreads();
        }
        const int rows = min(16, at.count - m * 16), chunks = here * kUnit / 8;
        for (int i = thread_id(); i < rows * chunks; i += kPoolThreads) {
          const int row = i / chunks, column = i % chunks * 8;
          const int head = at.head * (p_.heads_out / p_.heads) + (pass * kUnit + column) / kGateDim;
          const int channel = column % kGateDim;
          rotate_and_store<Element>(p_, result + row * (columns + 4) + column - channel, channel,
                                    at.batch, at.first + m * 16 + row, at.blocks, head);
        }
        __syncthreads();
      }
    }
  }

  // c += pooled rows * 32 columns of the weight, over 16-channel steps [begin, end).
  template <int kGateDim>
  __device__ __forceinline__ void multiply(float (&c)[kWeightedBlocks / 16][4][4], int unit,
                                           int begin, int end, int count) const {
    constexpr int kPerHead = kGateDim / kUnit;
    const int64_t matrix = int64_t{tile().head} * (p_.heads_out / p_.heads) + unit / kPerHead;
    const char* w = static_cast<const char*>(p_.weight) +
                    2 * ((matrix * channels() + begin * 16 + lane() % 4 * 2) * kGateDim +
                         unit % kPerHead * kUnit + lane() / 4 * 4);
    constexpr int kRow = 2 * kGateDim;  // bytes
    const int stride = pooled_row_bytes(channels());
    uint32_t a_at = smem_address(smem_) + lane() % 16 * stride + lane() / 16 * 16 + begin * 32;
    const bool both = count > 16;
    constexpr int kAhead = 4;  // steps whose weights are in flight
    uint2 v[kAhead][4];
    const auto load = [&](int s) {
      v[s][0] = __ldg(reinterpret_cast<const uint2*>(w));
      v[s][1] = __ldg(reinterpret_cast<const uint2*>(w + kRow));
      v[s][2] = __ldg(reinterpret_cast<const uint2*>(w + 8 * kRow));
      v[s][3] = __ldg(reinterpret_cast<const uint2*>(w + 9 * kRow));
      w += 16 * kRow;
    };
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (begin + s < end) load(s);
    }
    for (int step = begin; step < end; step += kAhead) {
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        if (step + s >= end) break;
        uint32_t a0[4], a1[4];
        ldmatrix_x4(a0, a_at);
        if (both) ldmatrix_x4(a1, a_at + 16 * stride);
        a_at += 32;
        const auto pair = [&](int k, int t) { return t < 2 ? v[s][k].x : v[s][k].y; };
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const uint32_t halves = t % 2 == 0 ? 0x5410u : 0x7632u;
          const uint32_t b0 = __byte_perm(pair(0, t), pair(1, t), halves);
          const uint32_t b1 = __byte_perm(pair(2, t), pair(3, t), halves);
          mma_16x8x16<Element>(c[0][t], a0, b0, b1);
          if (both) mma_16x8x16<Element>(c[1][t], a1, b0, b1);
        }
        if (step + s + kAhead < end) load(s);
      }
    }
  }

  __device__ __forceinline__ void add_to(float* result, int stride, int column,
                                         const float (&c)[4][4], bool accumulate) const {
    const int at_lane = lane();
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      auto* at = reinterpret_cast<float4*>(result + accumulator_row(at_lane, e) * stride + column +
                                           4 * accumulator_col(at_lane, e));
      float4 y = {c[0][e], c[1][e], c[2][e], c[3][e]};
      if (accumulate) {
        const float4 old = *at;
        y = {old.x + y.x, old.y + y.y, old.z + y.z, old.w + y.w};
      }
      *at = y;
    }
  }

  const PoolGateParams& p_;
  char* smem_;
  uint32_t cta_;
  int tile_blocks_;
};

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kPoolThreads, 2)
    pool_gate(const __grid_constant__ PoolGateLaunch launch) {
  extern __shared__ __align__(16) char smem[];
  const PoolPlace at = pool_place(launch, blockIdx.x);
  PoolGateCta<Element, kHeadDim>(launch.problems[at.problem], smem, at.cta,
                                 launch.tile_blocks[at.problem])
      .run();
}

}  // namespace seer::dev
