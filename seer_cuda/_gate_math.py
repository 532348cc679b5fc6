# SPDX-License-Identifier: Apache-2.0
"""The learned gate (SeerAttention, Gao et al. 2024, section 3.1) in torch operators.

Serves `seer::pool_gate`, `seer::gate_scores` and `seer::gate_select` on devices without a compiled
kernel, and the gradients of the first two everywhere. Nothing here reads a tensor's value on the
host. float64 inputs are computed in float64, all others in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seer_cuda import _gate_packed
from seer_cuda._attn_math import accumulation_dtype, matmul
from seer_cuda._gate_pooling import POOL_AVG, pooled, pooled_backward

THRESHOLD, TOP_K, DENSITY, TOP_P = range(4)

_MASS_ONE = 1 << 52  # probability 1 in fixed point
_TILE_ELEMENTS = 1 << 24  # scores selected at a time; a sort needs 24 bytes per element


# ------------------------------------------------------------------------------------- pool_gate


def rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """NeoX RoPE on channels [0, 2w): ``[y1 cos - y2 sin, y2 cos + y1 sin, rest]``.

    y ``[batch, blocks, heads, channels]``; cos and sin ``[blocks, w]`` or ``[batch|1, blocks, w]``.
    Its transpose, which is its inverse where cos and sin are unscaled, is a rotation by -sin.
    """
    half = cos.shape[-1]
    cos, sin = (table.to(y.dtype).unsqueeze(-2) for table in (cos, sin))
    first, second, rest = y.split([half, half, y.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def norm_rotate(
    y: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """RMSNorm over the channels, then `rotate`: what stands behind the projection where a gate
    normalises its embeddings (SeerAttention-R, Gao et al. 2025, section 2.2).

    y ``[batch, blocks, heads, gate_dim]``, weight ``[gate_dim]``. The mean square is taken in fp32;
    the normalised value is rounded to y's dtype before the weight multiplies it, as the
    reference's gates were trained.
    """
    wide = accumulation_dtype(y.dtype)
    z = y.to(wide)
    z = (z * (z.square().mean(-1, keepdim=True) + eps).rsqrt()).to(y.dtype) * weight.to(y.dtype)
    return z if cos is None else rotate(z.to(wide), cos, sin).to(y.dtype)


def _by_input_head(y: Tensor, heads: int) -> Tensor:
    """``[batch, blocks, heads_out, c]`` to ``[heads, batch * blocks, (heads_out / heads) * c]``."""
    batch, blocks, heads_out, channels = y.shape
    y = y.unflatten(2, (heads, heads_out // heads)).permute(2, 0, 1, 3, 4)
    return y.reshape(heads, batch * blocks, heads_out // heads * channels)


def _weight_by_input_head(weight: Tensor, heads: int) -> Tensor:
    """``[heads_out, c, gate_dim]`` to ``[heads, c, (heads_out / heads) * gate_dim]``."""
    group = weight.shape[0] // heads
    weight = weight.unflatten(0, (heads, group)).transpose(1, 2)
    return weight.reshape(heads, weight.shape[1], group * weight.shape[3])


def pool_gate(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    block: int = 64,
    pools: int = POOL_AVG,
    max_rows: int = 0,
) -> Tensor:
    """`seer::pool_gate` on any device (contract: `seer_cuda.pool_gate`)."""
    gate = pooled(x, cu_seqlens, block, pools, max_rows)
    batch, blocks, heads, _ = gate.shape
    if weight is not None and heads:
        heads_out, _, gate_dim = weight.shape
        # One product per input head serves all output heads that read it.
        gate = matmul(_by_input_head(gate, heads), _weight_by_input_head(weight, heads))
        gate = gate.view(heads, batch, blocks, heads_out // heads, gate_dim)
        gate = gate.permute(1, 2, 0, 3, 4).flatten(2, 3)
    elif weight is not None:
        gate = gate.new_zeros(batch, blocks, 0, weight.shape[2])
    if cos is not None:
        gate = rotate(gate.to(accumulation_dtype(x.dtype)), cos, sin)
    return gate.to(x.dtype).contiguous()


def pool_gate_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    block: int = 64,
    pools: int = POOL_AVG,
    max_rows: int = 0,
    need_x: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `pool_gate` to x and weight, None where not needed."""
    wide = accumulation_dtype(x.dtype)
    grad = grad.to(wide)
    if cos is not None:
        grad = rotate(grad, cos, -sin)
    cut = (cu_seqlens, block, pools, max_rows)
    if weight is None:
        return (pooled_backward(grad, x, *cut) if need_x else None), None
    heads = x.shape[-2]
    if not heads or not x.shape[0] or not x.shape[1]:
        return torch.zeros_like(x) if need_x else None, torch.zeros_like(weight)
    _, channels, gate_dim = weight.shape
    batch = grad.shape[0]
    grad = _by_input_head(grad, heads)
    grad_x = grad_weight = None
    if need_weight:
        channels_in = _by_input_head(pooled(x, *cut), heads).to(wide)
        grad_weight = (channels_in.transpose(1, 2) @ grad).view(heads, channels, -1, gate_dim)
        grad_weight = grad_weight.transpose(1, 2).reshape(weight.shape).to(weight.dtype)
    if need_x:
        by_head = _weight_by_input_head(weight, heads).to(wide)
        grad_pooled = (grad @ by_head.transpose(1, 2)).view(heads, batch, -1, channels)
        grad_x = pooled_backward(grad_pooled.permute(1, 2, 0, 3), x, *cut)
    return grad_x, grad_weight


# -------------------------------------------------------------------------------------- scores


def block_visible(
    blocks_q: int,
    blocks_kv: int,
    causal: bool,
    device: torch.device,
    first: int = 0,
    last: int | None = None,
) -> Tensor:
    """bool ``[last - first, blocks_kv]``: i in [first, last) sees j <= i + blocks_kv - blocks_q."""
    i = torch.arange(first, blocks_q if last is None else last, device=device)[:, None]
    j = torch.arange(blocks_kv, device=device)
    return j <= i + (blocks_kv - blocks_q) if causal else (j >= 0) & (i >= 0)


def _visible(
    q_gate: Tensor,
    k_gate: Tensor,
    extents: _gate_packed.Extents | None,
    causal: bool,
    first: int,
    last: int,
) -> Tensor:
    """What the query blocks [first, last) see: bool, broadcast over ``[batch, heads]`` in front."""
    if extents is None:
        return block_visible(q_gate.shape[1], k_gate.shape[1], causal, q_gate.device, first, last)
    return extents.visible(k_gate.shape[1], causal, first, last)


def _extents(
    q_gate: Tensor,
    k_gate: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    block_q: int,
    block_kv: int,
) -> _gate_packed.Extents | None:
    if cu_seqlens_q is None or cu_seqlens_kv is None:
        return None
    lengths = (cu_seqlens_q, cu_seqlens_kv, block_q, block_kv)
    return _gate_packed.Extents.of(q_gate, k_gate, *lengths)


def gate_scores(
    q_gate: Tensor,
    k_gate: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    block_q: int = 64,
    block_kv: int = 64,
    first: int = 0,
    last: int | None = None,
) -> Tensor:
    """`seer::gate_scores` on any device, of the query blocks [first, last)."""
    batch, blocks_q, heads_q, gate_dim = q_gate.shape
    blocks_kv, heads_k = k_gate.shape[1:3]
    scale = gate_dim**-0.5 if scale is None else scale
    last = blocks_q if last is None else last
    shape = (batch, heads_q, last - first, blocks_kv)
    wide = accumulation_dtype(q_gate.dtype)
    if 0 in shape:
        return q_gate.new_zeros(shape, dtype=wide)
    queries = q_gate[:, first:last].transpose(1, 2)
    queries = queries.reshape(batch * heads_k, -1, gate_dim)
    keys = k_gate.permute(0, 2, 3, 1).reshape(batch * heads_k, gate_dim, blocks_kv)
    scores = matmul(queries, keys).mul_(scale).view(shape)
    extents = _extents(q_gate, k_gate, cu_seqlens_q, cu_seqlens_kv, block_q, block_kv)
    if causal or extents is not None:
        visible = _visible(q_gate, k_gate, extents, causal, first, last)
        scores = scores.masked_fill_(~visible, -torch.inf)
    return scores


def gate_scores_backward(
    grad: Tensor,
    q_gate: Tensor,
    k_gate: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    block_q: int = 64,
    block_kv: int = 64,
) -> tuple[Tensor, Tensor]:
    """Gradients of `gate_scores` to q_gate and k_gate; what hidden scores receive is dropped."""
    _, blocks_q, heads_q, gate_dim = q_gate.shape
    heads_k = k_gate.shape[2]
    wide = accumulation_dtype(q_gate.dtype)
    scale = gate_dim**-0.5 if scale is None else scale
    extents = _extents(q_gate, k_gate, cu_seqlens_q, cu_seqlens_kv, block_q, block_kv)
    if causal or extents is not None:
        visible = _visible(q_gate, k_gate, extents, causal, 0, blocks_q)
        grad = grad.masked_fill(~visible, 0)
    if extents is not None:
        q_gate, k_gate = extents.cleared(q_gate, k_gate)
    grad = (grad.to(wide) * scale).unflatten(1, (heads_k, heads_q // heads_k))
    queries = q_gate.to(wide).unflatten(2, (heads_k, heads_q // heads_k))
    grad_q = torch.einsum("bugij,bjud->biugd", grad, k_gate.to(wide)).flatten(2, 3)
    grad_k = torch.einsum("bugij,biugd->bjud", grad, queries)
    return grad_q.to(q_gate.dtype), grad_k.to(k_gate.dtype)


# ----------------------------------------------------------------------------------- selection


def blocks_of_density(density: float, blocks_kv: int) -> int:
    """k that keeps about `density` of a causal triangle: max(1, floor((1 - sqrt(1 - d)) n))."""
    return max(1, math.floor((1.0 - math.sqrt(1.0 - density)) * blocks_kv))


def select_scores(
    scores: Tensor,
    visible: Tensor,
    method: int,
    value: float,
    probabilities: bool = False,
    blocks_kv: Tensor | None = None,
) -> Tensor:
    """The selection rules: bool, shape of scores ``[..., rows, blocks_kv]``.

    Candidates are the visible blocks whose score is not NaN; ties go to the lower index.
    probabilities: scores are used as they are, not through a softmax. blocks_kv: what a density
    counts for each row, default the last dimension.
    """
    candidate = visible & ~scores.isnan()
    # The floor ranks candidates with a score of -inf before everything that is no candidate.
    floor = torch.finfo(scores.dtype).min
    scores = scores.clamp_min(floor).masked_fill(~candidate, -torch.inf)
    if method == DENSITY and blocks_kv is not None:
        share = (1.0 - math.sqrt(1.0 - value)) * blocks_kv.to(torch.float64)
        rank = torch.arange(scores.shape[-1], device=scores.device)
        first = (rank < share.floor().clamp_min(1)).expand_as(candidate)
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        return torch.zeros_like(candidate).scatter_(-1, order, first) & candidate
    if method in (TOP_K, DENSITY):
        k = int(value) if method == TOP_K else blocks_of_density(value, scores.shape[-1])
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return torch.zeros_like(candidate).scatter_(-1, best, True) & candidate
    mass = scores if probabilities else _softmax(scores, candidate)
    if method == THRESHOLD:
        return (mass > value) & candidate
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    # Fixed point: integer sums do not depend on their order, so the result is reproducible.
    ranked = mass.masked_fill(~candidate, 0).gather(-1, order).to(torch.float64)
    ranked = (ranked * _MASS_ONE).to(torch.int64)
    before = (ranked.cumsum(-1) - ranked).to(torch.float64) / _MASS_ONE
    # Compared in fp32 like the probabilities: 1/10 of the mass must not exceed a value of 0.1.
    kept = before.to(torch.float32) < value
    kept[..., :1] = True
    return torch.zeros_like(candidate).scatter_(-1, order, kept) & candidate


def _softmax(scores: Tensor, candidate: Tensor) -> Tensor:
    """Softmax over the candidates, 0 elsewhere, also where all candidates are -inf.

    Scores equal to the maximum weigh 1 even if it is infinite: an overflow of the gate shares the
    mass instead of spreading NaN.
    """
    top = scores.amax(-1, keepdim=True)
    weight = (scores - top).exp().masked_fill(scores == top, 1).masked_fill(~candidate, 0)
    total = weight.sum(-1, keepdim=True, dtype=torch.float64).to(scores.dtype)
    return weight / total.clamp_min(1)


def forced_blocks(
    visible: Tensor,
    blocks_q: int | Tensor,
    sink: int,
    local: int,
    dense_last_rows: int,
    first: int = 0,
) -> Tensor:
    """bool like visible ``[..., rows, blocks_kv]``: visible blocks kept whatever their score.

    Row 0 of visible is query block `first` of blocks_q.
    """
    j = torch.arange(visible.shape[-1], device=visible.device)
    i = torch.arange(first, first + visible.shape[-2], device=visible.device)[:, None]
    # The visible blocks of a row are a prefix, so its size places the last ones.
    recent = j >= visible.sum(-1, keepdim=True) - local
    return ((j < sink) | recent | (i >= blocks_q - dense_last_rows)) & visible


def gate_select(
    q_gate: Tensor,
    k_gate: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    method: int = THRESHOLD,
    value: float = 0.0,
    sink: int = 0,
    local: int = 0,
    dense_last_rows: int = 0,
    block_q: int = 64,
    block_kv: int = 64,
    chunk_rows: int | None = None,
) -> Tensor:
    """`seer::gate_select` on any device; scores of `chunk_rows` query blocks exist at a time."""
    batch, blocks_q, heads_q, _ = q_gate.shape
    blocks_kv = k_gate.shape[1]
    words = -(-blocks_kv // 32)
    bits = q_gate.new_zeros((batch, heads_q, blocks_q, words), dtype=torch.int32)
    if bits.numel() == 0:
        return bits
    extents = _extents(q_gate, k_gate, cu_seqlens_q, cu_seqlens_kv, block_q, block_kv)
    own_q, own_kv = extents or (blocks_q, None)
    step = chunk_rows or max(1, _TILE_ELEMENTS // (batch * heads_q * blocks_kv))
    for first in range(0, blocks_q, step):
        last = min(first + step, blocks_q)
        scores = gate_scores(
            q_gate,
            k_gate,
            cu_seqlens_q,
            cu_seqlens_kv,
            scale=scale,
            causal=causal,
            block_q=block_q,
            block_kv=block_kv,
            first=first,
            last=last,
        )
        visible = _visible(q_gate, k_gate, extents, causal, first, last)
        kept = select_scores(scores, visible, method, value, blocks_kv=own_kv)
        kept |= forced_blocks(visible, own_q, sink, local, dense_last_rows, first)
        bits[:, :, first:last] = torch.ops.seer.pack_block_bits(kept)
    return bits
