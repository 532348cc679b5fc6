# SPDX-License-Identifier: Apache-2.0
"""Block pooling in torch operators, and its gradient. Nothing here reads a value on the host."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from seer_cuda import _gate_packed
from seer_cuda._attn_math import accumulation_dtype

POOL_MAX, POOL_MIN, POOL_AVG = 1, 2, 4


def pool_count(pools: int) -> int:
    """How many poolings the bit set names."""
    return sum(1 for pool in (POOL_MAX, POOL_MIN, POOL_AVG) if pools & pool)


def _block_groups(x: Tensor, block: int) -> Iterator[Tensor]:
    """Views ``[batch, n, size, heads, head_dim]``: the whole blocks, then the ragged last one."""
    whole = x.shape[1] // block
    if whole:
        yield x[:, : whole * block].unflatten(1, (whole, block))
    if x.shape[1] % block:
        yield x[:, whole * block :].unsqueeze(1)


def _pool(tokens: Tensor, pools: int) -> Tensor:
    """max | min | avg over dimension 2, concatenated on the last one, in tokens' dtype."""
    kinds = []
    if pools & POOL_MAX:
        kinds.append(tokens.amax(2))
    if pools & POOL_MIN:
        kinds.append(tokens.amin(2))
    if pools & POOL_AVG:
        total = tokens.sum(2, dtype=accumulation_dtype(tokens.dtype))
        kinds.append((total / tokens.shape[2]).to(tokens.dtype))
    return torch.cat(kinds, -1)


def pool_blocks(x: Tensor, block: int, pools: int) -> Tensor:
    """``[batch, blocks, heads, n_pools * head_dim]`` of x's dtype; the last block may be short."""
    groups = [_pool(tokens, pools) for tokens in _block_groups(x, block)]
    if groups:
        return torch.cat(groups, 1)
    return x.new_zeros(x.shape[0], 0, x.shape[2], pool_count(pools) * x.shape[3])


def pool_blocks_backward(grad: Tensor, x: Tensor, block: int, pools: int) -> Tensor:
    """Gradient of `pool_blocks` in x's dtype: max and min to the first element that attains it.

    One write of the result; beside it only block-sized tensors exist, and x is read for max and
    min alone. A block has one winner per channel, so scattering cannot collide: deterministic.
    """
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    start = 0
    for tokens, out in zip(_block_groups(x, block), _block_groups(result, block), strict=True):
        stop = start + tokens.shape[1]
        parts = list(grad[:, start:stop].unsqueeze(2).split(x.shape[3], dim=-1))
        start = stop
        winners = []
        if pools & POOL_MAX:
            winners.append((tokens.argmax(2, keepdim=True), parts.pop(0)))
        if pools & POOL_MIN:
            winners.append((tokens.argmin(2, keepdim=True), parts.pop(0)))
        shared = parts[0] / tokens.shape[2] if pools & POOL_AVG else grad.new_zeros(())
        out.copy_(shared.expand_as(out))
        for at, _ in winners:
            # Maximum and minimum may be one token. All it gets is summed before it is rounded.
            total = shared + sum(share.where(other == at, 0) for other, share in winners)
            out.scatter_(2, at, total.to(x.dtype))
    return result


def pooled(x: Tensor, cu_seqlens: Tensor | None, block: int, pools: int, max_rows: int) -> Tensor:
    """`pool_blocks` of a batch, or of packed sequences."""
    if cu_seqlens is None:
        return pool_blocks(x, block, pools)
    packing = _gate_packed.Packing.of(cu_seqlens, x.shape[0], max_rows, block)
    return _gate_packed.pool_blocks(x, packing, pools)


def pooled_backward(
    grad: Tensor, x: Tensor, cu_seqlens: Tensor | None, block: int, pools: int, max_rows: int
) -> Tensor:
    """Its gradient."""
    if cu_seqlens is None:
        return pool_blocks_backward(grad, x, block, pools)
    packing = _gate_packed.Packing.of(cu_seqlens, x.shape[0], max_rows, block)
    return _gate_packed.pool_blocks_backward(grad, x, packing, pools)
