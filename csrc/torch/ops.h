// SPDX-License-Identifier: Apache-2.0
// The functions behind torch.ops.seer. Argument order is that of the schemas in library.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace seer::binding {

using torch::stable::Tensor;

// CPU and CUDA.
std::tuple<Tensor, Tensor> block_sparse_attn(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const std::optional<Tensor>& block_bits,
                                             int64_t block_q, int64_t block_kv, bool causal,
                                             std::optional<double> scale,
                                             const std::optional<Tensor>& cu_seqlens_q,
                                             const std::optional<Tensor>& cu_seqlens_kv,
                                             int64_t max_rows_q, int64_t max_rows_kv);
std::tuple<Tensor, Tensor> block_sparse_attn_on(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& block_bits,
    int64_t block_q, int64_t block_kv, bool causal, std::optional<double> scale,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_kv,
    int64_t max_rows_q, int64_t max_rows_kv, int64_t arch);
std::tuple<Tensor, Tensor, Tensor> attn_pool(const Tensor& q, const Tensor& k, const Tensor& v,
                                             int64_t block_q, int64_t block_kv, bool causal,
                                             std::optional<double> scale, bool per_token,
                                             const std::optional<Tensor>& cu_seqlens_q,
                                             const std::optional<Tensor>& cu_seqlens_kv,
                                             int64_t max_rows_q, int64_t max_rows_kv,
                                             int64_t reduce);
std::tuple<Tensor, Tensor, Tensor> attn_pool_on(const Tensor& q, const Tensor& k, const Tensor& v,
                                                int64_t block_q, int64_t block_kv, bool causal,
                                                std::optional<double> scale, bool per_token,
                                                const std::optional<Tensor>& cu_seqlens_q,
                                                const std::optional<Tensor>& cu_seqlens_kv,
                                                int64_t max_rows_q, int64_t max_rows_kv,
                                                int64_t reduce, int64_t arch);
Tensor pool_gate(const Tensor& x, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 const std::optional<Tensor>& cu_seqlens, int64_t block, int64_t pools,
                 int64_t max_rows);
std::tuple<Tensor, Tensor> pool_gate_pair(
    const Tensor& q, const Tensor& k, const std::optional<Tensor>& weight_q,
    const std::optional<Tensor>& weight_k, const std::optional<Tensor>& cos_q,
    const std::optional<Tensor>& sin_q, const std::optional<Tensor>& cos_k,
    const std::optional<Tensor>& sin_k, int64_t block_q, int64_t block_kv, int64_t pools_q,
    int64_t pools_k, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_kv, int64_t max_rows_q, int64_t max_rows_kv);
Tensor gate_scores(const Tensor& q_gate, const Tensor& k_gate,
                   const std::optional<Tensor>& cu_seqlens_q,
                   const std::optional<Tensor>& cu_seqlens_kv, std::optional<double> scale,
                   bool causal, int64_t block_q, int64_t block_kv);
Tensor gate_select(const Tensor& q_gate, const Tensor& k_gate,
                   const std::optional<Tensor>& cu_seqlens_q,
                   const std::optional<Tensor>& cu_seqlens_kv, std::optional<double> scale,
                   bool causal, int64_t method, double value, int64_t sink, int64_t local,
                   int64_t dense_last_rows, int64_t block_q, int64_t block_kv);
Tensor pack_block_bits(const Tensor& mask);
Tensor unpack_block_bits(const Tensor& block_bits, int64_t blocks_kv);
Tensor block_bits_from_indices(const Tensor& indices, const Tensor& counts, int64_t blocks_kv);

// What gate_scores and gate_select have in common.
struct GateArgs {
  const Tensor &q_gate, &k_gate;
  const std::optional<Tensor>&cu_seqlens_q, &cu_seqlens_kv;
  std::optional<double> scale;
  bool causal;
  int64_t block_q, block_kv;
};

// Argument checks alone.
void check_pool_gate(const Tensor& x, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                     const std::optional<Tensor>& cu_seqlens, int64_t block, int64_t pools,
                     int64_t max_rows);
void check_gate_scores(const GateArgs& args);
void check_gate_select(const GateArgs& args, int64_t method, double value, int64_t sink,
                       int64_t local, int64_t dense_last_rows);

}  // namespace seer::binding
