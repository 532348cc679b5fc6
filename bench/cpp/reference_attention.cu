// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "reference.h"

namespace seer::bench {
namespace {

constexpr int kThreads = 256;

// One row of q, wherever it stands.
struct Row {
  int batch, head;
  int64_t row;
};

// All threads return the sum, or the maximum, of their values.
template <class Combine>
__device__ float across_threads(float mine, Combine combine) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
    __syncthreads();
  }
  const float result = shared[0];
  __syncthreads();
  return result;
}

__device__ bool sees(const BlockSparseAttnParams& p, const Row& at, int64_t column) {
  if (p.causal && column > at.row + p.rows_kv - p.rows_q) return false;
  if (p.block_bits.data == nullptr) return true;
  const int64_t mask_head = int64_t{at.head} * p.block_bits.heads / p.heads_q;
  const int64_t j = column / p.block_kv;
  const int32_t* words = p.block_bits.data + at.batch * p.block_bits.batch_stride +
                         mask_head * p.block_bits.head_stride +
                         at.row / p.block_q * p.block_bits.row_stride;
  return static_cast<uint32_t>(words[j / 32]) >> (j % 32) & 1u;
}

// One thread block per row: scores, softmax, output.
template <class Element>
__global__ void attention_kernel(BlockSparseAttnParams p, const Row* rows, float* probability,
                                 float* out, float* lse) {
  const Row at = rows[blockIdx.x];
  const int64_t kv_head = int64_t{at.head} / (p.heads_q / p.heads_kv);
  const auto element = [&](const ConstView& view, int64_t row, int64_t head) {
    return static_cast<const Element*>(view.data) + at.batch * view.batch_stride +
           row * view.row_stride + head * view.head_stride;
  };
  const Element* q = element(p.q, at.row, at.head);
  float* weights = probability + int64_t{blockIdx.x} * p.rows_kv;

  float largest = -INFINITY;
  for (int64_t c = threadIdx.x; c < p.rows_kv; c += kThreads) {
    float score = -INFINITY;
    if (sees(p, at, c)) {
      const Element* k = element(p.k, c, kv_head);
      score = 0.0f;
      for (int d = 0; d < p.head_dim; ++d) score += float(q[d]) * float(k[d]);
      score *= p.scale;
    }
    weights[c] = score;
    largest = fmaxf(largest, score);
  }
  largest = across_threads(largest, [](float a, float b) { return fmaxf(a, b); });

  float sum = 0.0f;
  for (int64_t c = threadIdx.x; c < p.rows_kv; c += kThreads) {
    weights[c] = weights[c] == -INFINITY ? 0.0f : expf(weights[c] - largest);
    sum += weights[c];
  }
  sum = across_threads(sum, [](float a, float b) { return a + b; });
  for (int64_t c = threadIdx.x; c < p.rows_kv && sum > 0.0f; c += kThreads) weights[c] /= sum;
  __syncthreads();

  if (threadIdx.x == 0) lse[blockIdx.x] = sum > 0.0f ? largest + logf(sum) : -INFINITY;
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads) {
    float value = 0.0f;
    for (int64_t c = 0; c < p.rows_kv; ++c) {
      if (weights[c] != 0.0f) value += weights[c] * float(element(p.v, c, kv_head)[d]);
    }
    out[int64_t{blockIdx.x} * p.head_dim + d] = value;
  }
}

// One thread per row and KV block.
__global__ void map_kernel(const float* probability, int64_t rows, int64_t rows_kv, int block_kv,
                           bool sum, float* map) {
  const int64_t blocks_kv = (rows_kv + block_kv - 1) / block_kv;
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= rows * blocks_kv) return;
  const int64_t row = at / blocks_kv, j = at % blocks_kv;
  float value = 0.0f;
  for (int64_t c = j * block_kv; c < min((j + 1) * block_kv, rows_kv); ++c) {
    const float p = probability[row * rows_kv + c];
    value = sum ? value + p : fmaxf(value, p);
  }
  map[at] = value;
}

}  // namespace

AttentionRows reference_attention(const BlockSparseAttnParams& params,
                                  const std::vector<QueryBlock>& blocks, MapOf map) {
  std::vector<Row> host_rows;
  for (const QueryBlock& block : blocks) {
    for (int64_t r = 0; r < block.rows; ++r) {
      host_rows.push_back({block.batch, block.head, block.first_row + r});
    }
  }
  const auto count = static_cast<int64_t>(host_rows.size());
  const auto rows = DeviceBuffer::copy_of(host_rows);
  const DeviceBuffer probability(count * params.rows_kv * int64_t{sizeof(float)});
  const DeviceBuffer out(count * params.head_dim * int64_t{sizeof(float)});
  const DeviceBuffer lse(count * int64_t{sizeof(float)});
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(count), kThreads>>>(
        params, rows.as<Row>(), probability.as<float>(), out.as<float>(), lse.as<float>());
    check(cudaGetLastError(), "launching the reference");
  };
  if (params.dtype == DType::kBFloat16) {
    launch(attention_kernel<__nv_bfloat16>);
  } else {
    launch(attention_kernel<__half>);
  }
  AttentionRows result;
  if (map != MapOf::kNothing) {
    const int64_t elements = count * ceil_div(params.rows_kv, params.block_kv);
    const DeviceBuffer device_map(elements * int64_t{sizeof(float)});
    map_kernel<<<static_cast<unsigned>(ceil_div(elements, kThreads)), kThreads>>>(
        probability.as<float>(), count, params.rows_kv, params.block_kv, map == MapOf::kSum,
        device_map.as<float>());
    check(cudaGetLastError(), "launching the reference");
    result.map = device_map.to_host<float>();
  }
  result.out = out.to_host<float>();
  result.lse = lse.to_host<float>();
  return result;
}

}  // namespace seer::bench
