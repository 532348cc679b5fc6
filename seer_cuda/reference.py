# SPDX-License-Identifier: Apache-2.0
"""The specification of every op, in float64 and in the most literal form we can write.

Each function has the arguments and the results of the op of the same name in ``torch.ops.seer``;
only the precision differs: inputs of any float type are converted to float64 first, and every
result is float64 (masks: the same int32 bits). It shares no code with a kernel. It runs on any
device, needs O(rows_q * rows_kv) memory, reads ``cu_seqlens`` on the host, and lets autograd
through wherever the op has a gradient.

Notation: query row r, key row c, query block i = r // block_q, KV block j = c // block_kv, query
head h, KV head u = h // group.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from seer_cuda._reference_blocks import (
    WORD,  # noqa: F401
    block_bits_from_indices,  # noqa: F401
    expand_blocks,
    gate_visible,
    pack_block_bits,
    spans,
    token_visible,
    unpack_block_bits,
)

POOLS = (("max", 1), ("min", 2), ("avg", 4))
THRESHOLD, TOPK, DENSITY, TOPP = range(4)


# -------------------------------------------------------------------------------- attention


def block_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_bits: Tensor | None = None,
    *,
    block_q: int = 64,
    block_kv: int = 64,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_rows_q: int = 0,
    max_rows_kv: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over the visible keys of the kept blocks.

    ``V(r) = {c : block (i, j) of (r, c) is kept, and c is visible to r}``
    ``lse[r] = ln sum_{c in V(r)} exp(scale q_r . k_c)``
    ``out[r] = sum_{c in V(r)} exp(scale q_r . k_c - lse[r]) v_c``

    V(r) empty gives ``out[r] = 0``, ``lse[r] = -inf``. What lies outside V(r) has no influence
    whatever it holds, NaN included. q ``[batch, rows_q, heads_q, head_dim]``, k and v
    ``[batch, rows_kv, heads_kv, head_dim]``; lse ``[batch, heads_q, rows_q]``. Packed varlen: q
    ``[total_q, heads_q, head_dim]``, k and v ``[total_kv, heads_kv, head_dim]``, lse
    ``[heads_q, total_q]``, sequence n being rows ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``
    clamped to ``[0, total]`` and to max_rows; rows of no sequence give 0 and -inf.
    """
    lengths = (cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv)
    out, lse = _empty_outputs(q)
    for n, at_q, at_kv in sequences(q, k, *lengths):
        keep = None
        if block_bits is not None:
            keep = kept_tokens(block_bits, n, q[at_q], k[at_kv], block_q, block_kv)
        out_n, lse_n, _ = _attend(q[at_q], k[at_kv], v[at_kv], keep, causal, scale)
        out[at_q] = out_n
        _lse_rows(lse, at_q).copy_(lse_n)
    return out, lse


def attn_pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_q: int = 64,
    block_kv: int = 64,
    causal: bool = True,
    scale: float | None = None,
    per_token: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_rows_q: int = 0,
    max_rows_kv: int = 0,
    reduce: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention and its block-pooled map (SeerAttention, Gao et al. 2024, section 3.2).

    ``P[r, c] = exp(scale q_r . k_c - lse[r])`` for visible c, 0 elsewhere
    ``pooled[i, j] = max_{r in block i, c in block j} P[r, c]``
    per_token: ``pooled[r, j] = max_{c in block j} P[r, c]``

    reduce 1: ``mean_{r in block i} sum_{c in block j} P[r, c]``, the mean over rows that exist

    out and lse as `block_sparse_attn` without a mask. pooled ``[batch, heads_q, blocks_q,
    blocks_kv]``, per_token ``[batch, heads_q, rows_q, blocks_kv]``, per_token and varlen
    ``[heads_q, total_q, blocks_kv]``; 0 where a shorter sequence ends.
    """
    varlen = cu_seqlens_q is not None
    lengths = (cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv)
    rows_q, rows_kv = (max_rows_q, max_rows_kv) if varlen else (q.shape[1], k.shape[1])
    batch, heads = cu_seqlens_q.shape[0] - 1 if varlen else q.shape[0], q.shape[-2]
    blocks_q, blocks_kv = -(-rows_q // block_q), -(-rows_kv // block_kv)
    out, lse = _empty_outputs(q)
    held = (heads, q.shape[0]) if varlen else (batch, heads, rows_q)
    pooled = out.new_zeros(*(held if per_token else (batch, heads, blocks_q)), blocks_kv)
    for n, at_q, at_kv in sequences(q, k, *lengths):
        out_n, lse_n, prob = _attend(q[at_q], k[at_kv], v[at_kv], None, causal, scale)
        out[at_q] = out_n
        _lse_rows(lse, at_q).copy_(lse_n.detach())
        height, pool = 1 if per_token else block_q, block_mean_sum if reduce else block_max
        map_n = pool(prob.detach(), height, block_kv)
        where = pooled[:, at_q] if per_token and varlen else pooled[n]
        where[:, : map_n.shape[1], : map_n.shape[2]] = map_n
    return out, lse, pooled


def _attend(q, k, v, keep, causal, scale):
    """One sequence: out ``[rows_q, heads, d]``, lse ``[heads, rows_q]``, P ``[heads, rows_q, c]``.

    keep: bool ``[heads, rows_q, rows_kv]`` or None.
    """
    rows_q, heads_q, head_dim = q.shape
    rows_kv, heads_kv = k.shape[:2]
    u = torch.arange(heads_q, device=q.device) // max(1, heads_q // max(1, heads_kv))
    q64 = q.to(torch.float64).transpose(0, 1)
    k64 = k.to(torch.float64).transpose(0, 1)[u]
    v64 = v.to(torch.float64).transpose(0, 1)[u]
    scale = head_dim**-0.5 if scale is None else scale

    seen = token_visible(rows_q, rows_kv, causal, q.device).expand(heads_q, rows_q, rows_kv)
    if keep is not None:
        seen = seen & keep
    score = (scale * q64 @ k64.transpose(1, 2)).masked_fill(~seen, -math.inf)
    empty = ~seen.any(-1)
    # exp(s - top) / sum exp(s - top) is the softmax for any finite top; 0 serves empty rows.
    top = score.detach().amax(-1) if rows_kv else score.new_zeros(heads_q, rows_q)
    top = top.masked_fill(empty, 0.0)
    weight = (score - top[..., None]).exp().masked_fill(~seen, 0.0)
    mass = weight.sum(-1).masked_fill(empty, 1.0)
    prob = weight / mass[..., None]
    lse = (top + mass.log()).masked_fill(empty, -math.inf)

    # sum over V(r) only: 0 * NaN would be NaN, so columns of v that are not finite are added
    # one by one, to the rows that see them.
    finite = v64.isfinite().all(-1)
    out = prob @ v64.masked_fill(~finite[..., None], 0.0)
    for head, c in (~finite & seen.any(1)).nonzero().tolist():
        term = prob[head, :, c, None] * v64[head, c]
        out[head] += term.masked_fill(~seen[head, :, c, None], 0.0)
    return out.transpose(0, 1), lse, prob


def kept_tokens(block_bits, n, q, k, block_q, block_kv):
    """The mask of sequence n for every query head and token: ``[heads_q, rows_q, rows_kv]``."""
    rows_q, heads_q = q.shape[:2]
    rows_kv = k.shape[0]
    batch, heads = block_bits.shape[:2]
    bits = block_bits[n if batch > 1 else 0]
    h = torch.arange(heads_q, device=q.device) // (heads_q // heads)
    mask = unpack_block_bits(bits, -(-rows_kv // block_kv))[h]
    return expand_blocks(mask, block_q, block_kv, rows_q, rows_kv)


def sequences(q, k, cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv):
    """Yields (n, index into q, index into k) of each sequence of the batch."""
    if cu_seqlens_q is None:
        for n in range(q.shape[0]):
            yield n, n, n
        return
    at_q = spans(cu_seqlens_q, q.shape[0], max_rows_q)
    at_kv = spans(cu_seqlens_kv, k.shape[0], max_rows_kv)
    yield from zip(range(len(at_q)), at_q, at_kv, strict=True)


def _empty_outputs(q):
    """What a row that belongs to nothing gets: out 0, lse -inf."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return out, out.new_full(shape, -math.inf)


def _lse_rows(lse, at_q):
    """The rows of lse ``[heads, rows]`` that belong to index at_q of the queries."""
    return lse[:, at_q] if lse.dim() == 2 else lse[at_q]


def block_tiles(x, block_q, block_kv):
    """``[..., blocks_q, block_q, blocks_kv, block_kv]``: ragged blocks are padded by 0."""
    blocks_q, blocks_kv = -(-x.shape[-2] // block_q), -(-x.shape[-1] // block_kv)
    padded = x.new_zeros(*x.shape[:-2], blocks_q * block_q, blocks_kv * block_kv)
    padded[..., : x.shape[-2], : x.shape[-1]] = x
    return padded.unflatten(-1, (blocks_kv, block_kv)).unflatten(-3, (blocks_q, block_q))


def block_max(x, block_q, block_kv):
    """Maximum over blocks of ``[..., rows_q, rows_kv]``, x >= 0."""
    return block_tiles(x, block_q, block_kv).amax((-3, -1))


def reachable_blocks(
    rows_q: int, rows_kv: int, block_q: int, block_kv: int, causal: bool, device=None
) -> Tensor:
    """bool ``[blocks_q, blocks_kv]``: the block holds at least one visible (r, c) pair."""
    visible = token_visible(rows_q, rows_kv, causal, device)
    return block_max(visible.to(torch.float64), block_q, block_kv) > 0


def block_mean_sum(x, block_q, block_kv):
    """Sum along the columns of each block, mean over those of its rows that exist."""
    rows = block_tiles(torch.ones_like(x[..., :1]), block_q, 1).sum((-3, -1))
    return block_tiles(x, block_q, block_kv).sum((-3, -1)) / rows


# -------------------------------------------------------------------------------- the gate


def pool_gate(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    block: int = 64,
    pools: int = 4,
    max_rows: int = 0,
) -> Tensor:
    """Block pooling, per-head projection, RoPE (SeerAttention, section 3.1).

    ``p[n] = concat(max_t x_t, min_t x_t, mean_t x_t)`` over the tokens t of block n that exist,
    those of the three that `pools` names (1 max, 2 min, 4 avg), always in this order
    ``g[n, h] = p[n, h // (heads_out / heads)] @ weight[h]``, or p itself without a weight
    ``y[:w] = g[:w] cos[n] - g[w:2w] sin[n];  y[w:2w] = g[w:2w] cos[n] + g[:w] sin[n]``

    with w = rot / 2 the width of cos and sin; channels from 2w on stay. x ``[batch, rows, heads,
    head_dim]``, weight ``[heads_out, len(pools) * head_dim, gate_dim]``, cos and sin ``[blocks,
    w]`` or ``[batch | 1, blocks, w]``. Returns ``[batch, blocks, heads_out, gate_dim]``.

    Packed: x ``[total, heads, head_dim]``, each sequence by itself, blocks = ceil(max_rows /
    block) and 0 past its last one.
    """
    if cu_seqlens is not None:
        heads, channels = x.shape[1], x.shape[2] * pools.bit_count()
        heads, width = (heads, channels) if weight is None else (weight.shape[0], weight.shape[2])
        batch, blocks = cu_seqlens.shape[0] - 1, -(-max_rows // block)
        out = torch.zeros(batch, blocks, heads, width, dtype=torch.float64, device=x.device)
        for n, at in enumerate(spans(cu_seqlens, x.shape[0], max_rows)):
            own = -(-(at.stop - at.start) // block)
            angles = (t if t is None else t.expand(batch, -1, -1)[n, :own] for t in (cos, sin))
            out[n, :own] = pool_gate(x[None, at], weight, *angles, block=block, pools=pools)[0]
        return out
    x64 = x.to(torch.float64)
    pooled = []
    for start in range(0, x.shape[1], block):
        tokens = x64[:, start : start + block]
        kinds = {"max": tokens.amax(1), "min": tokens.amin(1), "avg": tokens.mean(1)}
        pooled.append(torch.cat([kinds[name] for name, bit in POOLS if pools & bit], dim=-1))
    width = x.shape[3] * pools.bit_count()
    gate = torch.stack(pooled, 1) if pooled else x64.new_zeros(x.shape[0], 0, x.shape[2], width)
    if weight is not None:
        gate = gate.repeat_interleave(weight.shape[0] // x.shape[2], dim=2)
        gate = torch.einsum("bnhi,hio->bnho", gate, weight.to(torch.float64))
    if cos is None:
        return gate
    half = cos.shape[-1]
    cos64, sin64 = (t.to(torch.float64).unsqueeze(-2) for t in (cos, sin))
    first, second, rest = gate.split([half, half, gate.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos64 - second * sin64, second * cos64 + first * sin64, rest], dim=-1)


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
) -> Tensor:
    """``A[h, i, j] = scale q_gate[i, h] . k_gate[j, u]``, -inf where i does not see j.

    q_gate ``[batch, blocks_q, heads_q, gate_dim]``, k_gate ``[batch, blocks_kv, heads_k,
    gate_dim]``, u = h // (heads_q / heads_k). Returns ``[batch, heads_q, blocks_q, blocks_kv]``.
    Packed: each sequence's own blocks by themselves, -inf past them.
    """
    if cu_seqlens_q is not None:
        shape = (q_gate.shape[0], q_gate.shape[2], q_gate.shape[1], k_gate.shape[1])
        out = torch.full(shape, -math.inf, dtype=torch.float64, device=q_gate.device)
        for n, i, j in gate_blocks(q_gate, k_gate, cu_seqlens_q, cu_seqlens_kv, block_q, block_kv):
            rule = {"scale": scale, "causal": causal}
            out[n, :, :i, :j] = gate_scores(q_gate[n, None, :i], k_gate[n, None, :j], **rule)[0]
        return out
    scale = q_gate.shape[-1] ** -0.5 if scale is None else scale
    group = q_gate.shape[2] // k_gate.shape[2]
    k64 = k_gate.to(torch.float64).repeat_interleave(group, dim=2)
    score = scale * torch.einsum("bihd,bjhd->bhij", q_gate.to(torch.float64), k64)
    seen = gate_visible(q_gate.shape[1], k_gate.shape[1], causal, q_gate.device)
    return score.masked_fill(~seen, -math.inf)


def gate_blocks(q_gate, k_gate, cu_seqlens_q, cu_seqlens_kv, block_q, block_kv):
    """(n, query blocks, KV blocks) of every packed sequence."""
    counts = []
    for gate, cu, block in ((q_gate, cu_seqlens_q, block_q), (k_gate, cu_seqlens_kv, block_kv)):
        rows = [max(b - a, 0) for a, b in pairwise(cu.tolist())]
        counts.append([min(-(-n // block), gate.shape[1]) for n in rows])
    return list(zip(range(len(counts[0])), *counts, strict=True))


def select_blocks(
    scores: Tensor,
    *,
    causal: bool = True,
    method: int = THRESHOLD,
    value: float = 0.0,
    sink: int = 0,
    local: int = 0,
    dense_last_rows: int = 0,
) -> Tensor:
    """The selection rule on given scores: bool ``[..., blocks_q, blocks_kv]``.

    Candidates of row i are the visible blocks with a score that is not NaN;
    ``p = softmax(score)`` over the candidates; rank 0 is the highest score, ties to the lower
    index.

    threshold ``p > value``;  topk ``rank < int(value)``;  density ``rank < k`` with
    ``k = max(1, floor((1 - sqrt(1 - value)) blocks_kv))``;  topp ``mass of the ranks before <
    value`` or rank 0: the smallest set whose mass reaches value.

    Then also kept, where visible: the first `sink` blocks, the last `local` visible blocks of
    the row, and every block of the last `dense_last_rows` rows.
    """
    blocks_q, blocks_kv = scores.shape[-2:]
    seen = gate_visible(blocks_q, blocks_kv, causal, scores.device)
    candidate = seen & ~scores.isnan()
    score = scores.masked_fill(~candidate, -math.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(-1)
    prob = score.softmax(-1).masked_fill(~candidate, 0.0)

    if method == THRESHOLD:
        kept = prob > value
    elif method == TOPK:
        kept = rank < int(value)
    elif method == DENSITY:
        kept = rank < max(1, math.floor((1.0 - math.sqrt(1.0 - value)) * blocks_kv))
    else:
        descending = prob.gather(-1, order)
        before = (descending.cumsum(-1) - descending).gather(-1, rank)
        kept = (before < value) | (rank == 0)
    kept = kept & candidate

    i = torch.arange(blocks_q, device=scores.device)[:, None]
    j = torch.arange(blocks_kv, device=scores.device)[None, :]
    last = i + blocks_kv - blocks_q if causal else torch.full_like(i, blocks_kv - 1)
    forced = (j < sink) | (j > last - local) | (i >= blocks_q - dense_last_rows)
    return kept | (forced & seen)


def gate_select(
    q_gate: Tensor,
    k_gate: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    *,
    scale=None,
    causal=True,
    block_q=64,
    block_kv=64,
    **rule,
) -> Tensor:
    """`gate_scores`, then `select_blocks` with `rule`, packed: int32 ``[batch, heads_q, blocks_q,
    ceil(blocks_kv / 32)]``. Packed sequences: by themselves; rows and bits past them are 0."""
    scores = gate_scores(q_gate, k_gate, scale=scale, causal=False)
    if cu_seqlens_q is None:
        return pack_block_bits(select_blocks(scores, causal=causal, **rule))
    lengths = (cu_seqlens_q, cu_seqlens_kv, block_q, block_kv)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for n, i, j in gate_blocks(q_gate, k_gate, *lengths):
        kept[n, :, :i, :j] = select_blocks(scores[n, :, :i, :j], causal=causal, **rule)
    return pack_block_bits(kept)
