// SPDX-License-Identifier: Apache-2.0
// One attention problem with its storage, and the definition of its results in double loops.
#pragma once

#include <cmath>
#include <vector>

#include "check.h"
#include "common/cpu_attn.h"

namespace seer::test {

struct AttentionShape {
  DType dtype = DType::kFloat32;
  int batch = 1, heads_q = 1, heads_kv = 1, head_dim = 16;
  int64_t rows_q = 64, rows_kv = 64;
  int block_q = 16, block_kv = 16;
  bool causal = true;
  int mask_heads = 0;  // 0: dense
  int mask_batch = 1;
  double density = 0.5;
  bool head_major = false;                         // storage order [batch, heads, rows, d]
  std::vector<int32_t> lengths_q{}, lengths_kv{};  // packed sequences instead of batch x rows
};

// A tensor of `rows` per batch entry in storage with gaps: guards around every row.
struct Strided {
  static constexpr int64_t kGap = 3;
  Buffer storage;
  int64_t batch_stride, row_stride, head_stride;

  Strided(DType dtype, int64_t batch, int64_t rows, int64_t heads, int64_t dim, bool head_major,
          float fill)
      : storage(dtype, batch * rows * heads * (dim + kGap) + kGap, fill),
        batch_stride(rows * heads * (dim + kGap)),
        row_stride(head_major ? dim + kGap : heads * (dim + kGap)),
        head_stride(head_major ? rows * (dim + kGap) : dim + kGap) {}
  int64_t at(int64_t b, int64_t row, int64_t head, int64_t d) const {
    return kGap + b * batch_stride + row * row_stride + head * head_stride + d;
  }
  template <class Pointer>
  View<Pointer> view(DType dtype) {
    return {static_cast<char*>(storage.data()) + kGap * size_of(dtype), batch_stride, row_stride,
            head_stride};
  }
};

class AttentionCase {
 public:
  static constexpr float kGuard = 77.0f;

  AttentionCase(const AttentionShape& shape, uint64_t seed)
      : shape(shape),
        random_(seed),
        batch_(packed() ? int64_t(shape.lengths_q.size()) : shape.batch),
        q(make(rows_of(shape.lengths_q, shape.rows_q), shape.heads_q, shape.head_major)),
        k(make(rows_of(shape.lengths_kv, shape.rows_kv), shape.heads_kv, shape.head_major)),
        v(make(rows_of(shape.lengths_kv, shape.rows_kv), shape.heads_kv, !shape.head_major)),
        out(make(rows_of(shape.lengths_q, shape.rows_q), shape.heads_q, shape.head_major)) {
    for (Strided* tensor : {&q, &k, &v})
      for (int64_t i = 0; i < tensor->storage.size(); ++i)
        tensor->storage.set(i, static_cast<float>(random_.normal()));
    rows_q = packed() ? longest(shape.lengths_q) : shape.rows_q;
    rows_kv = packed() ? longest(shape.lengths_kv) : shape.rows_kv;
    blocks_q = ceil_div(rows_q, shape.block_q);
    blocks_kv = ceil_div(rows_kv, shape.block_kv);
    total_q = rows_of(shape.lengths_q, shape.rows_q);
    words = ceil_div(blocks_kv, 32) + 1;
    cu_q_ = running_sum(shape.lengths_q);
    cu_kv_ = running_sum(shape.lengths_kv);
    lse.assign((packed() ? 1 : batch_) * shape.heads_q * total_q, kGuard);
    bits_.assign(shape.mask_batch * shape.mask_heads * blocks_q * words, 0);
    // Bits past blocks_kv are set at random too: they must be ignored.
    for (int32_t& word : bits_)
      for (int j = 0; j < 32; ++j)
        if (random_.uniform() < shape.density)
          word = static_cast<int32_t>(static_cast<uint32_t>(word) | 1u << j);
  }

  bool packed() const { return !shape.lengths_q.empty(); }
  int64_t batch() const { return batch_; }
  int64_t length_q(int64_t b) const { return packed() ? shape.lengths_q[b] : shape.rows_q; }
  int64_t length_kv(int64_t b) const { return packed() ? shape.lengths_kv[b] : shape.rows_kv; }
  // Position of a sequence's row in its tensor, and of its lse.
  int64_t q_at(int64_t b, int64_t r, int64_t h, int64_t d) const {
    return packed() ? q.at(0, cu_q_[b] + r, h, d) : q.at(b, r, h, d);
  }
  int64_t kv_at(const Strided& tensor, int64_t b, int64_t c, int64_t h, int64_t d) const {
    return packed() ? tensor.at(0, cu_kv_[b] + c, h, d) : tensor.at(b, c, h, d);
  }
  int64_t lse_at(int64_t b, int64_t r, int64_t h) const {
    return packed() ? h * total_q + cu_q_[b] + r : (b * shape.heads_q + h) * total_q + r;
  }

  bool kept(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (shape.mask_heads == 0) return true;
    const int64_t mask_b = shape.mask_batch == 1 ? 0 : b;
    const int64_t mask_h = h / (shape.heads_q / shape.mask_heads);
    const int64_t row = (mask_b * shape.mask_heads + mask_h) * blocks_q + i;
    return static_cast<uint32_t>(bits_[row * words + j / 32]) >> (j % 32) & 1u;
  }
  bool visible(int64_t b, int64_t h, int64_t r, int64_t c) const {
    return kept(b, h, r / shape.block_q, c / shape.block_kv) &&
           (!shape.causal || c <= r + length_kv(b) - length_q(b));
  }

  BlockSparseAttnParams params() {
    BlockSparseAttnParams p;
    p.dtype = shape.dtype;
    p.batch = static_cast<int>(batch_);
    p.heads_q = shape.heads_q;
    p.heads_kv = shape.heads_kv;
    p.head_dim = shape.head_dim;
    p.rows_q = rows_q;
    p.rows_kv = rows_kv;
    p.block_q = shape.block_q;
    p.block_kv = shape.block_kv;
    p.causal = shape.causal;
    p.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
    p.q = view<const void*>(q);
    p.k = view<const void*>(k);
    p.v = view<const void*>(v);
    p.out = view<void*>(out);
    p.lse = lse.data();
    p.lse_head_stride = total_q;
    if (packed()) {
      p.total_q = total_q;
      p.total_kv = cu_kv_.back();
      p.cu_seqlens_q = cu_q_.data();
      p.cu_seqlens_kv = cu_kv_.data();
    } else {
      p.lse_batch_stride = shape.heads_q * total_q;
    }
    if (shape.mask_heads > 0)
      p.block_bits = {bits_.data(),
                      shape.mask_heads,
                      shape.mask_batch == 1 ? 0 : shape.mask_heads * blocks_q * words,
                      blocks_q * words,
                      words,
                      static_cast<int>(words)};
    return p;
  }

  // Row (b, r, h) by definition: probabilities of the visible columns (0 elsewhere), lse, out.
  struct Row {
    double lse = -INFINITY;
    std::vector<double> probability, out;
  };
  Row expected(int64_t b, int64_t r, int64_t h) const {
    const int64_t head_kv = h / (shape.heads_q / shape.heads_kv), cols = length_kv(b);
    Row row{-INFINITY, std::vector<double>(cols), std::vector<double>(shape.head_dim)};
    std::vector<double> score(cols);
    double largest = -INFINITY, sum = 0.0;
    for (int64_t c = 0; c < cols; ++c) {
      if (!visible(b, h, r, c)) continue;
      for (int64_t d = 0; d < shape.head_dim; ++d)
        score[c] +=
            double{q.storage.get(q_at(b, r, h, d))} * k.storage.get(kv_at(k, b, c, head_kv, d));
      score[c] /= std::sqrt(double(shape.head_dim));
      largest = std::fmax(largest, score[c]);
    }
    for (int64_t c = 0; c < cols; ++c)
      if (visible(b, h, r, c)) sum += std::exp(score[c] - largest);
    if (sum > 0.0 || std::isnan(sum)) row.lse = largest + std::log(sum);
    for (int64_t c = 0; c < cols; ++c) {
      if (!visible(b, h, r, c)) continue;
      row.probability[c] = std::exp(score[c] - row.lse);
      for (int64_t d = 0; d < shape.head_dim; ++d)
        row.out[d] += row.probability[c] * v.storage.get(kv_at(v, b, c, head_kv, d));
    }
    return row;
  }

  AttentionShape shape;

 private:
  Random random_;
  int64_t batch_;
  std::vector<int32_t> cu_q_, cu_kv_, bits_;

  static std::vector<int32_t> running_sum(const std::vector<int32_t>& lengths) {
    std::vector<int32_t> sum{0};
    for (int32_t length : lengths) sum.push_back(sum.back() + length);
    return sum;
  }
  static int64_t longest(const std::vector<int32_t>& lengths) {
    return std::max<int64_t>(1, *std::max_element(lengths.begin(), lengths.end()));
  }
  int64_t rows_of(const std::vector<int32_t>& lengths, int64_t rows) const {
    return packed() ? running_sum(lengths).back() : rows;
  }
  Strided make(int64_t rows, int64_t heads, bool head_major) const {
    return Strided(shape.dtype, packed() ? 1 : shape.batch, rows, heads, shape.head_dim, head_major,
                   kGuard);
  }
  template <class Pointer>
  View<Pointer> view(Strided& tensor) const {
    View<Pointer> view = tensor.view<Pointer>(shape.dtype);
    if (packed()) view.batch_stride = 0;
    return view;
  }

 public:
  Strided q, k, v, out;
  std::vector<float> lse;
  int64_t rows_q, rows_kv, blocks_q, blocks_kv, total_q, words;
};

}  // namespace seer::test
