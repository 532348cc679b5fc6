# SPDX-License-Identifier: Apache-2.0
"""Which blocks a layer keeps in a study: the methods' scores and the rules that pick from them.

density: the rule of `_equal_choice`, so all methods keep equally many blocks in every row of every
head. The rules of `_adaptive` keep as many on the mean of all rows, heads and layers. Without a
target, threshold goes the way of the product: `gate_mask` with the diagonal kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seer_cuda import _equal_choice, heuristics
from seer_cuda.block_mask import BlockMask
from seer_cuda.integrations.transformers import _adaptive
from seer_cuda.integrations.transformers._state import Prompt
from seer_cuda.ops import attn_pool
from seer_cuda.prefill import gate_mask
from seer_cuda.select import Rule

DENSE, GATE, ORACLE = "dense", "learned gate", "oracle"
SINK_LOCAL, RANDOM = "sink + local", "random"
VERTICAL_SLASH, ANTIDIAGONAL, POOLED = "vertical-slash", "antidiagonal", "pooled q.k"
BASELINES = (ORACLE, VERTICAL_SLASH, ANTIDIAGONAL, POOLED, SINK_LOCAL, RANDOM)
METHODS = (GATE, *BASELINES)
#: Methods whose shares of a row are a softmax; the other adaptive ones have masses to divide.
LOGITS = (GATE, POOLED)
ADAPTIVE = (*LOGITS, ORACLE, VERTICAL_SLASH, ANTIDIAGONAL)


@dataclass(frozen=True)
class Selection:
    """How blocks are chosen.

    Attributes:
        method: One of `METHODS`.
        rule: "density"; "threshold" or "topp" with a target: of `_adaptive`; "threshold" without:
            the gate's own rule.
        value: Of the rule; with a target the number that was calibrated for it.
        target: Mean density that the value was calibrated for.
    """

    method: str
    rule: str = "density"
    value: float = 1.0
    target: float | None = None


def selections(
    densities: Sequence[float],
    thresholds: Sequence[float] = (),
    methods: Sequence[str] = METHODS,
) -> list[Selection]:
    """Every method at every density, and the gate at every threshold."""
    found = [Selection(method, "density", value) for value in densities for method in methods]
    if GATE in methods:
        found += [Selection(GATE, "threshold", value) for value in thresholds]
    return found


@torch.no_grad()
def scores(method: str, prompt: Prompt, window: int = 0) -> Tensor:
    """``[batch|1, heads, blocks, blocks]`` scores of one layer's blocks."""
    block, (rows, heads) = prompt.gate.config.block, prompt.q.shape[1:3]
    device, sizes = prompt.q.device, {"block": block, "scale": prompt.scale}
    if method == GATE:
        return prompt.gate(prompt.q_before, prompt.k_before)
    if method == ORACLE:
        return true_map(prompt, "max")
    if method == VERTICAL_SLASH:
        return heuristics.vertical_slash(prompt.q, prompt.k, **sizes)
    if method == ANTIDIAGONAL:
        stride = min(8, block)
        return heuristics.antidiagonal(prompt.q, prompt.k, stride=stride, **sizes)
    if method == POOLED:
        return heuristics.pooled_qk(prompt.q, prompt.k, **sizes)
    if method == SINK_LOCAL:
        return heuristics.sink_local(rows, block=block, device=device)
    seed = window * 1009 + prompt.layer
    return heuristics.random(rows, heads, block=block, seed=seed, device=device)


def keep(values: Tensor, density: float, prompt: Prompt) -> BlockMask:
    """The common rule: the diagonal and the best others, equally many for every method."""
    return _equal_choice.keep(values, density, prompt.gate.config.block, prompt.q.shape[1])


def strengths(method: str, rule: str, prompt: Prompt, window: int = 0) -> Tensor:
    """What an adaptive rule compares with its number, in one layer."""
    own = _adaptive.shares(scores(method, prompt, window), method in LOGITS)
    return _adaptive.strengths(rule, own)


def keep_adaptive(own: Tensor, value: float, prompt: Prompt) -> BlockMask:
    """The diagonal and the blocks of at least this strength."""
    return _adaptive.keep(own, value, prompt.q.shape[1], prompt.gate.config.block)


def choose(selection: Selection, prompt: Prompt, window: int = 0) -> BlockMask:
    """The blocks that one layer keeps."""
    if selection.rule == "density":
        return keep(scores(selection.method, prompt, window), selection.value, prompt)
    if selection.target is not None:
        own = strengths(selection.method, selection.rule, prompt, window)
        return keep_adaptive(own, selection.value, prompt)
    rule = Rule(selection.rule, selection.value, local=1)
    return gate_mask(prompt.q_before, prompt.k_before, prompt.gate, rule)


def true_map(prompt: Prompt, reduce: str) -> Tensor:
    """The true attention, pooled over blocks: the "max" or "sum" of a block's probabilities."""
    block = prompt.gate.config.block
    sizes = {"block_q": block, "block_kv": block, "scale": prompt.scale, "reduce": reduce}
    return attn_pool(prompt.q, prompt.k, prompt.v, **sizes)[2]
