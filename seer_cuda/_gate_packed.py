# SPDX-License-Identifier: Apache-2.0
"""Packed sequences for `_gate_math`: pooling ``[total, heads, head_dim]`` block by block, and which
blocks of a padded batch exist and see each other.

Blocks count from each sequence's own start. Nothing reads a value on the host: every shape follows
from the batch and from max_rows. Sequences are cut to [0, total) and to max_rows, so that wrong
cu_seqlens give wrong numbers but reach nothing outside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seer_cuda._attn_math import accumulation_dtype


class Packing(NamedTuple):
    """Where the sequences lie, int64 ``[batch]``, and how their blocks are cut."""

    start: Tensor
    rows: Tensor
    block: int
    blocks: int  # of the padded batch

    @classmethod
    def of(cls, cu_seqlens: Tensor, total: int, max_rows: int, block: int) -> Packing:
        edge = cu_seqlens.to(torch.int64).clamp(0, total)
        rows = (edge[1:] - edge[:-1]).clamp(0, max_rows)
        return cls(edge[:-1], rows, block, -(-max_rows // block))

    def block_rows(self) -> Tensor:
        """int64 ``[batch, blocks]``: the tokens of every block, 0 past the sequence."""
        first = torch.arange(self.blocks, device=self.rows.device) * self.block
        return (self.rows[:, None] - first).clamp(0, self.block)

    def by_block(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[batch, blocks, block, heads, head_dim]`` of packed x, and which of it are tokens."""
        slot = torch.arange(self.blocks * self.block, device=x.device).view(self.blocks, self.block)
        token = slot < self.rows[:, None, None]
        at = (self.start[:, None, None] + slot).clamp_max(x.shape[0] - 1)
        return x[at], token[..., None, None]


def _extremes(x: Tensor, packing: Packing, lowest: bool) -> Tensor:
    """by_block(x) with what is no token filled up so that no maximum (minimum) falls on it."""
    tokens, exists = packing.by_block(x)
    return tokens.masked_fill(~exists, torch.inf if lowest else -torch.inf)


def pool_blocks(x: Tensor, packing: Packing, pools: int) -> Tensor:
    """max | min | avg, those of the bit set: ``[batch, blocks, heads, n * head_dim]``."""
    count = packing.block_rows()[..., None, None]
    shape = (*count.shape[:2], x.shape[1], x.shape[2] * pools.bit_count())
    if not x.numel():
        return x.new_zeros(shape)
    kinds = []
    if pools & 1:
        kinds.append(_extremes(x, packing, lowest=False).amax(2))
    if pools & 2:
        kinds.append(_extremes(x, packing, lowest=True).amin(2))
    if pools & 4:
        tokens, exists = packing.by_block(x)
        total = tokens.masked_fill(~exists, 0).sum(2, dtype=accumulation_dtype(x.dtype))
        kinds.append((total / count.clamp_min(1)).to(x.dtype))
    return torch.cat(kinds, -1).masked_fill(count == 0, 0)


def pool_blocks_backward(grad: Tensor, x: Tensor, packing: Packing, pools: int) -> Tensor:
    """Gradient of `pool_blocks` in x's dtype: every token gathers its share, so nothing collides.

    Maxima and minima go to the first token that attains them; tokens of no sequence get 0.
    """
    if not x.numel() or not grad.numel():
        return torch.zeros_like(x)
    batch = packing.rows.shape[0]
    token = torch.arange(x.shape[0], device=x.device)
    ends = packing.start + packing.rows
    sequence = torch.searchsorted(ends, token, right=True).clamp_max(batch - 1)
    row = token - packing.start[sequence]
    inside = (row >= 0) & (row < packing.rows[sequence])
    block = (row // packing.block).clamp(0, packing.blocks - 1)
    place = (row % packing.block)[:, None, None]
    parts = list(grad.split(x.shape[2], dim=-1))
    total = grad.new_zeros(())
    for bit, lowest in ((1, False), (2, True)):
        if pools & bit:
            tokens = _extremes(x, packing, lowest)
            winner = tokens.argmin(2) if lowest else tokens.argmax(2)
            share = parts.pop(0)[sequence, block]
            total = total + share.where(winner[sequence, block] == place, 0)
    if pools & 4:
        count = packing.block_rows()[..., None, None].clamp_min(1)
        total = total + (parts.pop(0) / count)[sequence, block]
    return total.masked_fill(~inside[:, None, None], 0).to(x.dtype)


class Extents(NamedTuple):
    """Blocks of every sequence, int64 ``[batch, 1, 1, 1]``."""

    blocks_q: Tensor
    blocks_kv: Tensor

    @classmethod
    def of(
        cls,
        q_gate: Tensor,
        k_gate: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        block_q: int,
        block_kv: int,
    ) -> Extents:
        def blocks(cu_seqlens: Tensor, block: int, most: int) -> Tensor:
            edge = cu_seqlens.to(torch.int64)
            rows = (edge[1:] - edge[:-1]).clamp_min(0)
            return ((rows + block - 1) // block).clamp_max(most)[:, None, None, None]

        return cls(
            blocks(cu_seqlens_q, block_q, q_gate.shape[1]),
            blocks(cu_seqlens_kv, block_kv, k_gate.shape[1]),
        )

    def visible(self, blocks_kv: int, causal: bool, first: int, last: int) -> Tensor:
        """bool ``[batch, 1, last - first, blocks_kv]``: i in [first, last) and j exist, and with
        causal ``j <= i + blocks_kv - blocks_q`` of the sequence."""
        i = torch.arange(first, last, device=self.blocks_q.device)[:, None]
        j = torch.arange(blocks_kv, device=self.blocks_q.device)
        seen = (i < self.blocks_q) & (j < self.blocks_kv)
        return seen & (j <= i + self.blocks_kv - self.blocks_q) if causal else seen

    def cleared(self, q_gate: Tensor, k_gate: Tensor) -> tuple[Tensor, Tensor]:
        """Both with 0 past every sequence, where 0 times what lies there may be NaN."""

        def one(gate: Tensor, blocks: Tensor) -> Tensor:
            at = torch.arange(gate.shape[1], device=gate.device)[:, None, None]
            return gate.masked_fill(at >= blocks, 0)

        return one(q_gate, self.blocks_q), one(k_gate, self.blocks_kv)
