# SPDX-License-Identifier: Apache-2.0
"""Attention: public functions over ``torch.ops.seer``. Those of the gate are in `gate_ops`.

Layout: ``[batch, rows, heads, head_dim]`` by strides with a contiguous last dimension, so a
transposed ``[batch, heads, rows, head_dim]`` view is taken as it is; or packed sequences ``[total,
heads, head_dim]`` with cu_seqlens. Words: query head h reads KV head ``h // (heads_q /
heads_kv)``; blocks_q = ceil(rows_q / block_q), blocks_kv likewise; causal is bottom-right aligned,
query r sees keys ``c <= r + rows_kv - rows_q``.

All functions run on the current stream without a host synchronisation, are deterministic, and work
under CUDA graphs, torch.compile and torch.export. Mistakes that only Python can see raise TypeError
or ValueError; all others are refused by the op with a RuntimeError before any work. Both read
``seer::<op>: <argument>: expected <contract>, got <actual>. <what to do>``.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from seer_cuda._autograd import may_skip_autograd
from seer_cuda._contracts import agree, check_mask_lengths
from seer_cuda.block_mask import BlockMask

#: What `attn_pool` makes of a block's probabilities: names and the op's numbers.
REDUCTIONS: dict[str, int] = {"max": 0, "sum": 1}

Reduce = Literal["max", "sum"]


@overload
def block_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | Tensor | None = ...,
    *,
    block_q: int | None = ...,
    block_kv: int | None = ...,
    causal: bool | None = ...,
    scale: float | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_kv: Tensor | None = ...,
    max_rows_q: int = ...,
    max_rows_kv: int = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def block_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | Tensor | None = ...,
    *,
    block_q: int | None = ...,
    block_kv: int | None = ...,
    causal: bool | None = ...,
    scale: float | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_kv: Tensor | None = ...,
    max_rows_q: int = ...,
    max_rows_kv: int = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def block_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | Tensor | None = None,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    causal: bool | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_rows_q: int = 0,
    max_rows_kv: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the kept blocks (block-sparse FlashAttention-2 forward).

    ``out[r] = sum_c softmax_c(scale q_r . k_c) v_c`` over the keys c that are visible to r and
    whose block is kept.

    Args:
        q: bf16 or fp16 (on the CPU also fp32) ``[batch, rows_q, heads_q, head_dim]``, packed
            ``[total_q, heads_q, head_dim]``.
        k: ``[batch, rows_kv, heads_kv, head_dim]``, packed ``[total_kv, heads_kv, head_dim]``;
            heads_kv divides heads_q.
        v: Shape of k, any strides.
        mask: `BlockMask`, or its raw bits: int32 ``[batch|1, heads_q|heads_kv|1, blocks_q, words
            >= ceil(blocks_kv / 32)]``; None keeps every block. Packed sequences: blocks count from
            each sequence's own start.
        block_q: Tokens per query block: 64 or 128 (CPU also 16, 32). Default: the mask's, else 64.
        block_kv: Tokens per KV block, likewise.
        causal: Default: the mask's, else True.
        scale: Softmax scale, default ``head_dim ** -0.5``.
        cu_seqlens_q: int32 ``[batch + 1]`` on q's device: sequence n is rows ``cu[n]`` to ``cu[n
            + 1]``. Both or neither.
        cu_seqlens_kv: The same for k and v.
        max_rows_q: Longest query sequence; needed with cu_seqlens (default: the mask's rows_q).
        max_rows_kv: Longest KV sequence, likewise.
        return_lse: Also return lse.

    Returns:
        out, q's dtype and shape, contiguous; with return_lse (out, lse), lse fp32 ``[batch,
        heads_q, rows_q]`` (packed ``[heads_q, total_q]``), the natural logarithm of the sum of
        exponentials. A row with nothing to attend to: out 0, lse -inf. NaN or Inf in blocks that
        are not kept never reach out.

    Raises:
        TypeError: mask is neither a BlockMask nor a tensor.
        ValueError: block_q, block_kv or causal differ from the BlockMask's, or its block counts
            from those of q and k, or packed q with a BlockMask but no cu_seqlens_q.
        RuntimeError: refused by the op.
        NotImplementedError: on backward; the op is forward-only.
    """
    bits: Tensor | None
    if isinstance(mask, BlockMask):
        block_q = agree("block_q", block_q, mask.block_q)
        block_kv = agree("block_kv", block_kv, mask.block_kv)
        causal = agree("causal", causal, mask.causal)
        packed_rows = None
        if cu_seqlens_q is not None:
            max_rows_q, max_rows_kv = max_rows_q or mask.rows_q, max_rows_kv or mask.rows_kv
            packed_rows = (max_rows_q, max_rows_kv)
        check_mask_lengths(mask, q, k, packed_rows)
        bits = mask.block_bits
    elif mask is None or isinstance(mask, Tensor):
        bits = mask
    else:
        raise TypeError(
            "seer::block_sparse_attn: mask: expected a BlockMask, int32 block bits or None, got "
            f"{type(mask).__name__}. Build one with BlockMask.from_dense."
        )
    # Host time counts in short calls: a keyword costs 0.3 us, so defaults are left out, and the
    # Python kernel at the Autograd key 4 us.
    options: dict[str, Any] = {}
    if block_q is not None and block_q != 64:
        options["block_q"] = block_q
    if block_kv is not None and block_kv != 64:
        options["block_kv"] = block_kv
    if causal is not None and not causal:
        options["causal"] = causal
    if scale is not None:
        options["scale"] = scale
    if cu_seqlens_q is not None or cu_seqlens_kv is not None:
        options["cu_seqlens_q"], options["cu_seqlens_kv"] = cu_seqlens_q, cu_seqlens_kv
        options["max_rows_q"], options["max_rows_kv"] = max_rows_q, max_rows_kv
    if may_skip_autograd(q, k, v):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.seer.block_sparse_attn(q, k, v, bits, **options)
    else:
        out, lse = torch.ops.seer.block_sparse_attn(q, k, v, bits, **options)
    return (out, lse) if return_lse else out


def attn_pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_q: int = 64,
    block_kv: int = 64,
    causal: bool = True,
    scale: float | None = None,
    per_token: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_rows_q: int = 0,
    max_rows_kv: int = 0,
    reduce: Reduce = "max",
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention and the block maxima of its probabilities: what a gate is distilled from.

    ``pooled[i, j] = max P[r, c]`` over the rows r of query block i and the visible columns c of KV
    block j, with P the softmax probabilities (SeerAttention, Gao et al. 2024, section 3.2).
    To look at a map, see `seer_cuda.attention_map`.

    Args:
        q, k, v, scale, causal, cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv: As in
            `block_sparse_attn` without a mask.
        block_q, block_kv: Tokens per block: 64 or 128 (CPU also 16, 32).
        per_token: Keep every query row: ``pooled[r, j] = max_c P[r, c]`` (SeerAttention-R).
        reduce: ``"max"``; or ``"sum"``, the attention that a block receives: the sum over its
            columns, averaged over those rows of the query block that exist. Each row of blocks
            then adds up to 1 (if all of its rows see something). The CUDA kernels round 2-D sums
            to multiples of 2^-23.

    Returns:
        (out, lse, pooled): out and lse as in `block_sparse_attn`; pooled fp32 ``[batch, heads_q,
        blocks_q, blocks_kv]``, per_token ``[batch, heads_q, rows_q, blocks_kv]`` (packed
        ``[heads_q, total_q, blocks_kv]``), not normalised (see `seer_cuda.distill`), exactly 0
        where nothing is visible. Packed maps have the block counts of the longest sequence and
        are 0 past a shorter one.

    Differentiable in q, k and v through out, in reverse mode only: forward mode drops tangents.
    lse and pooled are targets, not part of the graph: requires_grad is False on both.

    Raises:
        ValueError: reduce is neither of the two.
        RuntimeError: refused by the op.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(
            f"seer::attn_pool: reduce: expected one of {', '.join(REDUCTIONS)}, got {reduce!r}. "
            "Choose one."
        )
    return torch.ops.seer.attn_pool(
        q,
        k,
        v,
        block_q=block_q,
        block_kv=block_kv,
        causal=causal,
        scale=scale,
        per_token=per_token,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        max_rows_q=max_rows_q,
        max_rows_kv=max_rows_kv,
        reduce=REDUCTIONS[reduce],
    )
