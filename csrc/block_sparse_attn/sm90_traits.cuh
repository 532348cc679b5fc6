// SPDX-License-Identifier: Apache-2.0
// Compile-time shape of the Hopper block-sparse attention kernel: roles, stages, the shared-memory
// map, and the parameters its launcher hands over. The design is told in
// docs/block_sparse_attn_hopper.md.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "block_sparse_attn/sm90_no_map.cuh"
#include "block_sparse_attn/variant.h"
#include "common/divisor.cuh"
#include "common/element_of.cuh"

namespace seer {

// The part of a tile that one consumer computes: 64 query rows of one head.
struct Sm90Unit {
  int head;
  int first_row;     // of the sequence; < 0: the tile has no such unit
  int tiles;         // KV tiles that some row of the unit sees
  int first_masked;  // first KV tile in which some row does not see every column
};

// What the scheduler tells everyone about a page of the stream (sm90_scheduler.cuh).
struct alignas(16) Sm90Page {
  int entries;  // < 0: no more work
  int flags;
  int first_slot;  // of the page's first entry, modulo kStagesK * kStagesV
  int tile;        // in the whole launch
  int head_kv, batch;
  int rows_q, rows_kv;    // of the sequence
  int q_start, kv_start;  // its first packed rows (0 if not varlen)
  int redo;               // written by consumers: bit per warp whose result left the range
  int redo_of;            // of a careful tile: the warps that it is streamed again for
  Sm90Unit units[4];      // one per consumer

  static constexpr int kFirst = 1, kLast = 2;  // page of its tile
  static constexpr int kCareful = 4;
};

// Where the search for a packed tile's sequence begins.
struct Sm90Search {
  int first_sequence, tiles_before;
};

// What the order of tiles divides by (sm90_tiles.cuh), but for packed sequences, where all but the
// last two differ from one to the next.
struct Sm90Divisors {
  dev::Divisor sequence_tiles, section_tiles;  // tiles of a sequence, of a section
  dev::Divisor heads, last_heads;              // KV heads of a section, of the last one
  dev::Divisor group;
  dev::Divisor heads_per_bits;
};

struct Sm90Params;

template <BlockSparseAttnKey kKey>
struct Sm90Traits {
  using Params = Sm90Params;
  using Map = dev::Sm90NoMap;
  using Element = ElementOf<kKey.dtype>;

  static constexpr int kHeadDim = kKey.head_dim;
  // A consumer warpgroup owns 64 query rows of one head, whatever block_q is; KV moves in tiles of
  // 64 rows, whatever block_kv is. One wgmma m64 per warpgroup and step: the consumers share each
  // K/V tile, and while one is in its softmax, the others keep the tensor cores busy. At head_dim 64
  // a product takes no longer than its softmax, and accumulators leave room for a fourth.
  static constexpr int kRows = 64;
  static constexpr int kTileKv = 64;
  static constexpr int kConsumers = kHeadDim == 64 ? 4 : 3;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // 128 x 32 + 384 x 160 are all of the 65536 registers. 640 threads start with 96 each, 61440 in
  // all: 128 x 32 + 512 x 112.
  static constexpr int kControlRegisters = 32;
  static constexpr int kConsumerRegisters = kConsumers == 4 ? 112 : 160;
  // Of the head_dim / 16 k-steps of Q K^T, as many take Q from registers as fit without spills: a
  // product whose operands both lie in shared memory saturates it (128 B per clock).
  static constexpr int kQRegisterSteps = kConsumers == 4 ? 1 : kHeadDim == 128 ? 5 : 4;

  static constexpr int kStageBytes = kTileKv * kHeadDim * 2;
  static constexpr int kPanelBytes = kTileKv * 128;  // 64 columns of a tile
  static constexpr int kStagesK = kHeadDim == 128 ? 6 : 8;
  static constexpr int kStagesV = kHeadDim == 128 ? 5 : 8;
  // Loads are told apart by the set of consumers that own them. A consumer waits for every
  // load of the sets that it belongs to, so no wait ever skips a phase. At most kStages loads of a
  // set are in flight; 8 barriers per set make the index a mask.
  static constexpr int kOwnerSets = (1 << kConsumers) - 1;
  static constexpr int kBarriersPerSet = 8;
  static_assert(kStagesK <= kBarriersPerSet && kStagesV <= kBarriersPerSet);

  // The stream goes from the scheduler to everyone else in pages. Two are enough to look ahead, and a
  // third would only take tiles that another CTA could begin sooner.
  static constexpr int kPages = 2;
  static constexpr int kPageEntries = 128;
  // Readers of a page: the loaders of K, V and Q, and the warps of the consumers.
  static constexpr int kPageReaders = 3 + 4 * kConsumers;

  // A tile marked to be done again: its number and its warps.
  static constexpr int kPendingBytes = 8;

  // Shared memory, in bytes from a 1024-byte boundary.
  static constexpr int kSmemQ = 0;
  static constexpr int kSmemK = kSmemQ + kConsumers * kStageBytes;
  static constexpr int kSmemV = kSmemK + kStagesK * kStageBytes;
  static constexpr int kSmemPage = kSmemV + kStagesV * kStageBytes;
  static constexpr int kSmemEntries = kSmemPage + kPages * int(sizeof(Sm90Page));
  static constexpr int kSmemCurrent = kSmemEntries + kPages * kPageEntries * 4;
  static constexpr int kSmemOrder = kSmemCurrent + int(sizeof(Sm90Page));  // OrderTables
  static constexpr int kOrderBytes = (32 * 4 + 8) * (1 << kConsumers) / 4;
  static constexpr int kSmemPending = kSmemOrder + kOrderBytes;
  static constexpr int kSmemSearch = kSmemPending + kPages * kPendingBytes;
  static constexpr int kSmemRows = kSmemSearch + int(sizeof(Sm90Search));
  static constexpr int kSmemBarriers = kSmemRows + kConsumers * int(sizeof(const uint32_t*));
  static constexpr int kFullK = kSmemBarriers;  // [owner set - 1][kBarriersPerSet]
  static constexpr int kFullV = kFullK + 8 * kOwnerSets * kBarriersPerSet;
  static constexpr int kEmptyK = kFullV + 8 * kOwnerSets * kBarriersPerSet;  // [stage]
  static constexpr int kEmptyV = kEmptyK + 8 * kStagesK;
  static constexpr int kFullQ = kEmptyV + 8 * kStagesV;  // [consumer]
  static constexpr int kEmptyQ = kFullQ + 8 * kConsumers;
  static constexpr int kFullPage = kEmptyQ + 8 * kConsumers;  // [page]
  static constexpr int kEmptyPage = kFullPage + 8 * kPages;
  static constexpr int kSmemBytes = kEmptyPage + 8 * kPages;

  static_assert(kKey.sm == 90, "these are the traits of the Hopper kernel");
  static_assert(kHeadDim == 64 || kHeadDim == 128, "head_dim: 64 or 128");
  static_assert(kKey.block_q == 64 || kKey.block_q == 128, "block_q: 64 or 128");
  static_assert(kKey.tile_kv == kTileKv, "variants.json: tile_kv is not the kernel's");
  static_assert(kSmemBytes <= 232448, "a thread block has at most 227 KiB of shared memory");
};

// Kernel arguments, derived once on the host. Strides in elements (bits: in words).
struct Sm90Params {
  CUtensorMap q, k, v;  // see sm90_launch.cuh
  void* out;
  float* lse;
  const uint32_t* bits;  // nullptr: dense
  const int32_t *cu_seqlens_q, *cu_seqlens_kv;
  int* next_tile;  // counts tiles beyond the first of each CTA, from 0; nullptr: there are none
  int64_t out_batch_stride, out_row_stride, out_head_stride;
  int64_t lse_batch_stride, lse_head_stride;
  int64_t bits_batch_stride, bits_head_stride, bits_row_stride;
  int64_t total_q, total_kv;
  int batch, heads_kv, group;
  int rows_q, rows_kv;  // varlen: the longest
  int heads_per_bits;   // query heads that share one row of bits
  int rows_in_cache;    // KV rows of one head whose K and V fit in L2 together
  bool share_group;     // the consumers of a tile are heads of a group rather than rows of a head
  bool wide_q;          // block_q is 128: two consumers' rows share a row of bits
  bool wide_kv;         // block_kv is 128: a bit is two KV tiles
  bool causal;
  float scale_log2;  // |scale| * log2(e), never 0
  float score_sign;  // -1 if scale is negative: scores are negated before the softmax
  Sm90Divisors by;
};

}  // namespace seer
