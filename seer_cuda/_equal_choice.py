# SPDX-License-Identifier: Apache-2.0
"""The common rule of comparisons: every method keeps equally many blocks in every row.

A row keeps its diagonal block and the best others, k = max(1, floor((1 - sqrt(1 - density))
blocks)) in all (every visible block where it has fewer).
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_cuda import select
from seer_cuda.block_mask import BlockMask


def keep(scores: Tensor, density: float, block: int, rows: int | None = None) -> BlockMask:
    """What the rule keeps of ``[batch|1, heads, blocks, blocks]`` scores; rows: of tokens."""
    diagonal = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(diagonal, torch.inf)
    sizes = {"block_q": block, "block_kv": block, "rows_q": rows, "rows_kv": rows}
    return select.from_scores(scores, "density", density, **sizes)


def open_blocks(density: float, scores: Tensor) -> Tensor:
    """bool ``[blocks, blocks]``: where methods can differ. Not the diagonal, nor rows that keep all
    they see."""
    blocks = scores.shape[-1]
    row = torch.arange(blocks, device=scores.device)
    choice = row >= select.density_to_k(density, blocks)
    return choice[:, None] & (row[:, None] != row)
