# SPDX-License-Identifier: Apache-2.0
"""Shapes and dtypes of the ops without their data, for torch.compile, torch.export and meta.

Sizes may be symbolic: only arithmetic here, no comparison that would pin one down. Contracts are
checked by the ops themselves, at run time and in one place; only devices are compared here too,
because a call that mixes in a meta tensor ends up here and must not pass for a meta call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_cuda._gate_pooling import pool_count

_BITS_PER_WORD = 32


def _ceil_div(count: int, size: int) -> int:
    return (count + size - 1) // size


def same_device(op: str, name: str, first: Tensor, **others: Tensor | None) -> None:
    """RuntimeError unless the others are on the device of the first."""
    for other, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(
                f"seer::{op}: {other}: expected a tensor on {first.device} (the device of {name}), "
                f"got {tensor.device}. Move it with .to({name}.device)."
            )


def _lse(q: Tensor) -> Tensor:
    """fp32 ``[batch, heads_q, rows_q]``, packed ``[heads_q, total_q]``."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(shape, dtype=torch.float32)


def _blocks(
    q: Tensor, k: Tensor, block_q: int, block_kv: int, max_rows_q: int, max_rows_kv: int
) -> tuple[int, int]:
    packed = q.dim() == 3
    rows_q, rows_kv = (max_rows_q, max_rows_kv) if packed else (q.shape[1], k.shape[1])
    return _ceil_div(rows_q, block_q), _ceil_div(rows_kv, block_kv)


@torch.library.register_fake("seer::block_sparse_attn")
def _block_sparse_attn(
    q,
    k,
    v,
    block_bits=None,
    *,
    block_q=64,
    block_kv=64,
    causal=True,
    scale=None,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_rows_q=0,
    max_rows_kv=0,
):
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
    same_device("block_sparse_attn", "q", q, k=k, v=v, block_bits=block_bits, **lengths)
    return q.new_empty(q.shape), _lse(q)


@torch.library.register_fake("seer::attn_pool")
def _attn_pool(
    q,
    k,
    v,
    *,
    block_q=64,
    block_kv=64,
    causal=True,
    scale=None,
    per_token=False,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_rows_q=0,
    max_rows_kv=0,
    reduce=0,
):
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
    same_device("attn_pool", "q", q, k=k, v=v, **lengths)
    lse = _lse(q)
    blocks_q, blocks_kv = _blocks(q, k, block_q, block_kv, max_rows_q, max_rows_kv)
    if per_token:
        shape = (*lse.shape, blocks_kv)
    else:
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        shape = (batch, q.shape[-2], blocks_q, blocks_kv)
    return q.new_empty(q.shape), lse, q.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("seer::_attn_pool_backward")
def _attn_pool_backward(
    grad_out,
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_kv,
    *,
    causal,
    scale,
    max_rows_q,
    max_rows_kv,
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("seer::pool_gate")
def _pool_gate(
    x, weight=None, cos=None, sin=None, cu_seqlens=None, *, block=64, pools=4, max_rows=0
):
    same_device("pool_gate", "x", x, weight=weight, cos=cos, sin=sin, cu_seqlens=cu_seqlens)
    if cu_seqlens is None:
        batch, rows, heads, head_dim = x.shape
    else:
        _, heads, head_dim = x.shape
        batch, rows = cu_seqlens.shape[0] - 1, max_rows
    gate_dim = pool_count(pools) * head_dim
    if weight is not None:
        heads, gate_dim = weight.shape[0], weight.shape[2]
    return x.new_empty((batch, _ceil_div(rows, block), heads, gate_dim))


@torch.library.register_fake("seer::_pool_gate_pair")
def _pool_gate_pair(
    q,
    k,
    weight_q,
    weight_k,
    cos_q,
    sin_q,
    cos_k,
    sin_k,
    block_q,
    block_kv,
    pools_q,
    pools_k,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_rows_q=0,
    max_rows_kv=0,
):
    same_device("pool_gate", "q", q, k=k)
    at_q = {"block": block_q, "pools": pools_q, "max_rows": max_rows_q}
    at_k = {"block": block_kv, "pools": pools_k, "max_rows": max_rows_kv}
    return (
        _pool_gate(q, weight_q, cos_q, sin_q, cu_seqlens_q, **at_q),
        _pool_gate(k, weight_k, cos_k, sin_k, cu_seqlens_kv, **at_k),
    )


@torch.library.register_fake("seer::_pool_gate_backward")
def _pool_gate_backward(
    grad, x, weight, cos, sin, cu_seqlens, *, block, pools, max_rows, need_x, need_weight
):
    grad_x = x.new_empty(x.shape) if need_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape) if need_weight else x.new_empty(0)
    return grad_x, grad_weight


@torch.library.register_fake("seer::gate_scores")
def _gate_scores(
    q_gate,
    k_gate,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    *,
    scale=None,
    causal=True,
    block_q=64,
    block_kv=64,
):
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
    same_device("gate_scores", "q_gate", q_gate, k_gate=k_gate, **lengths)
    batch, blocks_q, heads_q, _ = q_gate.shape
    shape = (batch, heads_q, blocks_q, k_gate.shape[1])
    return q_gate.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("seer::gate_select")
def _gate_select(
    q_gate,
    k_gate,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    *,
    scale=None,
    causal=True,
    method=0,
    value=0.0,
    sink=0,
    local=0,
    dense_last_rows=0,
    block_q=64,
    block_kv=64,
):
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
    same_device("gate_select", "q_gate", q_gate, k_gate=k_gate, **lengths)
    batch, blocks_q, heads_q, _ = q_gate.shape
    words = _ceil_div(k_gate.shape[1], _BITS_PER_WORD)
    return q_gate.new_empty((batch, heads_q, blocks_q, words), dtype=torch.int32)


@torch.library.register_fake("seer::pack_block_bits")
def _pack_block_bits(mask):
    words = _ceil_div(mask.shape[-1], _BITS_PER_WORD)
    return mask.new_empty((*mask.shape[:-1], words), dtype=torch.int32)


@torch.library.register_fake("seer::unpack_block_bits")
def _unpack_block_bits(block_bits, blocks_kv):
    return block_bits.new_empty((*block_bits.shape[:-1], blocks_kv), dtype=torch.bool)


@torch.library.register_fake("seer::block_bits_from_indices")
def _block_bits_from_indices(indices, counts, blocks_kv):
    same_device("block_bits_from_indices", "indices", indices, counts=counts)
    words = _ceil_div(blocks_kv, _BITS_PER_WORD)
    return indices.new_empty((*indices.shape[:-1], words), dtype=torch.int32)
