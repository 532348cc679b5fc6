# SPDX-License-Identifier: Apache-2.0
"""An attention map to look at: where a head's attention goes, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seer_cuda.block_mask import BlockMask
from seer_cuda.ops import Reduce, attn_pool

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class AttentionMap:
    """What `attention_map` found.

    Attributes:
        values: fp32 ``[batch, heads_q, blocks_q, blocks_kv]``, per_token ``[batch, heads_q, rows_q,
            blocks_kv]``.
        out: The attention's output, as a by-product.
        rows_q, rows_kv: Tokens.
        block_q, block_kv: Tokens per block; block_q is 1 for per_token.
        causal: Whether blocks above the diagonal are hidden.
        reduce: ``"max"``: a block's largest probability; ``"sum"``: its share of the attention.
    """

    values: Tensor
    out: Tensor
    rows_q: int
    rows_kv: int
    block_q: int
    block_kv: int
    causal: bool
    reduce: Reduce

    def visible(self) -> Tensor:
        """bool ``[blocks_q, blocks_kv]``: some row of the block sees some column of it."""
        rows = torch.arange(self.values.shape[-2], device=self.values.device)[:, None]
        cols = torch.arange(self.values.shape[-1], device=self.values.device)[None, :]
        if not self.causal:
            return torch.ones_like(rows <= cols)
        last = ((rows + 1) * self.block_q).clamp_max(self.rows_q) - 1
        return cols * self.block_kv <= last + self.rows_kv - self.rows_q

    def kept_by(self, mask: BlockMask) -> Tensor:
        """Share of the attention in the blocks that a mask keeps, ``[batch, heads_q]``.

        The mean over the rows of blocks: 1 if nothing is lost. Only for maps of sums.

        Raises:
            ValueError: a map of maxima, or a mask of other blocks, lengths, batch or heads.
        """
        if self.reduce != "sum":
            raise ValueError(
                "seer::attention_map: reduce: expected a map of sums, got maxima. Call "
                'attention_map with reduce="sum".'
            )
        batch, heads = self.values.shape[:2]
        own, given = (
            f"blocks of {x.block_q} x {x.block_kv} tokens for {x.rows_q} x {x.rows_kv}"
            for x in (self, mask)
        )
        if own != given:
            raise ValueError(
                f"seer::attention_map: mask: expected {own}, got {given}. Build the mask for these "
                "lengths and blocks."
            )
        divides = heads % mask.heads == 0 if mask.heads else not heads
        if mask.batch not in (1, batch) or not divides:
            raise ValueError(
                f"seer::attention_map: mask: expected batch 1 or {batch} and a divisor of {heads} "
                f"heads, got batch {mask.batch} and {mask.heads} heads. Build the mask for this "
                "batch and model."
            )
        kept = mask.to_dense().repeat_interleave(heads // max(1, mask.heads), 1)
        whole = self.values.sum((-1, -2))
        return (self.values * kept).sum((-1, -2)) / whole.masked_fill(whole == 0, 1)

    def plot(self, *, batch: int = 0, max_heads: int = 8, title: str | None = None) -> Figure:
        """A panel per head, on a logarithmic scale (`seer_cuda.plot.plot_attention_map`)."""
        from seer_cuda.plot import plot_attention_map

        return plot_attention_map(self, batch=batch, max_heads=max_heads, title=title)

    def __repr__(self) -> str:
        batch, heads, height, blocks_kv = self.values.shape
        kind = "largest probability" if self.reduce == "max" else "share of the attention"
        seen = self.values[..., self.visible()]
        shown = "nothing visible"
        if seen.numel():
            shown = f"mean {float(seen.mean()):.3g}, largest {float(seen.max()):.3g}"
        return (
            f"AttentionMap({batch} x {heads} heads, {height} x {blocks_kv} blocks of "
            f"{self.block_q} x {self.block_kv} tokens, {kind}: {shown})"
        )


def attention_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_q: int = 64,
    block_kv: int = 64,
    causal: bool = True,
    scale: float | None = None,
    per_token: bool = False,
    reduce: Reduce = "sum",
) -> AttentionMap:
    """The attention of q to k, pooled over blocks, as an object to look at.

    >>> found = seer_cuda.attention_map(q, k, v)
    >>> found.plot().savefig("attention.png")
    >>> found.kept_by(mask)  # what a block mask would keep of it

    Args:
        q, k, v: ``[batch, rows, heads, head_dim]``, with RoPE.
        block_q, block_kv, causal, scale, per_token, reduce: As in `seer_cuda.attn_pool`; sums by
            default, which say how much and not only whether.

    Raises:
        ValueError: packed q, or an unknown reduction.
        RuntimeError: refused by the op.
    """
    if q.dim() != 4:
        raise ValueError(
            f"seer::attention_map: q: expected [batch, rows, heads, head_dim], got "
            f"{list(q.shape)}. Look at one sequence at a time."
        )
    with torch.no_grad():
        out, _, values = attn_pool(
            q,
            k,
            v,
            block_q=block_q,
            block_kv=block_kv,
            causal=causal,
            scale=scale,
            per_token=per_token,
            reduce=reduce,
        )
    rows_q, rows_kv = q.shape[1], k.shape[1]
    height = 1 if per_token else block_q
    return AttentionMap(values, out, rows_q, rows_kv, height, block_kv, causal, reduce)
