# SPDX-License-Identifier: Apache-2.0
"""Packed sequences as the gate's functions take them, and where their blocks begin."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seer_cuda._contracts import ceil_div


class Packed(NamedTuple):
    """The four arguments that describe a packed batch."""

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_rows_q: int
    max_rows_kv: int

    @classmethod
    def of(
        cls,
        op: str,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_kv: Tensor | None,
        max_rows_q: int,
        max_rows_kv: int,
    ) -> Packed | None:
        """None where nothing is packed; ValueError where only one of the two is given."""
        if cu_seqlens_q is None and cu_seqlens_kv is None:
            return None
        if cu_seqlens_q is None or cu_seqlens_kv is None:
            missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_kv"
            raise ValueError(
                f"seer::{op}: {missing}: expected cu_seqlens_q and cu_seqlens_kv together, got "
                "only one of them. Pass both for packed sequences, or neither."
            )
        return cls(cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv)

    def blocks(self, block: int) -> tuple[int, int]:
        """Blocks of the longest sequences: of q, of KV."""
        return ceil_div(self.max_rows_q, block), ceil_div(self.max_rows_kv, block)

    def first_blocks(self, block: int, limit: int) -> Tensor:
        """int64 ``[batch, blocks_q]``: which KV block each query block stands at, below limit.

        The queries are the last rows of their sequence, and start at a multiple of the block.
        """
        rows_kv, rows_q = (cu[1:] - cu[:-1] for cu in (self.cu_seqlens_kv, self.cu_seqlens_q))
        i = torch.arange(self.blocks(block)[0], device=rows_q.device)
        return ((rows_kv - rows_q) // block)[:, None].add(i).clamp(0, limit - 1)

    def tables(
        self, cos: Tensor, sin: Tensor, block: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """From tables of the first blocks of a sequence those of q and of k."""
        blocks_q, blocks_kv = self.blocks(block)
        of_k = cos[:blocks_kv], sin[:blocks_kv]
        if self.cu_seqlens_q is self.cu_seqlens_kv:  # every sequence whole
            return (cos[:blocks_q], sin[:blocks_q]), of_k
        at = self.first_blocks(block, cos.shape[0])
        return (cos[at], sin[at]), of_k

    def first_tokens(self, block: int, total_kv: int) -> tuple[Tensor, Tensor]:
        """int64 ``[batch, blocks]`` of q and of KV: the packed KV row at which a block starts."""
        cu_q, cu_kv = self.cu_seqlens_q, self.cu_seqlens_kv
        starts = cu_kv[1:] - (cu_q[1:] - cu_q[:-1]), cu_kv[:-1]
        return tuple(
            start[:, None]
            .add(torch.arange(blocks, device=start.device) * block)
            .clamp(0, total_kv - 1)
            for start, blocks in zip(starts, self.blocks(block), strict=True)
        )
