// SPDX-License-Identifier: Apache-2.0
// The schemas of torch.ops.seer: the contract that other frameworks call. Layouts: q, k, v are
// [batch, rows, heads, head_dim] by strides with a contiguous last dimension, or packed
// [total, heads, head_dim] with cu_seqlens. Semantics: docs/design.md; errors: check.h.
#include <torch/csrc/stable/library.h>

#include "ops.h"

#define SEER_ATTN_TAIL "SymInt block_q=64, SymInt block_kv=64, bool causal=True, float? scale=None"
#define SEER_VARLEN_TAIL                                                         \
  "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_kv=None, SymInt max_rows_q=0, " \
  "SymInt max_rows_kv=0"
#define SEER_SPARSE_TAIL SEER_ATTN_TAIL ", " SEER_VARLEN_TAIL
#define SEER_SPARSE_ARGS \
  "(Tensor q, Tensor k, Tensor v, Tensor? block_bits=None, *, " SEER_SPARSE_TAIL
#define SEER_ATTN_POOL_ARGS                                                                       \
  "(Tensor q, Tensor k, Tensor v, *, " SEER_ATTN_TAIL ", bool per_token=False, " SEER_VARLEN_TAIL \
  ", int reduce=0"
// Tensors of the gate's ops are positional: torch.library.register_autograd wants them so.
#define SEER_POOL_GATE_ARGS                                                                 \
  "(Tensor x, Tensor? weight=None, Tensor? cos=None, Tensor? sin=None, Tensor? cu_seqlens=" \
  "None, *, SymInt block=64, int pools=4, SymInt max_rows=0)"
#define SEER_GATE_ARGS                                                                        \
  "(Tensor q_gate, Tensor k_gate, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_kv=None, *, " \
  "float? scale=None, bool causal=True"
#define SEER_GATE_BLOCKS ", SymInt block_q=64, SymInt block_kv=64)"
#define SEER_GATE_SCORES_ARGS SEER_GATE_ARGS SEER_GATE_BLOCKS
#define SEER_GATE_SELECT_ARGS                                               \
  SEER_GATE_ARGS                                                            \
  ", int method=0, float value=0.0, SymInt sink=0, SymInt local=0, SymInt " \
  "dense_last_rows=0" SEER_GATE_BLOCKS

STABLE_TORCH_LIBRARY(seer, m) {
  // Attention over the kept blocks; block_bits None keeps every block.
  m.def("block_sparse_attn" SEER_SPARSE_ARGS ") -> (Tensor out, Tensor lse)");
  // Dense attention and the block maxima (reduce 0) or shares (1) of its softmax probabilities, in
  // one pass.
  m.def("attn_pool" SEER_ATTN_POOL_ARGS ") -> (Tensor out, Tensor lse, Tensor pooled)");
  // Block pooling (pools: bit set of 1 max, 2 min, 4 avg), per-head projection, RoPE.
  m.def("pool_gate" SEER_POOL_GATE_ARGS " -> Tensor");
  // fp32 [batch, heads_q, blocks_q, blocks_kv]; -inf where not visible.
  m.def("gate_scores" SEER_GATE_SCORES_ARGS " -> Tensor");
  // Block bits; method 0 threshold, 1 top-k, 2 density, 3 top-p.
  m.def("gate_select" SEER_GATE_SELECT_ARGS " -> Tensor");
  // bool [..., blocks_kv] -> int32 [..., ceil(blocks_kv / 32)], and back.
  m.def("pack_block_bits(Tensor mask) -> Tensor");
  m.def("unpack_block_bits(Tensor block_bits, SymInt blocks_kv) -> Tensor");
  // int32 lists [..., capacity] with counts [...] -> block bits.
  m.def("block_bits_from_indices(Tensor indices, Tensor counts, SymInt blocks_kv) -> Tensor");
  // For tests and benchmarks: by the kernels of one family alone (80 or 90; 0: as above).
  m.def("_block_sparse_attn_on" SEER_SPARSE_ARGS ", int arch=0) -> (Tensor out, Tensor lse)");
  m.def("_attn_pool_on" SEER_ATTN_POOL_ARGS
        ", int arch=0) -> (Tensor out, Tensor lse, Tensor pooled)");
  // pool_gate of q and k, in one launch where a kernel serves both.
  m.def(
      "_pool_gate_pair(Tensor q, Tensor k, Tensor? weight_q, Tensor? weight_k, Tensor? cos_q, "
      "Tensor? sin_q, Tensor? cos_k, Tensor? sin_k, SymInt block_q, SymInt block_kv, int pools_q, "
      "int pools_k, " SEER_VARLEN_TAIL ") -> (Tensor q_gate, Tensor k_gate)");
  // Ops as torch operations, for what no compiled CUDA kernel serves. Implemented in Python.
  m.def("_attn_pool_torch" SEER_ATTN_POOL_ARGS ") -> (Tensor out, Tensor lse, Tensor pooled)");
  m.def("_pool_gate_torch" SEER_POOL_GATE_ARGS " -> Tensor");
  m.def("_gate_scores_torch" SEER_GATE_SCORES_ARGS " -> Tensor");
  m.def("_gate_select_torch" SEER_GATE_SELECT_ARGS " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seer, CPU, m) {
  m.impl("block_sparse_attn", TORCH_BOX(&seer::binding::block_sparse_attn));
  m.impl("_block_sparse_attn_on", TORCH_BOX(&seer::binding::block_sparse_attn_on));
  m.impl("attn_pool", TORCH_BOX(&seer::binding::attn_pool));
  m.impl("_attn_pool_on", TORCH_BOX(&seer::binding::attn_pool_on));
  m.impl("pool_gate", TORCH_BOX(&seer::binding::pool_gate));
  m.impl("_pool_gate_pair", TORCH_BOX(&seer::binding::pool_gate_pair));
  m.impl("gate_scores", TORCH_BOX(&seer::binding::gate_scores));
  m.impl("gate_select", TORCH_BOX(&seer::binding::gate_select));
  m.impl("pack_block_bits", TORCH_BOX(&seer::binding::pack_block_bits));
  m.impl("unpack_block_bits", TORCH_BOX(&seer::binding::unpack_block_bits));
  m.impl("block_bits_from_indices", TORCH_BOX(&seer::binding::block_bits_from_indices));
}

STABLE_TORCH_LIBRARY_IMPL(seer, CUDA, m) {
  m.impl("attn_pool", TORCH_BOX(&seer::binding::attn_pool));
  m.impl("_attn_pool_on", TORCH_BOX(&seer::binding::attn_pool_on));
  m.impl("block_sparse_attn", TORCH_BOX(&seer::binding::block_sparse_attn));
  m.impl("_block_sparse_attn_on", TORCH_BOX(&seer::binding::block_sparse_attn_on));
  m.impl("pool_gate", TORCH_BOX(&seer::binding::pool_gate));
  m.impl("_pool_gate_pair", TORCH_BOX(&seer::binding::pool_gate_pair));
  m.impl("gate_scores", TORCH_BOX(&seer::binding::gate_scores));
  m.impl("gate_select", TORCH_BOX(&seer::binding::gate_select));
  m.impl("pack_block_bits", TORCH_BOX(&seer::binding::pack_block_bits));
  m.impl("unpack_block_bits", TORCH_BOX(&seer::binding::unpack_block_bits));
  m.impl("block_bits_from_indices", TORCH_BOX(&seer::binding::block_bits_from_indices));
}
