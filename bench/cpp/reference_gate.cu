// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "reference.h"

namespace seer::bench {
namespace {

constexpr int kThreads = 256;

__device__ int64_t thread_index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

// One thread per (sequence, block, input head, channel of a head): its pools, concatenated.
template <class Element>
__global__ void pool_kernel(PoolGateParams p, int64_t blocks, int kinds, float* pooled) {
  const int64_t at = thread_index();
  if (at >= p.batch * blocks * p.heads * p.head_dim) return;
  const int64_t d = at % p.head_dim, head = at / p.head_dim % p.heads;
  const int64_t i = at / p.head_dim / p.heads % blocks, b = at / p.head_dim / p.heads / blocks;
  float largest = -INFINITY, smallest = INFINITY, sum = 0.0f;
  const int64_t first = i * p.block, end = min(first + p.block, p.rows);
  for (int64_t r = first; r < end; ++r) {
    const auto value = float(static_cast<const Element*>(
        p.x.data)[b * p.x.batch_stride + r * p.x.row_stride + head * p.x.head_stride + d]);
    largest = fmaxf(largest, value);
    smallest = fminf(smallest, value);
    sum += value;
  }
  float* to = pooled + at / p.head_dim * kinds * p.head_dim + d;
  const auto put = [&](float value) {
    *to = p.weight != nullptr ? float(Element(value)) : value;  // the product's input is 16-bit
    to += p.head_dim;
  };
  if (p.pools & kPoolMax) put(largest);
  if (p.pools & kPoolMin) put(smallest);
  if (p.pools & kPoolAvg) put(sum / float(end - first));
}

// One thread per output element, before RoPE.
template <class Element>
__global__ void project_kernel(PoolGateParams p, int64_t blocks, int channels, const float* pooled,
                               float* out) {
  const int64_t at = thread_index();
  if (at >= p.batch * blocks * p.heads_out * p.gate_dim) return;
  const int64_t n = at % p.gate_dim, head_out = at / p.gate_dim % p.heads_out;
  const int64_t block = at / p.gate_dim / p.heads_out;  // of all sequences
  const float* from = pooled + (block * p.heads + head_out / (p.heads_out / p.heads)) * channels;
  if (p.weight == nullptr) {
    out[at] = from[n];
    return;
  }
  const auto* weight = static_cast<const Element*>(p.weight) + head_out * channels * p.gate_dim;
  float value = 0.0f;
  for (int c = 0; c < channels; ++c) value += from[c] * float(weight[c * p.gate_dim + n]);
  out[at] = value;
}

// One thread per (sequence, block, output head, pair of channels).
__global__ void rope_kernel(PoolGateParams p, int64_t blocks, float* out) {
  const int64_t half = p.rotary_dim / 2, at = thread_index();
  if (at >= p.batch * blocks * p.heads_out * half) return;
  const int64_t c = at % half, i = at / half / p.heads_out % blocks;
  const int64_t b = at / half / p.heads_out / blocks;
  const int64_t angle = b * p.rope_batch_stride + i * half + c;
  float* first = out + at / half * p.gate_dim + c;
  const float x = first[0], y = first[half];
  first[0] = x * p.cos[angle] - y * p.sin[angle];
  first[half] = y * p.cos[angle] + x * p.sin[angle];
}

// One thread per score.
template <class Element>
__global__ void scores_kernel(GateScoresParams p, float* scores) {
  const int64_t at = thread_index();
  if (at >= p.batch * p.heads_q * p.blocks_q * p.blocks_kv) return;
  const int64_t j = at % p.blocks_kv, i = at / p.blocks_kv % p.blocks_q;
  const int64_t head = at / p.blocks_kv / p.blocks_q % p.heads_q;
  const int64_t b = at / p.blocks_kv / p.blocks_q / p.heads_q;
  if (p.causal && j > i + p.blocks_kv - p.blocks_q) {
    scores[at] = -INFINITY;
    return;
  }
  const auto* q = static_cast<const Element*>(p.q_gate.data) + b * p.q_gate.batch_stride +
                  i * p.q_gate.row_stride + head * p.q_gate.head_stride;
  const auto* k = static_cast<const Element*>(p.k_gate.data) + b * p.k_gate.batch_stride +
                  j * p.k_gate.row_stride + head / (p.heads_q / p.heads_k) * p.k_gate.head_stride;
  float score = 0.0f;
  for (int d = 0; d < p.gate_dim; ++d) score += float(q[d]) * float(k[d]);
  scores[at] = p.scale * score;
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

template <class Element>
void launch_pool_and_project(const PoolGateParams& p, int64_t blocks, int kinds, float* pooled,
                             float* out) {
  const int64_t inputs = p.batch * blocks * p.heads * p.head_dim;
  const int64_t outputs = p.batch * blocks * p.heads_out * p.gate_dim;
  pool_kernel<Element><<<blocks_for(inputs), kThreads>>>(p, blocks, kinds, pooled);
  project_kernel<Element>
      <<<blocks_for(outputs), kThreads>>>(p, blocks, kinds * p.head_dim, pooled, out);
}

}  // namespace

std::vector<float> reference_pool_gate(const PoolGateParams& p) {
  const int64_t blocks = ceil_div(p.rows, p.block), f32 = sizeof(float);
  const int kinds = __builtin_popcount(static_cast<unsigned>(p.pools));
  const DeviceBuffer pooled(f32 * p.batch * blocks * p.heads * kinds * p.head_dim);
  const DeviceBuffer out(f32 * p.batch * blocks * p.heads_out * p.gate_dim);
  if (p.dtype == DType::kBFloat16) {
    launch_pool_and_project<__nv_bfloat16>(p, blocks, kinds, pooled.as<float>(), out.as<float>());
  } else {
    launch_pool_and_project<__half>(p, blocks, kinds, pooled.as<float>(), out.as<float>());
  }
  const int64_t pairs = p.batch * blocks * p.heads_out * (p.rotary_dim / 2);
  if (pairs > 0) rope_kernel<<<blocks_for(pairs), kThreads>>>(p, blocks, out.as<float>());
  check(cudaGetLastError(), "launching the reference");
  return out.to_host<float>();
}

std::vector<float> reference_gate_scores(const GateScoresParams& p) {
  const int64_t count = int64_t{p.batch} * p.heads_q * p.blocks_q * p.blocks_kv;
  const DeviceBuffer scores(count * int64_t{sizeof(float)});
  if (p.dtype == DType::kBFloat16) {
    scores_kernel<__nv_bfloat16><<<blocks_for(count), kThreads>>>(p, scores.as<float>());
  } else {
    scores_kernel<__half><<<blocks_for(count), kThreads>>>(p, scores.as<float>());
  }
  check(cudaGetLastError(), "launching the reference");
  return scores.to_host<float>();
}

}  // namespace seer::bench
