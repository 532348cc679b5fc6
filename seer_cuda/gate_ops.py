# SPDX-License-Identifier: Apache-2.0
"""The gate: public functions over ``torch.ops.seer``. Layouts and errors: `seer_cuda.ops`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from seer_cuda._contracts import check_block, check_gate_alignment, rows_of_blocks
from seer_cuda._gate_pooling import POOL_AVG, POOL_MAX, POOL_MIN
from seer_cuda.block_mask import BlockMask
from seer_cuda.select import Method, resolve_method

#: Poolings in the order of their channels, and their bits in ``torch.ops.seer.pool_gate``.
POOLS: dict[str, int] = {"max": POOL_MAX, "min": POOL_MIN, "avg": POOL_AVG}


def pool_bits(pools: str | Iterable[str] | int) -> int:
    """The bit set of pooling names: 1 max, 2 min, 4 avg.

    Args:
        pools: ``"avg"``, names run together as the checkpoints do (``"maxminavg"``), names in any
            order (``["max", "avg"]``), or the bit set itself, 1 to 7.

    Raises:
        ValueError: an unknown or repeated name, no name at all, or an int outside 1 to 7.
        TypeError: neither names nor an int.
    """
    remedy = "Name any of max, min, avg."
    if isinstance(pools, int) and not isinstance(pools, bool):
        if not 1 <= pools <= 7:
            raise ValueError(f"seer::pool_gate: pools: expected 1 to 7, got {pools}. {remedy}")
        return pools
    if isinstance(pools, str):
        names = [pools[at : at + 3] for at in range(0, len(pools), 3)]
    elif isinstance(pools, Iterable):
        names = list(pools)
    else:
        kind = type(pools).__name__
        raise TypeError(f"seer::pool_gate: pools: expected pooling names, got {kind}. {remedy}")
    if not names or len(set(names)) != len(names) or not set(names) <= set(POOLS):
        raise ValueError(
            f"seer::pool_gate: pools: expected each of max, min, avg at most once, got {pools!r}. "
            f"{remedy}"
        )
    return sum(POOLS[name] for name in names)


def pool_gate(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    block: int = 64,
    pools: str | Iterable[str] | int = "avg",
    cu_seqlens: Tensor | None = None,
    max_rows: int = 0,
) -> Tensor:
    """Gate embedding of every block of q or k: pooling, per-head projection, RoPE, in one pass.

    ``y[n, h] = rope_n(concat(max, min, avg of x over block n) @ weight[h])`` (SeerAttention,
    section 3.1), with those of the three poolings that `pools` names, always in this order. The
    last block pools the tokens that exist.

    Args:
        x: ``[batch, rows, heads, head_dim]``, bf16, fp16 or fp32: q or k before RoPE. Packed
            ``[total, heads, head_dim]``.
        weight: ``[heads_out, n_pools * head_dim, gate_dim]`` of x's dtype, heads_out a multiple of
            heads (output head h reads input head ``h // (heads_out / heads)``). None: the pooled
            values themselves, gate_dim = n_pools * head_dim.
        cos: fp32 ``[blocks, w]`` or ``[batch|1, blocks, w]`` at each block's first token, 2w <=
            gate_dim: channels [0, 2w) rotate, channel c paired with c + w. With sin, or neither.
        sin: Shape of cos. Neither is differentiable.
        block: Tokens per block.
        pools: ``"avg"``, ``"maxminavg"``, ``["max", "avg"]`` or the bit set 1 max | 2 min | 4 avg.
        cu_seqlens: int32 ``[batch + 1]`` on x's device, for packed x: sequence n is rows ``cu[n]``
            to ``cu[n + 1]``; its blocks, and so the tables' rows, count from its own start.
        max_rows: Longest sequence; needed with cu_seqlens, and rows in their place. Blocks past
            the end of a shorter sequence are 0.

    Returns:
        ``[batch, ceil(rows / block), heads_out, gate_dim]`` of x's dtype. Products and RoPE in
        fp32, pooled values rounded to x's dtype before the product, one rounding at the end.

    Differentiable in x and weight, in reverse mode only: forward mode drops tangents. max and min
    pass the gradient to the first element that attains them.

    Raises:
        ValueError, TypeError: pools.
        NotImplementedError: cos or sin require a gradient.
        RuntimeError: refused by the op.
    """
    return torch.ops.seer.pool_gate(
        x, weight, cos, sin, cu_seqlens, block=block, pools=pool_bits(pools), max_rows=max_rows
    )


def gate_scores(
    q_gate: Tensor,
    k_gate: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    block_q: int = 64,
    block_kv: int = 64,
) -> Tensor:
    """Scores of every (query block, KV block) pair, for training and for looking at them.

    ``A[h, i, j] = scale q_gate[i, h] . k_gate[j, h // (heads_q / heads_k)]``

    Args:
        q_gate: ``[batch, blocks_q, heads_q, gate_dim]``, from `pool_gate`.
        k_gate: ``[batch, blocks_kv, heads_k, gate_dim]`` of q_gate's dtype; heads_k divides
            heads_q.
        scale: Default ``gate_dim ** -0.5``.
        causal: Block i sees block j iff ``j <= i + blocks_kv - blocks_q``. This is the rule on
            tokens only for equal blocks of q and KV and rows_kv - rows_q a multiple of the block.
        cu_seqlens_q, cu_seqlens_kv: int32 ``[batch + 1]``, both or neither: the packed sequences
            that `pool_gate` embedded. Each has its own ceil(length / block) blocks: causal counts
            those, and nothing is visible past them.
        block_q, block_kv: Tokens per block, for cu_seqlens alone.

    Returns:
        fp32 ``[batch, heads_q, blocks_q, blocks_kv]``, -inf where not visible. Differentiable in
        both embeddings, in reverse mode only: forward mode drops tangents; the gradient of a
        hidden score is dropped.

    Raises:
        RuntimeError: refused by the op.
    """
    options = {"scale": scale, "causal": causal, "block_q": block_q, "block_kv": block_kv}
    return torch.ops.seer.gate_scores(q_gate, k_gate, cu_seqlens_q, cu_seqlens_kv, **options)


def gate_select(
    q_gate: Tensor,
    k_gate: Tensor,
    *,
    method: Method = "threshold",
    value: float,
    scale: float | None = None,
    causal: bool = True,
    sink: int = 0,
    local: int = 0,
    dense_last_rows: int = 0,
    block_q: int = 64,
    block_kv: int = 64,
    rows_q: int | None = None,
    rows_kv: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
) -> BlockMask:
    """From gate embeddings straight to a block mask; the score matrix is never kept in memory.

    Args:
        q_gate, k_gate, scale, causal: As in `gate_scores`.
        method: How a row chooses among its visible blocks, by fp32 score, ties to the lower index:
            ``"threshold"`` softmax probability > value; ``"topk"`` the int(value) best;
            ``"density"`` the k best, k = max(1, floor((1 - sqrt(1 - value)) * blocks_kv)), which
            keeps about `value` of the causal triangle; ``"topp"`` the smallest set of best blocks
            whose softmax mass reaches value, at least one.
        value: The parameter of the method.
        sink: First blocks that every row keeps besides, where visible.
        local: Last visible blocks that every row keeps besides; 1 is the diagonal.
        dense_last_rows: Last query-block rows that keep every visible block (the reference
            implementation's `last_block_dense` is 2).
        block_q, block_kv: Tokens per block, noted in the mask; equal with causal.
        rows_q, rows_kv: Tokens, noted in the mask; default: whole blocks. With causal, rows_kv -
            rows_q is a multiple of the block: start chunks at multiples of the block.
        cu_seqlens_q, cu_seqlens_kv: Packed sequences, as in `gate_scores`; rows_q and rows_kv are
            those of the longest. density counts the blocks of each sequence, dense_last_rows are
            the last rows of each; rows and bits past a sequence are 0. That the queries of each
            start at a multiple of the block is up to the caller: their lengths are not read.

    Returns:
        A `BlockMask` ``[batch, heads_q, blocks_q, blocks_kv]``. It never keeps a block that the
        causal rule hides, nor a NaN score except by sink, local or dense_last_rows.

    Raises:
        ValueError: unknown method, value out of its range, a block size below 1, lengths that do
            not fit the blocks, or with causal unequal blocks or rows_kv - rows_q that is no
            multiple of the block.
        TypeError: value is not a number.
        RuntimeError: refused by the op.
    """
    number, value = resolve_method("gate_select", method, value)
    check_block("gate_select", "block_q", block_q)
    check_block("gate_select", "block_kv", block_kv)
    blocks_q, blocks_kv = q_gate.shape[1], k_gate.shape[1]
    rows_q = rows_of_blocks("gate_select", "rows_q", rows_q, block_q, blocks_q)
    rows_kv = rows_of_blocks("gate_select", "rows_kv", rows_kv, block_kv, blocks_kv)
    if causal:
        # The longest query and the longest KV sequence may be two.
        rows = (rows_q, rows_kv) if cu_seqlens_q is None else (0, 0)
        check_gate_alignment("gate_select", *rows, block_q, block_kv, "block_q, block_kv")
    bits = torch.ops.seer.gate_select(
        q_gate,
        k_gate,
        cu_seqlens_q,
        cu_seqlens_kv,
        scale=scale,
        causal=causal,
        method=number,
        value=value,
        sink=sink,
        local=local,
        dense_last_rows=dense_last_rows,
        block_q=block_q,
        block_kv=block_kv,
    )
    return BlockMask(bits, block_q, block_kv, rows_q, rows_kv, causal, cu_seqlens_q, cu_seqlens_kv)
