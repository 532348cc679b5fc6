// SPDX-License-Identifier: Apache-2.0
// Selection by rank: top-k, density, top-p. Exact, ties to the lower index.
//
// A CTA takes 16 query-block rows. Its warps compute their scores (16 columns at a
// time, keys straight from L2, each read once) and leave them in shared memory as ranking keys:
// the score's bits made monotonic. Then each warp selects rows on its own, by radix: the histogram
// of the highest 8 bits tells in which bin the last kept block lies, the next 8 bits are counted
// inside that bin alone, and so on, until a bin is kept whole or the keys are told apart. Blocks
// above the last key are kept, of those equal to it the first ones.
//
// The rule is the same for counts and for mass: walking down the ranks, a block is kept while what
// comes before it is less than the limit. Mass is counted in fixed point, so that no sum depends on
// the order of atomic additions.
//
// Rows too long for 16 of them to fit are done fewer at a time; the products are then computed anew
// for each round. On an H200 16 rows fit up to about 3400 blocks, one row up to 55 000.
#pragma once

#include "pool_gate/gate_tile.cuh"

namespace seer::dev {

constexpr int kRankWarps = 8;
constexpr int kRankRows = 16;
constexpr int kBins = 256;
constexpr uint32_t kNoKey = 0;  // hidden or NaN: below the key of -inf

__host__ __device__ constexpr int key_stride(int blocks_kv) {
  // Eight words off a whole number of bank rows: stores of eight rows meet no bank twice.
  return (blocks_kv + 31) / 32 * 32 + 8;
}
// Keys of `rows` rows and the warps' histograms.
constexpr int64_t rank_smem_bytes(int64_t blocks_kv, int rows, bool mass) {
  return 4 * (int64_t{rows} * key_stride(static_cast<int>(blocks_kv)) +
              kRankWarps * kBins * (mass ? 2 : 1));
}

__device__ __forceinline__ uint32_t key_of(float score) {
  if (score != score) return kNoKey;
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 ties with 0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// Ranks counted: kept while fewer than `limit` come before.
class CountRule {
 public:
  static constexpr int kHistograms = 1;
  using Sum = uint32_t;

  __device__ __forceinline__ CountRule(int limit, float) : limit_(limit) {}
  __device__ __forceinline__ void prepare(const uint32_t*, int) {}
  __device__ __forceinline__ void count(uint32_t* bins, uint32_t bin, uint32_t) const {
    atomicAdd(bins + bin, 1u);
  }
  __device__ __forceinline__ Sum sum(const uint32_t* bins, int bin) const { return bins[bin]; }
  __device__ __forceinline__ bool keeps(Sum before) const { return before < limit_; }
  __device__ __forceinline__ bool keeps_all(Sum before, Sum bin) const {
    return before + bin <= limit_;
  }
  __device__ __forceinline__ Sum times(uint32_t equal, uint32_t) const { return equal; }

 private:
  uint32_t limit_;
};

// Softmax mass: kept while less than `value` comes before, compared in fp32 like probabilities, so
// that ten blocks of 1/10 reach a value of 0.1 with one. 2^-46 units, summed as two 32-bit
// parts: 16 low bits, of at most 2^16 blocks, and the rest.
class MassRule {
 public:
  static constexpr int kHistograms = 2;
  using Sum = uint64_t;

  __device__ __forceinline__ MassRule(int, float value) : value_(value) {}
  __device__ __forceinline__ void prepare(const uint32_t* keys, int visible) {
    uint32_t top = kNoKey;
    for (int j = lane_id(); j < visible; j += 32) top = max(top, keys[j]);
    highest_ = score_of(__reduce_max_sync(kFullWarp, top));
    total_ = 0.0f;
    for (int j = lane_id(); j < visible; j += 32) {
      if (keys[j] != kNoKey) total_ += softmax_weight(score_of(keys[j]), highest_);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) total_ += __shfl_xor_sync(kFullWarp, total_, mask);
  }
  __device__ __forceinline__ void count(uint32_t* bins, uint32_t bin, uint32_t key) const {
    const uint64_t mass = mass_of(key);
    if (mass == 0) return;
    atomicAdd(bins + bin, static_cast<uint32_t>(mass) & 0xffffu);
    atomicAdd(bins + kBins + bin, static_cast<uint32_t>(mass >> 16));
  }
  __device__ __forceinline__ Sum sum(const uint32_t* bins, int bin) const {
    return (uint64_t{bins[kBins + bin]} << 16) + bins[bin];
  }
  // The first rank is kept however small the value.
  __device__ __forceinline__ bool keeps(Sum before) const {
    return before == 0 || static_cast<float>(static_cast<double>(before) * 0x1p-46) < value_;
  }
  // A bin whose mass fits may be followed by ranks without mass that must fit, too.
  __device__ __forceinline__ bool keeps_all(Sum, Sum) const { return false; }
  __device__ __forceinline__ Sum times(uint32_t equal, uint32_t key) const {
    return equal * mass_of(key);
  }

 private:
  __device__ __forceinline__ uint64_t mass_of(uint32_t key) const {
    return static_cast<uint64_t>(
        static_cast<double>(__fdiv_rn(softmax_weight(score_of(key), highest_), total_)) * 0x1p46);
  }
  float value_, highest_ = 0.0f, total_ = 1.0f;
};

// Where the kept ranks of a row end: keys from `key` on are kept, of those equal to it the first
// ones (before + their rank among equals decides), or all.
template <class Rule>
struct RankEnd {
  uint32_t key;
  typename Rule::Sum before;
  bool none, whole;
};

template <class Rule>
__device__ __forceinline__ RankEnd<Rule> find_end(const Rule& rule, const uint32_t* keys,
                                                  int visible, uint32_t* bins) {
  using Sum = typename Rule::Sum;
  constexpr int kBinsPerLane = kBins / 32;
  const int lane = lane_id();
  RankEnd<Rule> end = {0, 0, !rule.keeps(0), false};
  if (end.none) return end;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
#pragma unroll
    for (int i = lane; i < Rule::kHistograms * kBins; i += 32) bins[i] = 0;
    __syncwarp();
    // Keys that agree with the end in the digits found so far.
    const uint32_t known = shift == 24 ? 0u : 0xffffffffu << (shift + 8);
    for (int j = lane; j < visible; j += 32) {
      const uint32_t key = keys[j];
      if (key != kNoKey && (key & known) == end.key)
        rule.count(bins, key >> shift & (kBins - 1), key);
    }
    __syncwarp();
    // Lane l holds bins 255 - 8 l, 254 - 8 l, ...: descending, as ranks go.
    const int first = kBins - 1 - lane * kBinsPerLane;
    Sum mine = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; ++i) mine += rule.sum(bins, first - i);
    Sum through = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const Sum other = __shfl_up_sync(kFullWarp, through, step);
      if (lane >= step) through += other;
    }
    // The last bin whose ranks begin before the limit. The bin after an end of ranks is empty only
    // if it is the very last one: then every candidate is kept.
    Sum before = end.before + through - mine;
    const unsigned starts = __ballot_sync(kFullWarp, rule.keeps(before));
    const int owner = 31 - __clz(starts);  // lane 0 always starts
    int bin = first;
    Sum inside = rule.sum(bins, first);
#pragma unroll
    for (int i = 1; i < kBinsPerLane; ++i) {
      if (rule.keeps(before + inside)) {
        before += inside;
        bin = first - i;
        inside = rule.sum(bins, bin);
      }
    }
    bin = __shfl_sync(kFullWarp, bin, owner);
    end.before = __shfl_sync(kFullWarp, before, owner);
    inside = __shfl_sync(kFullWarp, inside, owner);
    end.key |= static_cast<uint32_t>(bin) << shift;
    __syncwarp();
    if (rule.keeps_all(end.before, inside)) {
      end.whole = true;
      break;
    }
  }
  return end;
}

// One warp, one row: its words of block bits.
template <class Rule>
__device__ __forceinline__ void select_row(const GateSelectParams& p, const GatePlace& at,
                                           Rule rule, const uint32_t* keys, uint32_t* bins, int row,
                                           uint32_t* words) {
  const int lane = lane_id(), visible = visible_blocks(p.gate, at, row);
  const int count = (static_cast<int>(p.gate.blocks_kv) + 31) / 32;
  rule.prepare(keys, visible);
  const RankEnd<Rule> end = find_end(rule, keys, visible, bins);
  uint32_t equal_before = 0;  // keys equal to the end's, in the words so far
  for (int page = 0; page < count; page += 32) {
    uint32_t mine = 0;
    for (int i = 0; i < min(32, count - page); ++i) {
      const int block = (page + i) * kWordColumns + lane;
      if ((page + i) * kWordColumns >= visible) break;
      const uint32_t key = block < visible ? keys[block] : kNoKey;
      const bool equal = key == end.key;
      const unsigned equals = __ballot_sync(kFullWarp, equal);
      bool kept = key > end.key || (equal && end.whole);
      if (equal && !end.whole) {
        const uint32_t rank = equal_before + __popc(equals & ((1u << lane) - 1));
        kept = rule.keeps(end.before + rule.times(rank, key));
      }
      equal_before += __popc(equals);
      const uint32_t word = __ballot_sync(kFullWarp, kept && key != kNoKey && !end.none);
      if (lane == i) mine = word;
    }
    const int word = page + lane;
    if (word < count) words[word] = mine | forced_bits(p, at.blocks_q, row, visible, word);
  }
}

// The blocks that density keeps per row, as the host counts them for a whole batch.
__device__ __forceinline__ int density_blocks(double density, int blocks_kv) {
  const double share = __dsub_rn(1.0, __dsqrt_rn(__dsub_rn(1.0, density)));
  return max(1, static_cast<int>(floor(__dmul_rn(share, static_cast<double>(blocks_kv)))));
}

template <class Element, int kDim, class Rule, bool kPacked>
__global__ void __launch_bounds__(32 * kRankWarps, 3)
    select_ranks(const __grid_constant__ GateSelectParams p, int limit, int rows_at_once) {
  extern __shared__ __align__(16) char smem[];
  const GateScoresParams& gate = p.gate;
  const GatePlace at = gate_place<kPacked>(gate, kRankRows);
  const int blocks_kv = static_cast<int>(gate.blocks_kv);
  const int rows = min(kRankRows, at.blocks_q - at.first_row);  // below 1: none of the sequence
  const int columns = most_visible(gate, at, at.first_row, at.first_row + kRankRows);
  const int stride = key_stride(blocks_kv), words = (blocks_kv + 31) / 32;
  if (kPacked && p.method == SelectMethod::kDensity) {
    limit = density_blocks(p.value, at.blocks_kv);
  }
  uint32_t* table = reinterpret_cast<uint32_t*>(smem) + kRankWarps * Rule::kHistograms * kBins;
  uint32_t* bits = reinterpret_cast<uint32_t*>(p.block_bits) +
                   (int64_t{at.batch} * gate.heads_q + at.head) * gate.blocks_q * words;
  for (int round = 0; round < rows; round += rows_at_once) {
    const char* keys = key_rows(gate, at) + lane_id() % 4 * 16;
    const QueryRows<Element, kDim, 1> queries(gate, at, at.first_row);
    // Two n-tiles at a time.
#pragma unroll 1
    for (int column = thread_id() / 32 * 16; column < columns; column += kRankWarps * 16) {
      const int lane = lane_id();
      uint4 loaded[2][kDim / 32];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int64_t key = min(column + 8 * t + lane / 4, blocks_kv - 1);
#pragma unroll
        for (int s = 0; s < kDim / 32; ++s) {
          loaded[t][s] = __ldg(
              reinterpret_cast<const uint4*>(keys + 2 * key * gate.k_gate.row_stride + 64 * s));
        }
      }
      float c[2][4] = {};
#pragma unroll
      for (int s = 0; s < kDim / 32; ++s) {
#pragma unroll
        for (int t = 0; t < 2; ++t) queries.multiply(c[t], 0, s, loaded[t][s]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half - round;
        if (row < 0 || row >= rows_at_once) continue;
        uint32_t* to = table + row * stride + column + 2 * (lane % 4);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          *reinterpret_cast<uint2*>(to + 8 * t) = {key_of(c[t][2 * half] * gate.scale),
                                                   key_of(c[t][2 * half + 1] * gate.scale)};
        }
      }
    }
    __syncthreads();
    uint32_t* bins =
        reinterpret_cast<uint32_t*>(smem) + thread_id() / 32 * Rule::kHistograms * kBins;
    const int last = min(round + rows_at_once, rows);
    for (int row = round + thread_id() / 32; row < last; row += kRankWarps) {
      select_row(p, at, Rule(limit, static_cast<float>(p.value)), table + (row - round) * stride,
                 bins, at.first_row + row, bits + int64_t{at.first_row + row} * words);
    }
    __syncthreads();
  }
  if constexpr (kPacked) {
    clear_rows(bits, words, max(at.first_row, at.blocks_q),
               min(at.first_row + kRankRows, static_cast<int>(gate.blocks_q)), kRankWarps);
  }
}

}  // namespace seer::dev
