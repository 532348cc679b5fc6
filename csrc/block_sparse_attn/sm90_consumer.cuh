// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of the Hopper kernel: 64 query rows of one head, over the KV tiles it owns.
//
//   per tile of its own   S(n+1) = Q K(n+1)^T  is issued, then  out += P(n) V(n);
//                         while the tensor core works on the second, the softmax of S(n+1) runs.
//
// It waits for its own loads only, each on a barrier of the load's owner set. One rule keeps the
// rings free of deadlock: while it holds the stage of V(n), a consumer waits for K(n+1) only if that
// lies at most kMaxGap entries further down the same page; otherwise it finishes V(n) first
// (docs/block_sparse_attn_hopper.md has the proof).
#pragma once

#include <cstdint>

#include "block_sparse_attn/sm90_softmax.cuh"
#include "block_sparse_attn/sm90_stream.cuh"
#include "block_sparse_attn/sm90_tiles.cuh"
#include "common/mma_sm80.cuh"
#include "common/wgmma.cuh"

namespace seer::dev {

// Counts loads per owner set as SetCounters does, 32 entries at a time.
template <int kConsumers>
class ChunkCounters {
  using Counts = SetCounts<kConsumers>;

 public:
  // Of the lane's entry: how many of its owner set came before it, modulo 16 at least. By all lanes.
  __device__ __forceinline__ int take(int owners) {
    const unsigned same = __match_any_sync(kFullWarp, owners);
    const int before = __popc(same & ((1u << (threadIdx.x % 32)) - 1));
    const int count = static_cast<int>(counts >> 4 * owners & 15) + before;
    // One lane of each set has its number; then a sum without carries from set to set.
    const Counts mine = before == 0 ? static_cast<Counts>(__popc(same) & 15) << 4 * owners : 0;
    const Counts added = united(mine);
    constexpr auto kTops = static_cast<Counts>(0x8888888888888888u);
    counts = ((counts & ~kTops) + (added & ~kTops)) ^ ((counts ^ added) & kTops);
    return count;
  }

 private:
  static __device__ __forceinline__ uint32_t united(uint32_t bits) {
    return __reduce_or_sync(kFullWarp, bits);
  }
  static __device__ __forceinline__ uint64_t united(uint64_t bits) {
    const uint64_t high = united(static_cast<uint32_t>(bits >> 32));
    return high << 32 | united(static_cast<uint32_t>(bits));
  }

  Counts counts = 0;
};

template <class Traits>
class Consumer {
  using Element = typename Traits::Element;
  using Params = typename Traits::Params;
  using Map = typename Traits::Map;
  static constexpr int kSteps = Traits::kHeadDim / 16;  // k-steps of Q K^T
  static constexpr bool kQInRegisters = Traits::kQRegisterSteps == kSteps;
  // Any bound up to kStagesK + kStagesV is free of deadlock; further away than the ring of K
  // reaches, looking ahead would only wait.
  static constexpr int kMaxGap = Traits::kStagesK;

 public:
  __device__ __forceinline__ Consumer(const Params& params, SmemAddress shared, int consumer_)
      : p(params), base(shared), reader(shared), consumer(consumer_), map(params) {}

  __device__ __forceinline__ void run() {
    for (;;) {
      reader.wait();
      if (reader.page().entries < 0) break;
      if (reader.page().flags & Sm90Page::kFirst) begin_unit();
      walk_page();
      if (reader.page().flags & Sm90Page::kLast) {
        end_unit();
      } else {
        reader.release();
      }
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  // First of the lane's two rows of the unit; the other is 8 further.
  static __device__ __forceinline__ int lane_row() {
    return threadIdx.x % 128 / 32 * 16 + lane() / 4;
  }
  __device__ __forceinline__ void arrive(SmemAddress barrier) const {
    if (lane() == 0) mbarrier_arrive(barrier);
  }

  __device__ __forceinline__ void begin_unit() {
    const Sm90Page& page = reader.page();
    const Sm90Unit& unit = page.units[consumer];
    if (unit.first_row < 0) return;
    first_masked = unit.first_masked;
    softmax.begin(page.flags & Sm90Page::kCareful);
#pragma unroll
    for (float& x : out) x = 0.0f;

    mbarrier_wait(base + Traits::kFullQ + 8 * consumer, q_phase);
    q_phase ^= 1;
    const int thread = thread_id();
    const int row = thread % 128 / 32 * 16 + thread % 16;
    const SmemAddress q_row = smem_q() + row * 128;
#pragma unroll
    for (int step = 0; step < Traits::kQRegisterSteps; ++step) {
      const int chunk = 2 * step % 8 + thread % 32 / 16;
      ldmatrix_x4(q[step], q_row + step / 4 * Traits::kPanelBytes + ((chunk ^ row % 8) << 4));
    }
    if constexpr (kQInRegisters) release_q();
  }
  __device__ __forceinline__ SmemAddress smem_q() const {
    return base + Traits::kSmemQ + consumer * Traits::kStageBytes;
  }
  // Lets the rows of the next unit come.
  __device__ __forceinline__ void release_q() {
    fence_async_proxy();  // ldmatrix read what the copy engine overwrites next
    __syncwarp();
    arrive(base + Traits::kEmptyQ + 8 * consumer);
  }

  // A load that the consumer owns, in one word: where it lies and when it is there.
  struct Load {
    uint32_t word = 0;

    __device__ __forceinline__ int barrier() const { return 8 * (word & 127); }  // in a set of them
    __device__ __forceinline__ uint32_t parity() const { return word >> 7 & 1; }
    __device__ __forceinline__ bool masked() const { return word >> 8 & 1; }
    __device__ __forceinline__ int stage_k() const { return word >> 9 & 15; }
    __device__ __forceinline__ int stage_v() const { return word >> 13 & 15; }
    __device__ __forceinline__ int position() const { return word >> 17; }  // in the page
  };

  // Takes the next 32 entries of the page, one per lane, and works out each one's Load.
  __device__ __forceinline__ void read_chunk() {
    chunk += 32;
    const int position = chunk + lane();
    const uint32_t entry = reader.entry(position, entries);
    const int owners = entry_owners(entry);
    own = __ballot_sync(kFullWarp, owners >> consumer & 1);
    const int count = counters.take(owners);
    const int slot = first_slot + position;
    load_word = barrier_index(owners, count) | (count & 8) << 4 |
                (entry_tile(entry) >= first_masked) << 8 | slot % Traits::kStagesK << 9 |
                slot % Traits::kStagesV << 13 | position << 17;
  }

  // The consumer's next load of the page, or false.
  __device__ __forceinline__ bool next_load(Load& load) {
    while (own == 0) {
      if (chunk + 32 >= entries) return false;
      read_chunk();
    }
    load.word = __shfl_sync(kFullWarp, load_word, __ffs(own) - 1);
    own &= own - 1;
    return true;
  }

  __device__ __forceinline__ void walk_page() {
    entries = reader.page().entries;
    first_slot = reader.page().first_slot;
    chunk = -32;
    own = 0;
    const bool frees_q = !kQInRegisters && (reader.page().flags & Sm90Page::kLast);
    Load load, next;
    bool more = next_load(load);
    if (!more && frees_q && reader.page().units[consumer].first_row >= 0) release_q();
    while (more) {
      // The first load of a run: nothing to overlap it with.
      mbarrier_wait(base + Traits::kFullK + load.barrier(), load.parity());
      issue_scores(load);
      more = next_load(next);
      cute::warpgroup_wait<0>();
      pin(scores);
      arrive(base + Traits::kEmptyK + 8 * load.stage_k());
      make_weights(load);
      while (more && next.position() - load.position() <= kMaxGap) {
        mbarrier_wait(base + Traits::kFullK + next.barrier(), next.parity());
        issue_scores(next);
        mbarrier_wait(base + Traits::kFullV + load.barrier(), load.parity());
        issue_values(load);
        Load later;
        more = next_load(later);  // in the shadow of the products
        keep(load);
        cute::warpgroup_wait<1>();
        pin(scores);
        arrive(base + Traits::kEmptyK + 8 * next.stage_k());
        make_weights(next, base + Traits::kEmptyV + 8 * load.stage_v());
        load = next;
        next = later;
      }
      if (!more && frees_q) release_q();
      mbarrier_wait(base + Traits::kFullV + load.barrier(), load.parity());
      issue_values(load);
      keep(load);
      cute::warpgroup_wait<0>();
      pin(out);
      arrive(base + Traits::kEmptyV + 8 * load.stage_v());
      load = next;
    }
  }

  __device__ __forceinline__ void issue_scores(const Load& load) {
    const uint64_t k =
        smem_descriptor(kAlongRows, base + Traits::kSmemK + load.stage_k() * Traits::kStageBytes);
    const uint64_t q_smem = smem_descriptor(kAlongRows, smem_q());
    pin(scores);
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t offset = (step / 4 * Traits::kPanelBytes + step % 4 * 32) / 16;
      if (step < Traits::kQRegisterSteps) {
        wgmma_scores<Element>(scores, q[step < Traits::kQRegisterSteps ? step : 0], k + offset,
                              step != 0);
      } else {
        wgmma_scores<Element>(scores, q_smem + offset, k + offset, step != 0);
      }
    }
    cute::warpgroup_commit_batch();
  }

  __device__ __forceinline__ void issue_values(const Load& load) {
    const uint64_t v =
        smem_descriptor(down_rows(Traits::kPanelBytes),
                        base + Traits::kSmemV + load.stage_v() * Traits::kStageBytes);
    pin(out);
    pin(weights);
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma_values<Element>(out, &weights[4 * step], v + step * (16 * 128 / 16));
    }
    cute::warpgroup_commit_batch();
  }

  // What the map has of the KV tile whose P V was just issued.
  __device__ __forceinline__ void keep(const Load& load) {
    if constexpr (Map::kKeeps) {
      map.keep(entry_tile(reader.entry(load.position(), Traits::kPageEntries)),
               softmax.references());
    }
  }

  // Softmax: scores become the operand of the next issue_values(). `empty_v`: the barrier on which
  // to release the V that is being multiplied meanwhile (0: none is).
  __device__ __forceinline__ void make_weights(const Load& load, SmemAddress empty_v = 0) {
    float shrink[2];
    float scale = p.scale_log2;
    bool rescales = false;
    if (softmax.careful() || load.masked()) {
      if (load.masked()) mask(entry_tile(reader.entry(load.position(), entries)));
      rescales = softmax.raise(scores, scale, shrink);
    }
    float added[2];
    rescales = softmax.weigh(scores, scale, shrink, rescales, added);
    if constexpr (Map::kKeeps) map.note(scores, added);
    // Not under a condition: the four warps must meet here, and each has its own references.
    cute::warpgroup_wait<0>();
    pin(out);
    if (empty_v != 0) arrive(empty_v);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      weights[i] = pack_pair<Element>(scores[2 * i], scores[2 * i + 1]);
    }
    if (rescales) rescale(shrink);
  }

  // -inf where a row does not see the column.
  __device__ __forceinline__ void mask(int tile) {
    const Sm90Page& page = reader.page();
    const int first_limit = TileOrder<Traits>::first_limit(p, page, page.units[consumer].first_row);
    const int first_col = tile * Traits::kTileKv + 2 * (lane() % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int visible =
          min(first_limit + (p.causal ? lane_row() + 8 * half : 0), page.rows_kv) - first_col;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores[4 * j + 2 * half + c];
          score = 8 * j + c < visible ? score * p.score_sign : -INFINITY;
        }
      }
    }
  }

  __device__ __forceinline__ void rescale(const float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < Traits::kHeadDim / 2; ++i) out[i] *= shrink[i / 2 % 2];
  }

  __device__ __forceinline__ void end_unit() {
    const Sm90Page& page = reader.page();
    const Sm90Unit unit = page.units[consumer];
    if (unit.first_row < 0) {
      reader.release();
      return;
    }
    // Only the warps that asked for it take the result of a careful tile: the others' bits do not
    // depend on the values in their neighbours' rows.
    const int warp = 1 << threadIdx.x / 32;
    const bool careful = page.flags & Sm90Page::kCareful;
    const bool stores = !careful || (page.redo_of & warp) != 0;
    const int rows = stores ? page.rows_q - unit.first_row : 0;
    const int64_t first_row = int64_t{page.q_start} + unit.first_row;
    const int64_t batch = page.batch;
    const bool packed = p.cu_seqlens_q != nullptr;
    const bool is_final = careful || softmax.in_range(out);
    if (!is_final) reader.mark(warp);
    if constexpr (!Map::kKeeps) reader.release();

    softmax.finish();
    const int quad_lane = lane() % 4;
    auto* const out_rows = static_cast<uint16_t*>(p.out) +
                           (packed ? 0 : batch * p.out_batch_stride) +
                           unit.head * p.out_head_stride;
    float* const lse_rows =
        p.lse + (packed ? 0 : batch * p.lse_batch_stride) + unit.head * p.lse_head_stride;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row() + 8 * half;
      const float inverse = softmax.inverse_sum(half);
      if (quad_lane == 0 && row < rows) lse_rows[first_row + row] = softmax.lse(half);
      uint16_t* const out_row = out_rows + (first_row + row) * p.out_row_stride + 8 * quad_lane;
#pragma unroll
      for (int j = 0; j < Traits::kHeadDim / 8; j += 4) {
        uint32_t words[4];  // columns 8 * (j + i) + 2 * quad_lane
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &out[4 * (j + i) + 2 * half];
          words[i] = pack_pair<Element>(pair[0] * inverse, pair[1] * inverse);
        }
        transpose_quad(words, quad_lane);  // columns 8 * (j + quad_lane) + 2 * i
        if (row < rows) {
          __stcs(reinterpret_cast<uint4*>(out_row + 8 * j),
                 make_uint4(words[0], words[1], words[2], words[3]));
        }
      }
    }
    if constexpr (Map::kKeeps) {
      // A vote and not a branch on what each lane holds: a warp that might be divergent from here on
      // would lose its uniform registers, and the loop half of its speed.
      if (__all_sync(kFullWarp, is_final && rows > 0)) map.finish(softmax, page, unit);
      reader.release();
      // Nothing of the unit is left, and the compiler is told: finish() needs these registers.
      fill(out, 0.0f);
      fill(scores, 0.0f);
      fill(weights, 0u);
#pragma unroll
      for (auto& step : q) fill(step, 0u);
    }
  }

  template <class T, int kCount>
  static __device__ __forceinline__ void fill(T (&registers)[kCount], T value) {
#pragma unroll
    for (T& x : registers) x = value;
  }

  // Word i of lane l becomes word l of lane i, in each quad.
  static __device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int quad_lane) {
    const bool odd = quad_lane & 1, upper = quad_lane & 2;
    const uint32_t a = __shfl_xor_sync(kFullWarp, odd ? words[0] : words[1], 1);
    const uint32_t b = __shfl_xor_sync(kFullWarp, odd ? words[2] : words[3], 1);
    (odd ? words[0] : words[1]) = a;
    (odd ? words[2] : words[3]) = b;
    const uint32_t c = __shfl_xor_sync(kFullWarp, upper ? words[0] : words[2], 2);
    const uint32_t d = __shfl_xor_sync(kFullWarp, upper ? words[1] : words[3], 2);
    (upper ? words[0] : words[2]) = c;
    (upper ? words[1] : words[3]) = d;
  }

  const Params& p;
  const SmemAddress base;
  PageReader<Traits> reader;
  const int consumer;
  ChunkCounters<Traits::kConsumers> counters;
  Sm90Softmax<Element> softmax;
  uint32_t q_phase = 0;
  int first_masked = 0;  // see Sm90Unit
  // The page's entries: of 32 from `chunk` on, each lane holds one's Load; `own` are those to do.
  int entries = 0, first_slot = 0, chunk = 0;
  uint32_t load_word = 0, own = 0;
  Map map;

  float out[Traits::kHeadDim / 2];
  float scores[32];
  uint32_t weights[16];  // P, rounded and packed
  uint32_t q[Traits::kQRegisterSteps][4];
};

}  // namespace seer::dev
