# SPDX-License-Identifier: Apache-2.0
"""Kept blocks as lists of indices."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_to_indices(dense: Tensor) -> tuple[Tensor, Tensor]:
    """bool ``[..., n]`` to int32 lists ``[..., n]`` (ascending, tail 0) and counts ``[...]``."""
    n = dense.shape[-1]
    counts = dense.sum(-1, dtype=torch.int32)
    # Kept entries go to their rank, all others to one column more, which is cut off.
    rank = dense.cumsum(-1, dtype=torch.int64).sub_(1).masked_fill_(~dense, n)
    column = torch.arange(n, dtype=torch.int32, device=dense.device).expand(dense.shape)
    lists = column.new_zeros((*dense.shape[:-1], n + 1)).scatter_(-1, rank, column)
    return lists[..., :n].contiguous(), counts


def as_int32(numbers: Tensor, low: int, high: int) -> Tensor:
    """int32 or int64 as int32; what is outside stays outside of (low, high).

    Cast as it is, a number past 32 bits would become some block's.
    """
    return numbers if numbers.dtype == torch.int32 else numbers.clamp(low, high).to(torch.int32)
