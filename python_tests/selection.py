# SPDX-License-Identifier: Apache-2.0
"""Which blocks a selection must and must not contain, when scores are only known within delta.

A block is undecided where an error of at most delta in every score could change the decision;
everything else must match the oracle bit for bit.
"""

import math

import numerics
import torch
from torch import Tensor

from seer_cuda import reference


def bounds(
    scores: Tensor,
    delta: float,
    *,
    causal: bool = True,
    method: int = 0,
    value: float = 0.0,
    **forced,
) -> tuple[Tensor, Tensor]:
    """(must, may): bool masks of scores' shape ``[batch, heads, blocks_q, blocks_kv]``.

    A selection s is right iff ``must <= s <= may``. With delta 0 ties are decided by the index
    and must equals may for the rank methods.
    """
    blocks_q, blocks_kv = scores.shape[-2:]
    seen = reference.gate_visible(blocks_q, blocks_kv, causal, scores.device)
    candidate = seen & ~scores.isnan()
    score = scores.masked_fill(~candidate, -math.inf)
    prob = score.softmax(-1).masked_fill(~candidate, 0.0)
    # A probability is off by the factor exp(2 delta) and by the fp32 rounding of the sum.
    slack = math.expm1(2 * delta) + (numerics.EPS32 * math.sqrt(blocks_kv) if delta else 0.0)

    if method == reference.THRESHOLD:
        tiny = numerics.FLUSH[torch.float32]  # a probability below it may be 0 in fp32
        must, may = prob * (1 - slack) - tiny > value, prob * (1 + slack) > value
    else:
        # m ranks before j for sure, and possibly. NaN and invisible blocks rank before nothing.
        ahead = score[..., None, :] - score[..., :, None]  # [..., j, m]: score_m - score_j
        index = torch.arange(blocks_kv, device=scores.device)
        tie = (ahead == 0) & (index[None, :] < index[:, None])
        surely = (ahead > 2 * delta) | (tie if delta == 0 else torch.zeros_like(tie))
        possibly = (ahead >= -2 * delta) if delta else surely
        possibly = possibly & (index[None, :] != index[:, None]) & candidate[..., None, :]
        surely = surely & candidate[..., None, :]
        if method == reference.TOPP:
            mass = prob[..., None, :]
            before_min = (mass * surely).sum(-1) * (1 - slack)
            before_max = (mass * possibly).sum(-1) * (1 + slack)
            must = (before_max < value) | ~possibly.any(-1)
            may = (before_min < value) | ~surely.any(-1)
        else:
            k = int(value)
            if method == reference.DENSITY:
                k = max(1, math.floor((1.0 - math.sqrt(1.0 - value)) * blocks_kv))
            must, may = possibly.sum(-1) < k, surely.sum(-1) < k
    # Only the forced rules, from the oracle: a threshold that nothing reaches.
    force = reference.select_blocks(
        scores, causal=causal, method=reference.THRESHOLD, value=math.inf, **forced
    )
    return (must & candidate) | force, (may & candidate) | force


def check(name: str, bits: Tensor, scores: Tensor, delta: float, **rule) -> None:
    """Asserts that block bits are a right selection and that bits past blocks_kv are 0."""
    blocks_kv = scores.shape[-1]
    words = -(-blocks_kv // reference.WORD)
    assert bits.dtype == torch.int32 and bits.shape == (*scores.shape[:-1], words)
    mask = reference.unpack_block_bits(bits, words * reference.WORD)
    assert not mask[..., blocks_kv:].any(), f"{name}: bits past blocks_kv are set"
    mask = mask[..., :blocks_kv]
    must, may = bounds(scores, delta, **rule)
    for kind, wrong in (("missing", must & ~mask), ("too many", mask & ~may)):
        at = [int(i) for i in wrong.nonzero()[0]] if wrong.any() else None
        assert at is None, (
            f"{name}: {int(wrong.sum())} blocks {kind}, the first at [batch, head, i, j] = {at}, "
            f"score {float(scores[tuple(at)])}; {int((may & ~must).sum())} blocks undecided"
        )


def check_counts(bits: Tensor, blocks_kv: int, causal: bool, k: int) -> None:
    """topk and density without forced blocks keep exactly min(k, visible) blocks per row."""
    mask = reference.unpack_block_bits(bits, blocks_kv)
    seen = reference.gate_visible(mask.shape[-2], blocks_kv, causal, bits.device)
    assert (mask.sum(-1) == seen.sum(-1).clamp(max=k)).all()
