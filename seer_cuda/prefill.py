# SPDX-License-Identifier: Apache-2.0
"""Prefill with a gate, in one call: gate, selection and block-sparse attention.

No host synchronisation and no shape that depends on data: a CUDA graph captures either function as
it is. Shapes come from the inputs, so a graph serves one length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from seer_cuda._contracts import check_gate_alignment
from seer_cuda._packed import Packed
from seer_cuda.block_mask import BlockMask
from seer_cuda.gate_ops import gate_select
from seer_cuda.ops import block_sparse_attn
from seer_cuda.select import Rule, check_rule

if TYPE_CHECKING:
    from seer_cuda.gate import AttnGate
    from seer_cuda.gate_cache import GateKeyCache

_DEFAULT = Rule()


def gate_mask(
    q: Tensor,
    k: Tensor | GateKeyCache,
    gate: AttnGate,
    select: Rule = _DEFAULT,
    positions: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_rows_q: int = 0,
    max_rows_kv: int = 0,
) -> BlockMask:
    """The blocks that a gate keeps, from q and k before RoPE (SeerAttention, Gao et al. 2024).

    Where the gate's dtype and sizes have CUDA kernels: one for pooling and projection of q and k
    together, then scores with selection. The score matrix is never in memory.

    Args:
        q: ``[batch, rows_q, heads_q, head_dim]``, before RoPE; bf16, fp16 or fp32. Weights are
            cast to its dtype on the way: keep the gate in that dtype to save it.
        k: ``[batch, rows_kv, heads_kv, head_dim]``, before RoPE, of q's dtype: the keys of the
            whole sequence so far, rows_kv >= rows_q. Or a `GateKeyCache` that holds them already.
        gate: The gate.
        select: The rule by which a row chooses its blocks.
        positions: Token positions, ``[rows]`` or ``[batch|1, rows]``: of the rows of k, the
            queries being the last of them; with a cache, of the rows of q. Default: 0, 1, 2, ...
        cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv: Packed sequences, as in
            `AttnGate.embed`; not with a `GateKeyCache`.

    Returns:
        A causal `BlockMask` ``[batch, heads_q, blocks_q, blocks_kv]`` with the gate's block size,
        packed with the block counts of max_rows. No gradient flows through it.

    The gate was trained on pooled blocks of queries. rows_q < block, a decode step above all, is
    outside of that distribution: the paper keeps decode dense, and so should the caller.

    Raises:
        ValueError: q, k or positions of another shape, rows_kv < rows_q, queries that do not
            start at a multiple of the block, one of cu_seqlens without the other, both with a
            cache, or a cache of another gate.
        TypeError: select is not a `Rule`.
        RuntimeError: refused by an op.
    """
    check_rule("gate_mask", "select", select)
    block = gate.config.block
    lengths = (cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv)
    packed = Packed.of("gate_mask", *lengths)
    with torch.no_grad():
        if packed is not None:
            if not isinstance(k, Tensor):
                raise ValueError(
                    "seer::gate_mask: cu_seqlens_q: expected none with a GateKeyCache, whose "
                    "sequences have one length, got packed sequences. Pass the packed keys."
                )
            rows_q, rows_kv = max_rows_q, max_rows_kv
            q_gate, k_gate = gate.embed(q, k, positions, **packed._asdict())
        elif isinstance(k, Tensor):
            rows_q, rows_kv = q.shape[1], k.shape[1]
            q_gate, k_gate = gate.embed(q, k, positions)
        else:
            if k.gate is not gate:
                raise ValueError(
                    "seer::gate_mask: gate: expected the gate of the cache k, got another one. "
                    "Make a cache for each gate."
                )
            rows_q, rows_kv, k_gate = q.shape[1], k.rows, k.keys
            first = rows_kv - rows_q
            if first < 0:
                raise ValueError(
                    f"seer::gate_mask: k: expected a cache of at least rows_q = {rows_q} rows, "
                    f"got {rows_kv}. Append the keys of these queries first."
                )
            check_gate_alignment("gate_mask", rows_q, rows_kv, block, block, "block")
            q_gate = gate.embed_q(q, positions, first=first)
        return gate_select(
            q_gate,
            k_gate,
            method=select.method,
            value=select.value,
            sink=select.sink,
            local=select.local,
            dense_last_rows=select.dense_last_rows,
            block_q=block,
            block_kv=block,
            rows_q=rows_q,
            rows_kv=rows_kv,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
        )


@overload
def sparse_prefill(
    q_rope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    q: Tensor,
    k: Tensor | GateKeyCache,
    gate: AttnGate,
    select: Rule = ...,
    *,
    positions: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_kv: Tensor | None = ...,
    max_rows_q: int = ...,
    max_rows_kv: int = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def sparse_prefill(
    q_rope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    q: Tensor,
    k: Tensor | GateKeyCache,
    gate: AttnGate,
    select: Rule = ...,
    *,
    positions: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_kv: Tensor | None = ...,
    max_rows_q: int = ...,
    max_rows_kv: int = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def sparse_prefill(
    q_rope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    q: Tensor,
    k: Tensor | GateKeyCache,
    gate: AttnGate,
    select: Rule = _DEFAULT,
    *,
    positions: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_rows_q: int = 0,
    max_rows_kv: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention over the blocks that the gate keeps: `gate_mask`, then `block_sparse_attn`.

    Args:
        q_rope: ``[batch, rows_q, heads_q, head_dim]``, after RoPE: what attention reads.
        k_rope: ``[batch, rows_kv, heads_kv, head_dim]``, after RoPE.
        v: Shape of k_rope.
        q, k, gate, select, positions: As in `gate_mask`; q and k before RoPE. With a
            `GateKeyCache` the old keys before RoPE need not be kept.
        cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv: Packed sequences, as in `gate_mask`
            and `block_sparse_attn`; q_rope, k_rope and v are packed too.
        scale: Softmax scale, default ``head_dim ** -0.5``.
        return_lse: Also return lse.

    Returns:
        out, shape and dtype of q_rope; with return_lse (out, lse), as `block_sparse_attn`. A row
        for which nothing is kept is 0 with lse -inf; ``Rule(local=1)`` keeps its own block.

    Raises:
        ValueError, TypeError: as `gate_mask`, or q_rope or k_rope of other lengths than q and k.
        RuntimeError: refused by an op.
        NotImplementedError: on backward; the attention is forward-only.
    """
    packed = Packed.of("sparse_prefill", cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv)
    lengths = {} if packed is None else packed._asdict()
    mask = gate_mask(q, k, gate, select, positions, **lengths)
    rank, lead = (4, "batch, ") if packed is None else (3, "")
    rows_q, rows_kv = (mask.rows_q, mask.rows_kv) if packed is None else (q.shape[0], k.shape[0])
    # block_sparse_attn compares numbers of blocks; other rows in the last one move the diagonal.
    for name, x, rows in (("q_rope", q_rope, rows_q), ("k_rope", k_rope, rows_kv)):
        if x.dim() != rank or x.shape[rank - 3] != rows:
            raise ValueError(
                f"seer::sparse_prefill: {name}: expected [{lead}{rows}, heads, head_dim], the "
                f"rows of {name[0]} before RoPE, got {list(x.shape)}. Pass the same tokens; cut a "
                "padded KV cache to them."
            )
    if return_lse:
        return block_sparse_attn(q_rope, k_rope, v, mask, scale=scale, return_lse=True, **lengths)
    return block_sparse_attn(q_rope, k_rope, v, mask, scale=scale, **lengths)


__all__ = ["gate_mask", "sparse_prefill"]
