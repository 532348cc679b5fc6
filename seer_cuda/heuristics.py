# SPDX-License-Identifier: Apache-2.0
"""Scores of blocks without a trained gate: what a gate has to be better than.

Each function gives fp32 scores ``[batch|1, heads_q, blocks, blocks]`` of whole causal prompts, for
`seer_cuda.select.from_scores`: the higher, the sooner a block is kept. Values of blocks above the
diagonal mean nothing. The first three read q and k after RoPE, as attention does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_cuda._attn_math import matmul
from seer_cuda._contracts import ceil_div, check_block, check_counts, check_forced, check_rows


def vertical_slash(
    q: Tensor, k: Tensor, *, block: int = 64, last: int = 64, scale: float | None = None
) -> Tensor:
    """Columns and diagonals that the last rows attend to (MInference, Jiang et al. 2024, 3.2).

    The exact attention of the last rows is summed along columns and along diagonals. A block is as
    good as the better of its column and its diagonal.

    Args:
        q: ``[batch, rows, heads_q, head_dim]``.
        k: ``[batch, rows, heads_kv, head_dim]``.
        block: Tokens per block.
        last: Rows that are looked at.
        scale: Softmax scale. Default ``head_dim ** -0.5``.

    Raises:
        ValueError: q and k of other shapes, block < 1, or last < 1.
    """
    rows, group = _check("vertical_slash", q, k, block)
    if last < 1:
        raise ValueError(
            f"seer::vertical_slash: last: expected at least 1, got {last}. Look at a row."
        )
    if not rows:
        return q.new_empty((q.shape[0], q.shape[2], 0, 0), dtype=torch.float32)
    last = min(last, rows)
    seen = q[:, rows - last :].unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4)
    keys = k.permute(0, 2, 3, 1)
    # One matrix per KV head: the rows of all query heads that share it.
    batch, heads_kv = keys.shape[:2]
    scores = matmul(seen.reshape(batch * heads_kv, group * last, -1), keys.flatten(0, 1))
    scores = scores.view(batch, heads_kv * group, last, rows) * _scale(q, scale)
    at = torch.arange(rows, device=q.device)
    weights = scores.masked_fill(at > at[rows - last :, None], -torch.inf).softmax(-1)
    blocks = ceil_div(rows, block)
    column = F.pad(weights.sum(-2), (0, blocks * block - rows)).unflatten(-1, (blocks, block))
    diagonal = _diagonal_sums(weights)
    # Block (i, j) holds offset o on block - |o - (i - j) block| of its diagonals.
    reach = 1 - torch.arange(1 - block, block, device=q.device).abs() / block
    padded = F.pad(diagonal, (block - 1, blocks * block - rows)).flatten(0, 1)[:, None]
    slash = F.conv1d(padded, reach[None, None], stride=block).view(*diagonal.shape[:2], -1)
    i = torch.arange(blocks, device=q.device)
    offset = (i[:, None] - i).clamp_min(0)
    return torch.maximum(column.sum(-1)[..., None, :], slash[..., offset])


def _diagonal_sums(weights: Tensor) -> Tensor:
    """``[..., last, rows]`` of the last rows to ``[..., rows]``: sums by query minus key."""
    last, rows = weights.shape[-2:]
    flat = F.pad(weights.flip(-1), (0, last)).flatten(-2)
    # One column less per line moves each row by one against the row before.
    flat = flat[..., last - 1 : last - 1 + last * (rows + last - 1)]
    return flat.unflatten(-1, (last, rows + last - 1))[..., :rows].sum(-2)


def antidiagonal(
    q: Tensor, k: Tensor, *, block: int = 64, stride: int = 8, scale: float | None = None
) -> Tensor:
    """Sums along antidiagonals of small tiles (XAttention, Xu et al. 2025, section 2.1).

    The mean score on the antidiagonal of every stride x stride tile goes through a softmax over
    the tiles of a row; a block's score is the sum over its tiles.

    Args:
        q: ``[batch, rows, heads_q, head_dim]``.
        k: ``[batch, rows, heads_kv, head_dim]``.
        block: Tokens per block.
        stride: Side of a tile, a divisor of block.
        scale: Softmax scale. Default ``head_dim ** -0.5``.

    Raises:
        ValueError: q and k of other shapes, block < 1, or a stride that does not divide block.
    """
    rows, group = _check("antidiagonal", q, k, block)
    if stride < 1 or block % stride:
        raise ValueError(
            f"seer::antidiagonal: stride: expected a divisor of block = {block}, got {stride}. "
            "Use 8 or 16."
        )
    blocks = ceil_div(rows, block)
    scale = _scale(q, scale) / stride
    padding = (0, 0, 0, 0, 0, blocks * block - rows)
    # [heads, batch, tiles, stride, head_dim]; an antidiagonal pairs row i with the i-th from below.
    q, k = (F.pad(x, padding).unflatten(1, (-1, stride)).permute(3, 0, 1, 2, 4) for x in (q, k))
    q, k = q.flip(3).flatten(3), k.flatten(3)
    at = torch.arange(q.shape[2], device=q.device)
    hidden = (at > at[:, None]) | (at * stride >= rows)
    split = (blocks, block // stride)
    out = []
    # A head at a time: at 128k tokens one head's tiles take 1 GiB.
    for head in range(q.shape[0]):
        scores = matmul(q[head], k[head // group].mT) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(weights.unflatten(2, split).unflatten(1, split).sum((2, 4)))
    return torch.stack(out, 1)


def pooled_qk(q: Tensor, k: Tensor, *, block: int = 64, scale: float | None = None) -> Tensor:
    """Mean query of a block times mean key of a block: the gate without training.

    Args:
        q: ``[batch, rows, heads_q, head_dim]``.
        k: ``[batch, rows, heads_kv, head_dim]``.
        block: Tokens per block; a last short one is the mean of its tokens.
        scale: Factor. Default ``head_dim ** -0.5``.

    Raises:
        ValueError: q and k of other shapes, or block < 1.
    """
    rows, group = _check("pooled_qk", q, k, block)
    blocks = ceil_div(rows, block)
    padding = (0, 0, 0, 0, 0, blocks * block - rows)
    counts = (rows - block * torch.arange(blocks, device=q.device)).clamp_max(block)
    q_mean, k_mean = (
        F.pad(x.float(), padding).unflatten(1, (blocks, block)).sum(2).transpose(1, 2)
        / counts[:, None]
        for x in (q, k)
    )
    scores = q_mean @ k_mean.repeat_interleave(group, 1).mT
    return scores * _scale(q, scale)


def sink_local(
    rows: int, *, block: int = 64, sink: int = 1, device: torch.device | str | None = None
) -> Tensor:
    """``[1, 1, blocks, blocks]``: first blocks, then the nearest (StreamingLLM, Xiao et al. 2023).

    Args:
        rows: Tokens.
        block: Tokens per block.
        sink: First blocks that come before all others.
        device: Where the scores are made.

    Raises:
        ValueError: block < 1, or a negative number of rows or sinks.
    """
    check_block("sink_local", "block", block)
    check_rows("sink_local", "rows", rows)
    check_forced("sink_local", sink, 0, 0)
    blocks = ceil_div(rows, block)
    scores = torch.arange(blocks, dtype=torch.float32, device=device).repeat(blocks, 1)
    scores[:, :sink] += blocks  # above every index of a block
    return scores[None, None]


def random(
    rows: int,
    heads: int,
    *,
    block: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """``[1, heads, blocks, blocks]`` uniform in [0, 1): the same on every device.

    Args:
        rows: Tokens.
        heads: Query heads.
        block: Tokens per block.
        seed: Of the draw.
        device: Where the scores go.

    Raises:
        ValueError: block < 1, or a negative number of rows or heads.
    """
    check_block("random", "block", block)
    check_rows("random", "rows", rows)
    check_counts("random", "Pass the model's query heads.", heads=heads)
    blocks = ceil_div(rows, block)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((1, heads, blocks, blocks), generator=generator).to(device)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check(function: str, q: Tensor, k: Tensor, block: int) -> tuple[int, int]:
    """Rows and query heads per KV head."""
    check_block(function, "block", block)
    fits = q.dim() == 4 and k.dim() == 4 and q.shape[:2] == k.shape[:2]
    if not fits or q.shape[-1] != k.shape[-1] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"seer::{function}: k: expected [batch, rows, heads_kv, head_dim] of q's batch, rows "
            f"and head_dim, heads_kv a divisor of its heads, got {list(k.shape)} beside q "
            f"{list(q.shape)}. Pass a whole prompt's q and k."
        )
    return q.shape[1], q.shape[2] // k.shape[2]


__all__ = ["antidiagonal", "pooled_qk", "random", "sink_local", "vertical_slash"]
