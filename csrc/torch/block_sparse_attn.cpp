// SPDX-License-Identifier: Apache-2.0
#include "seer/block_sparse_attn.h"

#include <tuple>

#include "attention_args.h"
#include "ops.h"
#include "runtime.h"

namespace seer::binding {
namespace {

constexpr Op kOp{"block_sparse_attn"};

BlockBitsView block_bits_view(const Tensor& bits) {
  BlockBitsView view;
  view.data = bits.const_data_ptr<int32_t>();
  view.heads = static_cast<int>(bits.size(1));
  view.batch_stride = bits.size(0) == 1 ? 0 : bits.stride(0);
  view.head_stride = bits.stride(1);
  view.row_stride = bits.stride(2);
  view.words = static_cast<int>(bits.size(3));
  return view;
}

}  // namespace

std::tuple<Tensor, Tensor> block_sparse_attn_on(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& block_bits,
    int64_t block_q, int64_t block_kv, bool causal, std::optional<double> scale,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_kv,
    int64_t max_rows_q, int64_t max_rows_kv, int64_t arch) {
  const AttentionArgs args{
      q,          k,          v, block_q, block_kv, causal, scale, cu_seqlens_q, cu_seqlens_kv,
      max_rows_q, max_rows_kv};
  check_attention(kOp, args);
  if (block_bits) check_block_bits(kOp, *block_bits, args);

  // On CUDA the kernel's workspace lies behind lse, in the same allocation.
  constexpr int64_t kTail = kBlockSparseAttnWorkspaceBytes / int64_t{sizeof(float)};
  const bool cuda = q.is_cuda();
  Tensor out = empty_out(args), lse = empty_lse(args, cuda ? kTail : 0);
  auto params = attention_params<BlockSparseAttnParams>(kOp, args, out, lse);
  if (block_bits) params.block_bits = block_bits_view(*block_bits);
  if (cuda) {
    params.arch = static_cast<int>(arch);
    params.workspace = reinterpret_cast<int32_t*>(params.lse + lse.numel());
    CudaScope scope(q);
    kOp.ok(launch_block_sparse_attn(params, scope.stream()));
  } else {
    kOp.ok(block_sparse_attn_cpu(params, torch_parallel_for()));
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor> block_sparse_attn(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const std::optional<Tensor>& block_bits,
                                             int64_t block_q, int64_t block_kv, bool causal,
                                             std::optional<double> scale,
                                             const std::optional<Tensor>& cu_seqlens_q,
                                             const std::optional<Tensor>& cu_seqlens_kv,
                                             int64_t max_rows_q, int64_t max_rows_kv) {
  return block_sparse_attn_on(q, k, v, block_bits, block_q, block_kv, causal, scale, cu_seqlens_q,
                              cu_seqlens_kv, max_rows_q, max_rows_kv, 0);
}

}  // namespace seer::binding
