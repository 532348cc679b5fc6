# SPDX-License-Identifier: Apache-2.0
"""Distilling a gate from the attention it approximates: targets and losses of the two papers.

Prefill (SeerAttention, Gao et al. 2024, section 3.2): the 2-D pooled map, rows normalised.
Decode (SeerAttention-R, Gao et al. 2025, section 2.3): the per-token map, maximum over the GQA
group, the current block dropped, rows normalised. Everything is computed in fp32; a target is data
and carries no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

#: The factor on the sum of all layers' losses in both recipes.
LOSS_SCALE = 10.0
#: Smallest row sum that a decode target is divided by.
DECODE_EPS = 1e-9


def target_prefill(pooled: Tensor) -> Tensor:
    """Row-normalised map: ``G[i, j] = pooled[i, j] / sum_j pooled[i, j]``.

    Args:
        pooled: ``[..., blocks_q, blocks_kv]`` >= 0, from `seer_cuda.attn_pool`.

    Returns:
        fp32, the same shape. Rows sum to 1; a row of zeros stays zero.
    """
    pooled = pooled.detach().to(torch.float32)
    mass = pooled.sum(-1, keepdim=True)
    return pooled / mass.masked_fill(mass == 0, 1)


def target_decode(
    pooled: Tensor,
    group: int,
    block: int,
    positions: Tensor | None = None,
    eps: float = DECODE_EPS,
) -> Tensor:
    """Per-token target: maximum over the GQA group, earlier blocks only, normalised.

    ``T[u, r, j] = max_{h in group u} pooled[h, r, j]`` for ``j < p_r // block``, else 0, divided
    by ``sum_j T + eps``. The block that holds token r itself is dropped: at decode it is always
    attended.

    Args:
        pooled: ``[batch, heads_q, rows, blocks_kv]`` or packed ``[heads_q, total, blocks_kv]``,
            from `seer_cuda.attn_pool` with per_token.
        group: ``heads_q / heads_kv``.
        block: KV tokens per block.
        positions: int ``[rows]`` or ``[batch, rows]``: index p_r of each row's token in its
            sequence. Default 0, 1, 2, ...; needed for packed sequences and for rows_q < rows_kv.
        eps: Added to each row's sum.

    Returns:
        fp32 ``[batch, heads_kv, rows, blocks_kv]`` or ``[heads_kv, total, blocks_kv]``. Rows of a
        sequence's first block are zero.

    Raises:
        ValueError: group does not divide the heads.
    """
    heads = pooled.shape[-3]
    if group < 1 or heads % group:
        raise ValueError(
            f"seer::target_decode: group: expected a divisor of the {heads} heads, got {group}. "
            "Pass heads_q // heads_kv."
        )
    pooled = pooled.detach().to(torch.float32).unflatten(-3, (heads // group, group)).amax(-3)
    if positions is None:
        positions = torch.arange(pooled.shape[-2], device=pooled.device)
    current = positions.div(block, rounding_mode="floor")[..., None]
    earlier = torch.arange(pooled.shape[-1], device=pooled.device) < current
    if earlier.dim() == 3:
        earlier = earlier.unsqueeze(1)
    target = pooled.masked_fill(~earlier, 0)
    return target / (target.sum(-1, keepdim=True) + eps)


def gate_loss(
    scores: Tensor,
    target: Tensor,
    *,
    kind: Literal["prefill", "decode", "mse"] = "prefill",
    reduction: Literal["element_mean", "row_mean"] = "element_mean",
    drop_rows: int | None = None,
    loss_scale: float = LOSS_SCALE,
) -> Tensor:
    """The distillation loss of one gate (one layer); layers add up.

    prefill and decode: ``KL(target || softmax(scores))``; mse: ``(softmax(scores) - target)^2``,
    the objective of SeerAttention's first version.

    Args:
        scores: Logits ``[..., rows, blocks_kv]``, -inf where a block is not visible
            (`seer_cuda.gate_scores`).
        target: The same shape, rows that sum to 1 or are empty. What a target holds on blocks
            whose score is -inf is left out: no gate could learn it.
        kind: Also the number of leading rows that are left out for stability: a quarter for
            prefill, half for decode, none for mse.
        reduction: ``"element_mean"`` divides by the number of elements as the reference does
            (KLDivLoss's default), so the loss shrinks with blocks_kv; ``"row_mean"`` divides by
            the number of rows.
        drop_rows: Leading rows to leave out instead.
        loss_scale: Factor on the result.

    Returns:
        fp32 scalar. Finite, with finite gradients, for rows whose target is empty or whose scores
        are all -inf too: such rows add 0 and count in the mean.

    Raises:
        ValueError: unknown kind or reduction, shapes that differ, or no row left.
    """
    if scores.shape != target.shape:
        raise ValueError(
            f"seer::gate_loss: target: expected the shape of scores, {list(scores.shape)}, got "
            f"{list(target.shape)}. Pool the attention with the gate's block sizes."
        )
    shares = {"prefill": 4, "decode": 2, "mse": 0}
    if kind not in shares:
        raise ValueError(
            f"seer::gate_loss: kind: expected one of {', '.join(shares)}, got {kind!r}. Choose one."
        )
    if reduction not in ("element_mean", "row_mean"):
        raise ValueError(
            "seer::gate_loss: reduction: expected element_mean or row_mean, got "
            f"{reduction!r}. Choose one."
        )
    rows = scores.shape[-2]
    if drop_rows is None:
        drop_rows = rows // shares[kind] if shares[kind] else 0
    if not 0 <= drop_rows < rows:
        raise ValueError(
            f"seer::gate_loss: drop_rows: expected 0 to {rows - 1}, got {drop_rows}. Keep a row."
        )
    scores = scores[..., drop_rows:, :].to(torch.float32)
    visible = scores > -torch.inf
    target = target[..., drop_rows:, :].detach().to(torch.float32).masked_fill(~visible, 0)
    # A finite floor in place of -inf: the softmax of a row without any visible block is defined.
    log_prob = scores.masked_fill(~visible, torch.finfo(torch.float32).min).log_softmax(-1)
    if kind == "mse":
        terms = (log_prob.exp() - target).square().masked_fill(~visible, 0)
    else:
        terms = torch.xlogy(target, target) - target * log_prob.masked_fill(~visible, 0)
    count = terms.numel()
    if reduction == "row_mean":
        count = count // scores.shape[-1]
    return terms.sum() * (loss_scale / count)
