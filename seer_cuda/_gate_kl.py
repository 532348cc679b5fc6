# SPDX-License-Identifier: Apache-2.0
"""The distillation loss of a gate straight from its embeddings, without a score matrix.

`seer::_gate_kl` walks over chunks of query blocks. Each chunk's scores become its share of the loss
and of both gradients before the next chunk's exist, so one pass gives everything that forward and
backward need, in O(chunk) memory beside the inputs and the gradients. Rows that do not count are
not computed, nor columns that no row of a chunk sees. float64 embeddings are computed in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seer_cuda import _gate_math
from seer_cuda._attn_math import accumulation_dtype
from seer_cuda._fake import same_device

# Scores of a chunk, per prompt of the batch; about four fp32 tensors of this size exist at a time
# (32 MiB). Twelve chunks at 64k tokens and 32 heads, whose launches are nothing beside the
# attention that made the map. Where kept windows are trained on, launches are all that a step
# takes: so a batch, whose map is larger too, has larger chunks and not more of them.
_CHUNK_ELEMENTS = 1 << 21

_library = torch.library.Library("seer", "FRAGMENT")
_library.define(
    "_gate_kl(Tensor q_gate, Tensor k_gate, Tensor pooled, *, float? scale, bool causal, "
    "SymInt first_row, bool need_grad) -> (Tensor loss, Tensor grad_q, Tensor grad_k)"
)


def _scores(queries: Tensor, keys: Tensor, scale: float | None, causal: bool) -> Tensor:
    # The op where there is one: training then sees the very scores that inference selects by.
    if queries.dtype == torch.float64:
        return _gate_math.gate_scores(queries, keys, scale=scale, causal=causal)
    return torch.ops.seer.gate_scores(queries, keys, scale=scale, causal=causal)


def _chunk(scores: Tensor, pooled: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the rows' divergences, and their gradient to the scores. Overwrites scores."""
    hidden = scores == -torch.inf  # NaN is not: the loss must show what the gradients hold
    target = pooled.to(scores.dtype).masked_fill(hidden, 0)
    mass = target.sum(-1, keepdim=True)
    target = target.div_(mass.masked_fill(mass == 0, 1))
    # A finite floor in place of -inf: the softmax of a row without any visible block is defined.
    log_prob = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).log_softmax(-1)
    terms = torch.mul(target, log_prob, out=scores).masked_fill_(hidden, 0).neg_()
    terms += torch.xlogy(target, target)
    loss = terms.sum(-1).sum(dtype=torch.float64)
    if not need_grad:
        return loss, None
    # A row without a target has no divergence and no gradient: its softmax counts 0 times.
    return loss, log_prob.exp_().mul_(mass != 0).sub_(target)


def gate_kl(
    q_gate: Tensor,
    k_gate: Tensor,
    pooled: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    first_row: int = 0,
    need_grad: bool = True,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the rows from first_row on of ``KL(pooled / sum || softmax(scores))``.

    Returns the sum, fp32 (float64 for float64), and its gradients to q_gate and k_gate, fp32, empty
    unless needed.
    """
    batch, blocks_q, heads_q, gate_dim = q_gate.shape
    blocks_kv, heads_k = k_gate.shape[1:3]
    wide = accumulation_dtype(q_gate.dtype)
    loss = q_gate.new_zeros((), dtype=torch.float64)
    grad_q = q_gate.new_zeros(q_gate.shape if need_grad else 0, dtype=wide)
    grad_k = k_gate.new_zeros(k_gate.shape if need_grad else 0, dtype=wide)
    if not batch * heads_q:
        return loss.to(wide), grad_q, grad_k
    factor = gate_dim**-0.5 if scale is None else scale
    if need_grad:
        all_keys = _by_head(k_gate, heads_k).to(wide)
        key_grads = torch.zeros_like(all_keys)
    step = chunk_rows or max(1, _CHUNK_ELEMENTS // (heads_q * max(1, blocks_kv)))
    for first in range(first_row, blocks_q, step):
        last = min(first + step, blocks_q)
        # Bottom-right alignment of the slice is that of the whole: its last row sees its last key.
        seen = min(blocks_kv, last + blocks_kv - blocks_q) if causal else blocks_kv
        if seen <= 0:
            continue
        queries = q_gate[:, first:last]
        scores = _scores(queries, k_gate[:, :seen], scale, causal)
        share, grad = _chunk(scores, pooled[:, :, first:last, :seen], need_grad)
        loss += share
        if grad is None:
            continue
        grad = grad.mul_(factor).view(batch * heads_k, -1, seen)
        key_grads[:, :seen].baddbmm_(grad.mT, _by_head(queries, heads_k).to(wide))
        query_grads = (grad @ all_keys[:, :seen]).view(batch, heads_q, last - first, gate_dim)
        grad_q[:, first:last] = query_grads.transpose(1, 2)
    if need_grad:
        grad_k.copy_(key_grads.view(batch, heads_k, blocks_kv, gate_dim).transpose(1, 2))
    return loss.to(wide), grad_q, grad_k


def _by_head(gate: Tensor, heads: int) -> Tensor:
    """``[batch, blocks, heads * group, c]`` to ``[batch * heads, group * blocks, c]``."""
    return gate.transpose(1, 2).reshape(gate.shape[0] * heads, -1, gate.shape[3])


def _implementation(q_gate: Tensor, k_gate: Tensor, pooled: Tensor, **options: Any) -> tuple:
    # Autocast would round the fp32 operands.
    with torch.autocast(q_gate.device.type, enabled=False):
        return gate_kl(q_gate, k_gate, pooled, **options)


def _fake(
    q_gate: Tensor,
    k_gate: Tensor,
    pooled: Tensor,
    *,
    scale: float | None,
    causal: bool,
    first_row: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    same_device("_gate_kl", "q_gate", q_gate, k_gate=k_gate, pooled=pooled)
    wide = accumulation_dtype(q_gate.dtype)
    return (
        q_gate.new_empty((), dtype=wide),
        q_gate.new_empty(q_gate.shape if need_grad else 0, dtype=wide),
        k_gate.new_empty(k_gate.shape if need_grad else 0, dtype=wide),
    )


_library.impl("_gate_kl", _implementation, "CompositeExplicitAutograd")
torch.library.register_fake("seer::_gate_kl", _fake, lib=_library)


class GateKL(torch.autograd.Function):
    """`gate_kl` times weight, differentiable in both embeddings, once.

    The gradients are made on the way forward, where the scores are, and wait in fp32: they are
    1 / blocks of the score matrix that a backward would otherwise keep or make again.
    """

    @staticmethod
    def forward(
        ctx: Any, q_gate: Tensor, k_gate: Tensor, pooled: Tensor, weight: float, options: dict
    ) -> Tensor:
        need = any(ctx.needs_input_grad[:2])
        loss, *grads = torch.ops.seer._gate_kl(q_gate, k_gate, pooled, **options, need_grad=need)
        if need:
            ctx.save_for_backward(*grads)
        ctx.weight, ctx.dtypes = weight, (q_gate.dtype, k_gate.dtype)
        return loss * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad * ctx.weight
        grads = (
            (saved * factor).to(dtype) if needed else None
            for saved, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False
            )
        )
        return (*grads, None, None, None)
