# SPDX-License-Identifier: Apache-2.0
"""Block masks of the benchmark cases, and the work they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bench.cases import Case


def visible_blocks(case: Case) -> torch.Tensor:
    """KV blocks that query block i can see at all: int64 [blocks_q], on the CPU.

    Causal is bottom-right aligned: query row r sees keys c <= r + rows_kv - rows_q, and a block
    is visible when any row of the query block sees any of its keys.
    """
    if not case.causal:
        return torch.full((case.blocks_q,), case.blocks_kv)
    block_q, block_kv = case.block
    last_row = (torch.arange(1, case.blocks_q + 1) * block_q).clamp(max=case.rows_q)
    keys = (last_row + case.rows_kv - case.rows_q).clamp(min=0)
    return (keys + block_kv - 1) // block_kv


def kept_per_row(case: Case) -> torch.Tensor:
    """Blocks that each query-block row keeps: round(density * visible), at least 1 where anything
    is visible. int64 [blocks_q]."""
    visible = visible_blocks(case)
    kept = (case.density * visible.double()).round().long()
    return torch.minimum(kept.clamp(min=1), visible)


def block_mask(case: Case, device: torch.device | str = "cpu") -> torch.Tensor:
    """The mask of a case: bool [batch, heads, blocks_q, blocks_kv], heads = heads_q ("random") or
    heads_kv ("kv_head").

    Every row keeps its last visible block (the diagonal one) and a uniformly random choice of the
    blocks before it, `kept_per_row` in all. Made one head at a time: the random keys and their
    order take O(blocks_q * blocks_kv) beside the result, not O(heads * blocks_q * blocks_kv).
    """
    if case.mask not in ("random", "kv_head"):
        raise ValueError(f"block_mask: expected mask random or kv_head, got {case.mask!r}")
    heads = case.heads_q if case.mask == "random" else case.heads_kv
    generator = torch.Generator(device=device).manual_seed(case.seed)
    column = torch.arange(case.blocks_kv, device=device)
    visible = visible_blocks(case).to(device)[:, None]
    kept = kept_per_row(case).to(device)[:, None]
    shape = (case.blocks_q, case.blocks_kv)
    mask = torch.zeros(case.batch, heads, *shape, dtype=torch.bool, device=device)
    for head_mask in mask.flatten(0, 1):
        keys = torch.rand(shape, device=device, generator=generator)
        keys = torch.where(column < visible, keys, torch.inf)
        keys = torch.where(column == visible - 1, -1.0, keys)
        head_mask.scatter_(1, keys.argsort(dim=1), (column < kept).expand(shape))
    return mask


def crossed_blocks(case: Case) -> torch.Tensor:
    """Blocks that the causal diagonal crosses, seen in part only: bool [blocks_q, blocks_kv]."""
    block_q, block_kv = case.block
    first_row = torch.arange(case.blocks_q) * block_q + case.rows_kv - case.rows_q
    last_column = (torch.arange(1, case.blocks_kv + 1) * block_kv).clamp(max=case.rows_kv) - 1
    partial = last_column[None, :] > first_row[:, None]
    seen = torch.arange(case.blocks_kv)[None, :] < visible_blocks(case)[:, None]
    return partial & seen if case.causal else torch.zeros_like(seen)


def flops(case: Case, mask: torch.Tensor | None) -> float:
    """Floating-point operations that a case asks for.

    4 * head_dim * block_q * block_kv (two products, a multiply and an add each) per kept block
    and query head, a block crossed by the causal diagonal half. Softmax is not counted, nor work
    that a kernel spends on blocks which the mask leaves out. `mask` None: every visible block.
    """
    crossed = crossed_blocks(case)
    if mask is None:
        seen = torch.arange(case.blocks_kv)[None, :] < visible_blocks(case)[:, None]
        mask = seen.expand(case.batch, 1, *seen.shape)
    crossed = crossed.to(mask.device)
    blocks = float(mask.sum()) - 0.5 * float((mask & crossed).sum())
    per_mask_head = case.heads_q // mask.shape[1]
    return 4.0 * case.head_dim * case.block[0] * case.block[1] * per_mask_head * blocks
