// SPDX-License-Identifier: Apache-2.0
// Gate scores of a strip of query-block rows, shared by gate_scores_cpu and gate_select_cpu so
// that both see the same bits of every score.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cpu_buffer.h"
#include "common/cpu_check.h"
#include "common/cpu_kernels.h"
#include "seer/pool_gate.h"

namespace seer::cpu {

// Blocks of one sequence: those of the tensors, or fewer where longer ones are packed with it.
struct GateExtent {
  int64_t blocks_q, blocks_kv;
};
inline GateExtent gate_extent(const GateScoresParams& params, int64_t b) {
  if (params.cu_seqlens_q == nullptr) return {params.blocks_q, params.blocks_kv};
  const auto blocks = [b](const int32_t* cu_seqlens, int block) {
    return ceil_div(int64_t{cu_seqlens[b + 1]} - cu_seqlens[b], block);
  };
  return {blocks(params.cu_seqlens_q, params.block_q),
          blocks(params.cu_seqlens_kv, params.block_kv)};
}

// Blocks [0, visible) of the row can be seen: bottom-right causal rule over blocks.
inline int64_t visible_blocks(const GateExtent& extent, bool causal, int64_t row) {
  if (row >= extent.blocks_q) return 0;
  if (!causal) return extent.blocks_kv;
  return std::clamp<int64_t>(row + 1 + extent.blocks_kv - extent.blocks_q, 0, extent.blocks_kv);
}

// Contents of cu_seqlens.
inline Status check_gate_lengths(const GateScoresParams& params) {
  if (params.cu_seqlens_q == nullptr) return {};
  constexpr const char* kEmbed =
      "Embed these sequences with pool_gate, and pass the block size that it took.";
  const Status q = check_cu_seqlens("cu_seqlens_q", params.cu_seqlens_q, params.batch, -1,
                                    params.blocks_q * params.block_q, kEmbed);
  return q.ok() ? check_cu_seqlens("cu_seqlens_kv", params.cu_seqlens_kv, params.batch, -1,
                                   params.blocks_kv * params.block_kv, kEmbed)
                : q;
}

// One thread's strip: `lanes` rows of one head at a time, O(lanes * blocks_kv) floats.
class GateStrip {
 public:
  explicit GateStrip(const GateScoresParams& params)
      : params_(params), kernels_(kernels_for(params.blocks_q)), scratch_(scratch_floats(params)) {
    if (!scratch_.ok()) return;
    qt_ = scratch_.take(lanes() * params.gate_dim);
    rows_ = scratch_.take(std::max<int64_t>(lanes(), kTile) * params.gate_dim);
    scores_ = scratch_.take(lanes() * params.blocks_kv);
  }

  static int64_t lanes(const GateScoresParams& params) {
    return kernels_for(params.blocks_q).lanes;
  }
  static int64_t scratch_floats(const GateScoresParams& params) {
    const int64_t width = lanes(params);
    return Scratch::padded(width * params.gate_dim) +
           Scratch::padded(std::max<int64_t>(width, kTile) * params.gate_dim) +
           Scratch::padded(width * params.blocks_kv);
  }

  bool ok() const { return scratch_.ok(); }
  int64_t lanes() const { return kernels_.lanes; }

  // Computes rows [first, first + count) of one head, count <= lanes().
  void compute(int64_t b, int64_t head, int64_t first, int64_t count) {
    const int64_t dim = params_.gate_dim;
    load(params_.q_gate, b, first, head, count);
    std::fill_n(qt_, lanes() * dim, 0.0f);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < dim; ++d) qt_[d * lanes() + r] = rows_[r * dim + d];
    const int64_t head_k = head / (params_.heads_q / params_.heads_k);
    // The last of these rows that exists sees the most.
    const GateExtent extent = gate_extent(params_, b);
    const int64_t cols =
        first < extent.blocks_q
            ? visible_blocks(extent, params_.causal, std::min(first + count, extent.blocks_q) - 1)
            : 0;
    for (int64_t begin = 0; begin < cols; begin += kTile) {
      const int64_t tile = std::min(kTile, cols - begin);
      load(params_.k_gate, b, begin, head_k, tile);
      kernels_.multiply(rows_, tile, dim, qt_, scores_ + begin * lanes());
    }
  }

  // Copies the visible scores of row first + lane to dst.
  void copy_row(int64_t lane, int64_t visible, float* dst) const {
    for (int64_t j = 0; j < visible; ++j) dst[j] = scores_[j * lanes() + lane] * params_.scale;
  }

 private:
  static constexpr int64_t kTile = 64;

  void load(const ConstView& view, int64_t b, int64_t row, int64_t head, int64_t count) {
    const int64_t offset = b * view.batch_stride + row * view.row_stride + head * view.head_stride;
    kernels_.load_tile(params_.dtype,
                       static_cast<const char*>(view.data) + offset * size_of(params_.dtype),
                       view.row_stride, count, params_.gate_dim, rows_);
  }

  const GateScoresParams& params_;
  const Kernels& kernels_;
  Scratch scratch_;
  float* qt_ = nullptr;      // [gate_dim][lanes]
  float* rows_ = nullptr;    // [tile][gate_dim]
  float* scores_ = nullptr;  // [blocks_kv][lanes], not yet scaled
};

}  // namespace seer::cpu
