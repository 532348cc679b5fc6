# SPDX-License-Identifier: Apache-2.0
"""Block masks of the benchmark cases, and the work they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bench.cases import Case

# Structured masks: so many neighbouring query blocks share the columns of their stripes, and each
# keeps so many blocks up to the diagonal.
NEIGHBOURS = 8
WINDOW = 4


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


def _preference(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Of one head, in which order rows keep blocks: the smallest numbers first. Float [blocks_q,
    blocks_kv]."""
    device = generator.device
    shape = (case.blocks_q, case.blocks_kv)
    if case.mask != "structured":
        return torch.rand(shape, device=device, generator=generator)
    groups = (-(-case.blocks_q // NEIGHBOURS), case.blocks_kv)
    stripes = torch.rand(groups, device=device, generator=generator)
    order = stripes.repeat_interleave(NEIGHBOURS, 0)[: case.blocks_q]
    order[:, 0] = -1.0  # the sink
    column = torch.arange(case.blocks_kv, device=device)
    distance = visible_blocks(case).to(device)[:, None] - column
    return torch.where(distance <= WINDOW, distance - (WINDOW + 2.0), order)


def block_mask(case: Case, device: torch.device | str = "cpu") -> torch.Tensor:
    """The mask of a case: bool [batch, heads, blocks_q, blocks_kv], heads = heads_q or, "kv_head",
    heads_kv.

    Every row keeps `kept_per_row` blocks, its last visible one (the diagonal one) among them. The
    others are a uniformly random choice or, "structured", first the local window, then the sink
    (block 0), then random stripes that neighbouring rows have in common, as real masks do. Made
    one head at a time: the numbers and their order take O(blocks_q * blocks_kv) beside the
    result, not O(heads * blocks_q * blocks_kv).
    """
    kinds = ("random", "kv_head", "structured")
    if case.mask not in kinds:
        raise ValueError(f"block_mask: expected mask {', '.join(kinds)}, got {case.mask!r}")
    heads = case.heads_kv if case.mask == "kv_head" else case.heads_q
    generator = torch.Generator(device=device).manual_seed(case.seed)
    column = torch.arange(case.blocks_kv, device=device)
    visible = visible_blocks(case).to(device)[:, None]
    kept = kept_per_row(case).to(device)[:, None]
    shape = (case.blocks_q, case.blocks_kv)
    mask = torch.zeros(case.batch, heads, *shape, dtype=torch.bool, device=device)
    for head_mask in mask.flatten(0, 1):
        order = _preference(case, generator)
        order = torch.where(column < visible, order, torch.inf)
        order = torch.where(column == visible - 1, -torch.inf, order)
        head_mask.scatter_(1, order.argsort(dim=1), (column < kept).expand(shape))
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
