# SPDX-License-Identifier: Apache-2.0
"""Distilling a gate from the attention it approximates: targets and losses of the two papers.

Prefill (SeerAttention, Gao et al. 2024, section 3.2): the 2-D pooled map, rows normalised.
Decode (SeerAttention-R, Gao et al. 2025, section 2.3): the per-token map, maximum over the GQA
group, the current block dropped, rows normalised. Everything is computed in fp32; a target is data
and carries no gradient. `gate_kl` is the prefill loss without its score matrix, for long sequences.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from seer_cuda._contracts import check_block
from seer_cuda._gate_kl import GateKL

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
        ValueError: group does not divide the heads, block is below 1, or positions have another
            shape.
    """
    check_block("target_decode", "block", block)
    heads = pooled.shape[-3]
    if group < 1 or heads % group:
        raise ValueError(
            f"seer::target_decode: group: expected a divisor of the {heads} heads, got {group}. "
            "Pass heads_q // heads_kv."
        )
    rows, lead = pooled.shape[-2], tuple(pooled.shape[:-3])
    if positions is not None and tuple(positions.shape) not in ((rows,), (*lead, rows)):
        wanted = f"[{rows}]" + (f" or {[*lead, rows]}" if lead else "")
        raise ValueError(
            f"seer::target_decode: positions: expected {wanted}, got {list(positions.shape)}. Pass "
            "one position per row of the map."
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
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The distillation loss of one gate (one layer); layers add up.

    prefill and decode: ``KL(target || softmax(scores))``; mse: ``(softmax(scores) - target)^2``,
    the objective of SeerAttention's first version.

    Args:
        scores: Logits ``[..., rows, blocks_kv]``, -inf where a block is not visible
            (`seer_cuda.gate_scores`). Packed sequences: ``[heads_kv, total, blocks_kv]`` with
            cu_seqlens.
        target: The same shape, rows that sum to 1 or are empty. What a target holds on blocks
            whose score is -inf is left out: no gate could learn it.
        kind: Also the number of leading rows that are left out for stability: a quarter for
            prefill, half for decode, none for mse.
        reduction: ``"element_mean"`` divides by the number of elements as the reference does
            (KLDivLoss's default), so the loss shrinks with blocks_kv; ``"row_mean"`` divides by
            the number of rows.
        drop_rows: Leading rows to leave out instead (of every packed sequence).
        loss_scale: Factor on the result.
        cu_seqlens: int32 or int64 ``[sequences + 1]`` on the device of scores, needed for decode
            with 3-D scores: sequence n is rows ``cu[n]`` to ``cu[n + 1]``. Rows are left out of
            each sequence (``len // 2`` for decode), and the result is the mean of the sequences'
            losses (SeerAttention-R, section 2.3) over those with a row left. Never read on the
            host.

    Returns:
        fp32 scalar. Finite, with finite gradients, for rows whose target is empty or whose scores
        are all -inf too: such rows add 0 and count in the mean. NaN if a score that counts is.

    Raises:
        ValueError: unknown kind or reduction, shapes that differ, no row left, 3-D decode scores
            without cu_seqlens, or cu_seqlens of another form.
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
    _check_reduction("gate_loss", reduction)
    _check_packing(scores, kind, cu_seqlens)
    rows, blocks = scores.shape[-2:]
    first = _dropped(rows, shares[kind], drop_rows)
    # How long packed sequences are is known on the device only.
    most = rows - 1 if cu_seqlens is None else math.inf
    if not 0 <= first <= most:
        raise ValueError(
            f"seer::gate_loss: drop_rows: expected 0 to {most}, got {first}. Keep a row."
        )
    if cu_seqlens is None:
        scores, target = scores[..., first:, :], target[..., first:, :]
    scores, target = scores.to(torch.float32), target.detach().to(torch.float32)
    visible = scores != -torch.inf  # NaN is: the loss must show what the gradients hold
    if cu_seqlens is None:
        weight = 1 / (rows - first)
    else:
        weight = _packed_weights(rows, cu_seqlens, shares[kind], drop_rows)[:, None]
        visible = visible & (weight > 0)
    target = target.masked_fill(~visible, 0)
    # A finite floor in place of -inf: the softmax of a row without any visible block is defined.
    log_prob = scores.masked_fill(~visible, torch.finfo(torch.float32).min).log_softmax(-1)
    if kind == "mse":
        terms = (log_prob.exp() - target).square().masked_fill(~visible, 0)
    else:
        terms = torch.xlogy(target, target) - target * log_prob.masked_fill(~visible, 0)
    maps = math.prod(scores.shape[:-2])
    if reduction == "element_mean":
        maps *= blocks
    return (terms * weight).sum() * (loss_scale / max(1, maps))


def gate_kl(
    q_gate: Tensor,
    k_gate: Tensor,
    pooled: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    reduction: Literal["element_mean", "row_mean"] = "element_mean",
    drop_rows: int | None = None,
    loss_scale: float = LOSS_SCALE,
) -> Tensor:
    """The prefill loss from embeddings and map, without a score matrix: what to train long with.

    ``gate_loss(gate_scores(q_gate, k_gate), target_prefill(pooled))`` (SeerAttention, Gao et al.
    2024, section 3.2) in one pass over chunks of rows. Beside its arguments it needs memory for one
    chunk and for the embeddings' gradients: at 64k tokens and 32 heads less than one score matrix
    (128 MiB), of which the composition makes several.

    Args:
        q_gate: ``[batch, blocks_q, heads_q, gate_dim]``, from `AttnGate.embed` or `pool_gate`.
        k_gate: ``[batch, blocks_kv, heads_k, gate_dim]``, of q_gate's dtype; heads_k divides
            heads_q.
        pooled: ``[batch, heads_q, blocks_q, blocks_kv]`` >= 0, `attn_pool`'s map as it is (rows
            are normalised here) or `target_prefill`'s. What it holds on hidden blocks is left out
            before rows are normalised (`gate_loss`: after; attn_pool's map holds nothing there).
        scale, causal: As in `seer_cuda.gate_scores`.
        reduction, drop_rows, loss_scale: As in `gate_loss`; by default a quarter of the rows is
            left out.

    Returns:
        fp32 scalar (float64 for float64 embeddings), differentiable once in q_gate and k_gate,
        in reverse mode only. Rows without a target or a visible block add 0 and count in the mean.
        NaN if a score is.

    Raises:
        ValueError: unknown reduction, embeddings that do not fit each other, a map of another
            shape or on another device, or no row left.
        RuntimeError: embeddings that `seer_cuda.gate_scores` refuses.
    """
    _check_reduction("gate_kl", reduction)
    for name, gate in (("q_gate", q_gate), ("k_gate", k_gate)):
        if gate.dim() != 4:
            raise ValueError(
                f"seer::gate_kl: {name}: expected [batch, blocks, heads, gate_dim], got "
                f"{list(gate.shape)}. Pass what AttnGate.embed returns."
            )
    _check_pair(q_gate, k_gate)
    shape = (q_gate.shape[0], q_gate.shape[2], q_gate.shape[1], k_gate.shape[1])
    if tuple(pooled.shape) != shape:
        raise ValueError(
            "seer::gate_kl: pooled: expected [batch, heads_q, blocks_q, blocks_kv] = "
            f"{list(shape)}, got {list(pooled.shape)}. Pool the attention with the gate's block "
            "sizes."
        )
    if pooled.device != q_gate.device:
        raise ValueError(
            f"seer::gate_kl: pooled: expected a tensor on {q_gate.device} (the device of q_gate), "
            f"got {pooled.device}. Move it with .to(q_gate.device)."
        )
    rows, blocks = shape[2:]
    first = _dropped(rows, 4, drop_rows)
    if not 0 <= first < rows:
        raise ValueError(
            f"seer::gate_kl: drop_rows: expected 0 to {rows - 1}, got {first}. Keep a row."
        )
    terms = shape[0] * shape[1] * (rows - first)
    if reduction == "element_mean":
        terms *= blocks
    options = {"scale": scale, "causal": causal, "first_row": first}
    return GateKL.apply(q_gate, k_gate, pooled.detach(), loss_scale / max(1, terms), options)


def _check_pair(q_gate: Tensor, k_gate: Tensor) -> None:
    # The op checks as much, but float64 does not go through it.
    batch, _, heads, gate_dim = q_gate.shape
    same = (k_gate.shape[0], k_gate.shape[3], k_gate.dtype) == (batch, gate_dim, q_gate.dtype)
    heads_k = k_gate.shape[2]
    divides = heads % heads_k == 0 if heads_k else not heads
    if not (same and divides and k_gate.device == q_gate.device):
        raise ValueError(
            f"seer::gate_kl: k_gate: expected {q_gate.dtype} [{batch}, blocks_kv, heads_k, "
            f"{gate_dim}] on {q_gate.device}, heads_k a divisor of q_gate's {heads} heads, got "
            f"{k_gate.dtype} {list(k_gate.shape)} on {k_gate.device}. Pass both as AttnGate.embed "
            "returns them."
        )


def _check_reduction(op: str, reduction: str) -> None:
    if reduction not in ("element_mean", "row_mean"):
        raise ValueError(
            f"seer::{op}: reduction: expected element_mean or row_mean, got {reduction!r}. Choose "
            "one."
        )


def _check_packing(scores: Tensor, kind: str, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        if kind == "decode" and scores.dim() == 3:
            raise ValueError(
                "seer::gate_loss: cu_seqlens: expected the starts of the packed sequences with "
                f"scores {list(scores.shape)}, got None. Pass cu_seqlens, or scores with a batch "
                "dimension."
            )
        return
    if scores.dim() != 3:
        raise ValueError(
            "seer::gate_loss: scores: expected [heads, total, blocks_kv] with cu_seqlens, got "
            f"{list(scores.shape)}. Leave cu_seqlens out for a batch."
        )
    form = cu_seqlens.dtype in (torch.int32, torch.int64) and cu_seqlens.dim() == 1
    if not form or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "seer::gate_loss: cu_seqlens: expected int32 or int64 [sequences + 1], got "
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}. Pass those of attn_pool."
        )


def _dropped(rows: int | Tensor, share: int, drop_rows: int | None) -> int | Tensor:
    """Leading rows that are left out of `rows`."""
    if drop_rows is not None:
        return drop_rows
    return rows // share if share else 0


def _packed_weights(rows: int, cu_seqlens: Tensor, share: int, drop_rows: int | None) -> Tensor:
    """fp32 ``[rows]``: 1 / (counted sequences * kept rows of the own one); 0 where left out."""
    cu = cu_seqlens.to(torch.int64)
    length = cu.diff()
    first = _dropped(length, share, drop_rows)
    kept = (length - first).clamp_min(0)
    row = torch.arange(rows, device=cu.device)
    # Empty sequences share their start with the next one, which right=True finds.
    sequence = torch.searchsorted(cu[1:].contiguous(), row, right=True)
    inside = sequence < length.shape[0]
    sequence = sequence.clamp_max(length.shape[0] - 1)
    inside = inside & (row >= (cu[:-1] + first)[sequence])
    weight = 1 / (kept.clamp_min(1) * (kept > 0).sum().clamp_min(1)).to(torch.float32)
    return weight[sequence].masked_fill(~inside, 0)
