// SPDX-License-Identifier: Apache-2.0
// pool_gate on the CPU.
//
//   parallel for each (batch entry, input head, tile of 16 blocks):
//     pooled [tile][pools * head_dim] <- max, min, mean over each block's valid rows, fp32
//     for each output head of the input head:
//       result <- pooled (rounded to x's dtype) x weight, in fp32, `lanes` columns at a time
//       RoPE in fp32, one rounding, stored
// Without weight the result is pooled itself, still unrounded.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>

#include "common/cpu_buffer.h"
#include "common/cpu_kernels.h"
#include "pool_gate/gate_check.h"
#include "seer/pool_gate.h"

namespace seer {
namespace {

class PoolGateWorker {
 public:
  static constexpr int64_t kTile = 16;

  explicit PoolGateWorker(const PoolGateParams& params)
      : params_(params),
        kernels_(cpu::kernels_for(params.gate_dim)),
        scratch_(scratch_floats(params)) {
    if (!scratch_.ok()) return;
    rows_ = scratch_.take(tile_rows(params) * params.head_dim);
    pooled_ = scratch_.take(kTile * depth(params));
    rounded_ = scratch_.take(kTile * depth(params));
    weight_ = scratch_.take(depth(params) * kernels_.lanes);
    product_ = scratch_.take(kTile * kernels_.lanes);
    result_ = scratch_.take(kTile * params.gate_dim);
  }

  static int64_t scratch_floats(const PoolGateParams& params) {
    const int64_t lanes = cpu::kernels_for(params.gate_dim).lanes;
    return cpu::Scratch::padded(tile_rows(params) * params.head_dim) +
           2 * cpu::Scratch::padded(kTile * depth(params)) +
           cpu::Scratch::padded(depth(params) * lanes) + cpu::Scratch::padded(kTile * lanes) +
           cpu::Scratch::padded(kTile * params.gate_dim);
  }

  bool ok() const { return scratch_.ok(); }

  void run(int64_t b, int64_t head, int64_t tile) {
    start_ = params_.cu_seqlens == nullptr ? 0 : params_.cu_seqlens[b];
    length_ = params_.cu_seqlens == nullptr ? params_.rows : params_.cu_seqlens[b + 1] - start_;
    first_ = tile * kTile;
    const int64_t padded = std::min(kTile, ceil_div(params_.rows, params_.block) - first_);
    count_ = std::clamp<int64_t>(ceil_div(length_, params_.block) - first_, 0, padded);
    if (count_ > 0) embed(b, head);
    if (count_ < padded) clear(b, head, padded);
  }

 private:
  void embed(int64_t b, int64_t head) {
    for (int64_t i = 0; i < count_; ++i) pool(b, head, i);
    const int64_t group = params_.heads_out / params_.heads;
    if (params_.weight != nullptr) round_pooled();
    for (int64_t head_out = head * group; head_out < (head + 1) * group; ++head_out) {
      if (params_.weight != nullptr)
        project(head_out);
      else
        std::copy_n(pooled_, count_ * params_.gate_dim, result_);
      if (params_.cos != nullptr) rotate(b);
      store(b, head_out);
    }
  }

  // Channels per block before the projection.
  static int64_t depth(const PoolGateParams& params) {
    return std::popcount(static_cast<unsigned>(params.pools)) * int64_t{params.head_dim};
  }
  static int64_t tile_rows(const PoolGateParams& params) {
    return std::min<int64_t>(params.block, params.rows);
  }
  const char* element(const void* data, int64_t offset) const {
    return static_cast<const char*>(data) + offset * size_of(params_.dtype);
  }

  void pool(int64_t b, int64_t head, int64_t i) {
    const int64_t block_row = (first_ + i) * params_.block, row = start_ + block_row;
    const int64_t valid = std::min<int64_t>(params_.block, length_ - block_row);
    const ConstView& x = params_.x;
    kernels_.load_tile(
        params_.dtype,
        element(x.data, b * x.batch_stride + row * x.row_stride + head * x.head_stride),
        x.row_stride, valid, params_.head_dim, rows_);
    float* next = pooled_ + i * depth(params_);
    float* out[3] = {};
    const Pool order[3] = {kPoolMax, kPoolMin, kPoolAvg};
    for (int kind = 0; kind < 3; ++kind) {
      if ((params_.pools & order[kind]) == 0) continue;
      out[kind] = next;
      next += params_.head_dim;
    }
    kernels_.pool(rows_, valid, params_.head_dim, out[0], out[1], out[2]);
  }

  // The gate sees pooled values of x's dtype, as a pooling op before it would have stored them.
  void round_pooled() {
    if (params_.dtype == DType::kFloat32) return;
    const int64_t cols = depth(params_);
    kernels_.store_tile(params_.dtype, pooled_, count_, cols, rounded_, cols);
    kernels_.load_tile(params_.dtype, rounded_, cols, count_, cols, pooled_);
  }

  void project(int64_t head_out) {
    const int64_t lanes = kernels_.lanes, channels = depth(params_);
    const int64_t matrix = head_out * channels * params_.gate_dim;
    for (int64_t begin = 0; begin < params_.gate_dim; begin += lanes) {
      const int64_t cols = std::min(lanes, params_.gate_dim - begin);
      const void* columns = element(params_.weight, matrix + begin);
      if (cols == lanes) {
        kernels_.load_tile(params_.dtype, columns, params_.gate_dim, channels, cols, weight_);
      } else {
        std::fill_n(weight_, channels * lanes, 0.0f);
        for (int64_t c = 0; c < channels; ++c)
          kernels_.load_tile(params_.dtype,
                             element(params_.weight, matrix + c * params_.gate_dim + begin), 0, 1,
                             cols, weight_ + c * lanes);
      }
      kernels_.multiply(pooled_, count_, channels, weight_, product_);
      for (int64_t i = 0; i < count_; ++i)
        std::copy_n(product_ + i * lanes, cols, result_ + i * params_.gate_dim + begin);
    }
  }

  // Rotary embedding at each block's first token, channel c paired with c + rotary_dim / 2.
  void rotate(int64_t b) {
    const int64_t half = params_.rotary_dim / 2;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t angle = b * params_.rope_batch_stride + (first_ + i) * half;
      float* low = result_ + i * params_.gate_dim;
      float* high = low + half;
      for (int64_t c = 0; c < half; ++c) {
        const float cosine = params_.cos[angle + c], sine = params_.sin[angle + c];
        const float x1 = low[c], x2 = high[c];
        low[c] = x1 * cosine - x2 * sine;
        high[c] = x2 * cosine + x1 * sine;
      }
    }
  }

  int64_t out_stride() const { return int64_t{params_.heads_out} * params_.gate_dim; }
  char* out_row(int64_t b, int64_t i, int64_t head_out) const {
    const int64_t blocks = ceil_div(params_.rows, params_.block);
    const int64_t offset = (b * blocks + first_ + i) * out_stride() + head_out * params_.gate_dim;
    return static_cast<char*>(params_.out) + offset * size_of(params_.dtype);
  }
  void store(int64_t b, int64_t head_out) {
    kernels_.store_tile(params_.dtype, result_, count_, params_.gate_dim, out_row(b, 0, head_out),
                        out_stride());
  }
  // Blocks past the end of a packed sequence.
  void clear(int64_t b, int64_t head, int64_t padded) {
    const int64_t group = params_.heads_out / params_.heads;
    const int64_t bytes = group * params_.gate_dim * size_of(params_.dtype);
    for (int64_t i = count_; i < padded; ++i) std::memset(out_row(b, i, head * group), 0, bytes);
  }

  const PoolGateParams& params_;
  const cpu::Kernels& kernels_;
  cpu::Scratch scratch_;
  int64_t start_ = 0, length_ = 0;  // rows of the sequence
  int64_t first_ = 0, count_ = 0;   // blocks of the tile that exist
  float* rows_ = nullptr;           // [block][head_dim]
  float* pooled_ = nullptr;         // [tile][pools * head_dim]
  float* rounded_ = nullptr;        // the same in x's dtype
  float* weight_ = nullptr;         // [pools * head_dim][lanes]
  float* product_ = nullptr;        // [tile][lanes]
  float* result_ = nullptr;         // [tile][gate_dim]
};

}  // namespace

Status pool_gate_cpu(const PoolGateParams& params, const ParallelFor& parallel_for) {
  if (params.heads == 0) return {};
  if (Status status = check_pool_gate(params); !status.ok()) return status;
  if (params.heads_out == 0) return {};
  if (params.cu_seqlens != nullptr) {
    const Status status = cpu::check_cu_seqlens("cu_seqlens", params.cu_seqlens, params.batch,
                                                params.total, params.rows, cpu::kRaiseMaxRows);
    if (!status.ok()) return status;
  }
  const int64_t tiles = ceil_div(ceil_div(params.rows, params.block), PoolGateWorker::kTile);
  const int64_t jobs = int64_t{params.batch} * params.heads * tiles;
  if (jobs == 0) return {};
  std::atomic<bool> exhausted{false};
  parallel_for(jobs, 1, [&](int64_t begin, int64_t end) {
    PoolGateWorker worker(params);
    if (!worker.ok()) {
      exhausted = true;
      return;
    }
    for (int64_t job = begin; job < end; ++job)
      worker.run(job / tiles / params.heads, job / tiles % params.heads, job % tiles);
  });
  return exhausted ? cpu::out_of_memory(PoolGateWorker::scratch_floats(params)) : Status{};
}

}  // namespace seer
