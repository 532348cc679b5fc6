# SPDX-License-Identifier: Apache-2.0
"""The same mathematics in plain torch at the input type with fp32 accumulation.

A baseline is what a careful but unfused program would compute: inputs exact in fp32, products
accumulated in fp32, softmax weights rounded to the input type before the second product, one
rounding at the end. Its distance from the oracle measures what the input type costs on these very
inputs; a kernel may be off twice as far (docs/numerics.md). Next to the results it gives the
magnitudes that the error model needs.
"""

import math
from dataclasses import dataclass

import numerics
import torch
from numerics import EPS32, FAST_MATH
from torch import Tensor

from seer_cuda import reference


@dataclass
class AttentionBaseline:
    """out, lse, prob of plain torch; row_limit and score_error of the error model."""

    out: Tensor  # of the input type, the shape of q
    lse: Tensor  # fp32, as the op
    delta: float  # bound of |error| of a score (logit) and of lse relative to its terms
    spread: Tensor  # per (row, head): sqrt(sum_c p^2 |v_c|^2), what roundings of p are scaled by
    mass: Tensor  # per (row, head): sum_c p |v_c|, what a common error of the scores is scaled by
    peak: float  # max over elements of sum_c p |v_cd|
    prob: list[Tensor]  # per sequence [heads_q, rows_q, rows_kv] fp32

    def row_limit(self, ref: Tensor) -> Tensor:
        """L2 limit of each row of out: one ulp for p, one for out, and the error of the scores."""
        eps = numerics.ulp(self.out.dtype)
        return eps * (self.spread + ref.norm(dim=-1)) + 2 * self.delta * self.mass


def attention(
    q,
    k,
    v,
    block_bits=None,
    *,
    block_q=64,
    block_kv=64,
    causal=True,
    scale=None,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_rows_q=0,
    max_rows_kv=0,
) -> AttentionBaseline:
    """The arguments are those of torch.ops.seer.block_sparse_attn."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(
        (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1]),
        -math.inf,
        device=q.device,
    )
    spread = torch.zeros(q.shape[:-1], dtype=torch.float64, device=q.device)
    mass = torch.zeros_like(spread)
    peak, bound, probs = 0.0, 0.0, []
    lengths = (cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv)
    for n, at_q, at_kv in reference.sequences(q, k, *lengths):
        group = max(1, q.shape[-2] // max(1, k.shape[-2]))
        qh = q[at_q].float().transpose(0, 1)
        kh, vh = (x[at_kv].float().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        seen = reference.token_visible(qh.shape[1], kh.shape[1], causal, q.device)
        seen = seen.expand(len(qh), -1, -1)
        if block_bits is not None:
            seen = seen & reference.kept_tokens(block_bits, n, q[at_q], k[at_kv], block_q, block_kv)
        score = (qh @ kh.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
        if score.numel() == 0:
            probs.append(torch.zeros_like(score))
            continue
        top = score.amax(-1, keepdim=True)
        top = top.masked_fill(top.isneginf(), 0.0)
        weight = (score - top).exp()
        total = weight.sum(-1)
        used = total.masked_fill(total == 0, 1.0)
        safe_v = vh.masked_fill(~vh.isfinite(), 0.0)
        rounded = weight.to(q.dtype).float()
        out[at_q] = (rounded @ safe_v / used[..., None]).to(q.dtype).transpose(0, 1)
        lse_n = top[..., 0] + total.log()
        (lse[:, at_q] if lse.dim() == 2 else lse[at_q]).copy_(lse_n)
        prob = weight / used[..., None]
        probs.append(prob)
        norm = safe_v.norm(dim=-1)[:, None, :]
        spread[at_q] = (prob * norm).square().sum(-1).sqrt().transpose(0, 1).double()
        mass[at_q] = (prob * norm).sum(-1).transpose(0, 1).double()
        peak = max(peak, float((prob @ safe_v.abs()).max()))
        safe_k = kh.masked_fill(~kh.isfinite(), 0.0)
        sizes = (qh.abs() @ safe_k.abs().transpose(1, 2)) * abs(scale)
        bound = max(bound, float(sizes.masked_fill(~seen, 0.0).nan_to_num(0.0).max()))
    delta = score_error(bound, q.shape[-1], equal_terms(q, k))
    return AttentionBaseline(out, lse, delta, spread, mass, peak, probs)


def equal_terms(*tensors: Tensor) -> bool:
    """Whether each row of the tensors repeats one value: all terms of a dot product are equal.

    Rows that are not finite hold no terms.
    """
    return all(
        bool(((x == x[..., :1]) | ~x.isfinite().all(-1, keepdim=True)).all()) for x in tensors
    )


def score_error(bound: float, terms: int, equal: bool) -> float:
    """Bound of the error of a dot product of `terms` terms accumulated in fp32.

    bound is the largest ``scale sum |q_d k_d|``. Roundings of unrelated terms add up as
    sqrt(terms). Those of equal terms all point one way: each of the terms - 1 additions rounds by
    at most 2^-24 of the sum so far (Higham 2002, section 3.1). Four more ulp are for scale,
    log2(e), the difference to the running maximum and exp2 itself.
    """
    additions = terms / 2 if equal else math.sqrt(terms)
    return EPS32 * (additions + 4) * bound + FAST_MATH


def pooled_map(base: AttentionBaseline, block_q: int, block_kv: int, shape, per_token=False):
    """The map of attn_pool from base.prob, in the layout of the op without varlen."""
    maps = [
        reference.block_max(p.double(), 1 if per_token else block_q, block_kv) for p in base.prob
    ]
    return torch.stack(maps).float() if maps else torch.zeros(shape)


def attention_grads(q, k, v, grad_out, *, causal=True, scale=None):
    """Gradients of dense attention as a fused backward computes them.

    ``dV = P^T dO;  dS = P (dO V^T - rowsum(dO out));  dQ = scale dS K;  dK = scale dS^T Q`` with P
    and dS rounded to the input type before their products, sums over the group in fp32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    base = attention(q, k, v, causal=causal, scale=scale)
    prob = torch.stack(base.prob)

    def rounded(x):
        return x.to(q.dtype).float()

    qh, do, o = (x.float().transpose(1, 2) for x in (q, grad_out, base.out))
    kh, vh = (x.float().transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    ds = prob * (do @ vh.transpose(2, 3) - (do * o).sum(-1, keepdim=True))
    dq = scale * rounded(ds) @ kh
    dk = scale * rounded(ds).transpose(2, 3) @ qh
    dv = rounded(prob).transpose(2, 3) @ do
    dk, dv = (x.unflatten(1, (k.shape[2], group)).sum(2) for x in (dk, dv))
    return tuple(x.transpose(1, 2).to(q.dtype) for x in (dq, dk, dv))


def attention_grads_error(q, k, v, grad_out, base: AttentionBaseline, *, scale=None):
    """Bounds of |error| of dQ and dK from what ``dS = P (dO V^T - rowsum(dO out))`` subtracts.

    Where the two cancel, as they do for a row that sees one key, nothing else is left; and a
    problem of few rows has no other rounding by which a baseline could show it. With n = head_dim
    unrelated terms either sum is off by ``2^-23 sqrt(n) |dO| |V|`` in fp32, and that of out, which
    was rounded to its type, by ``ulp / 2 sqrt(sum_d (dO_d out_d)^2)``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    sizes = grad_out.double().norm(dim=-1).max() * v.double().norm(dim=-1).max()
    rounded = (grad_out.double() * base.out.double()).norm(dim=-1).max()
    noise = 2 * EPS32 * math.sqrt(q.shape[-1]) * float(sizes)
    noise = abs(scale) * (noise + numerics.ulp(q.dtype) / 2 * float(rounded))
    column = torch.stack(base.prob).double().sum(2)  # of P, by query head
    column = column.unflatten(1, (k.shape[2], group)).sum(2)
    return noise * float(k.abs().max()), noise * float(column.max()) * float(q.abs().max())


def pool_gate(x, weight=None, cos=None, sin=None, *, block=64, pools=4) -> Tensor:
    """Pooling in fp32, pooled values rounded to x's type, product and RoPE in fp32."""
    pooled = reference.pool_gate(x.float(), block=block, pools=pools).to(x.dtype).float()
    if weight is not None:
        group = weight.shape[0] // x.shape[2]
        pooled = pooled.repeat_interleave(group, 2)
        pooled = torch.einsum("bnhi,hio->bnho", pooled, weight.float())
    if cos is not None:
        half = cos.shape[-1]
        c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
        a, b, rest = pooled.split([half, half, pooled.shape[-1] - 2 * half], -1)
        pooled = torch.cat([a * c - b * s, b * c + a * s, rest], -1)
    return pooled.to(x.dtype)


def gate_score_error(q_gate, k_gate, *, scale=None) -> float:
    """Bound of |error| of a gate score in fp32: see score_error()."""
    scale = q_gate.shape[-1] ** -0.5 if scale is None else scale
    group = q_gate.shape[2] // k_gate.shape[2]
    sizes = torch.einsum(
        "bihd,bjhd->bhij",
        q_gate.double().abs(),
        k_gate.double().abs().repeat_interleave(group, 2),
    )
    bound = abs(scale) * float(sizes.nan_to_num(0.0, 0.0, 0.0).max()) if sizes.numel() else 0.0
    return score_error(bound, q_gate.shape[-1], equal_terms(q_gate, k_gate))
