# SPDX-License-Identifier: Apache-2.0
"""Perplexity by density: a model's gates beside the oracle and choices that need no training.

Methods and rules are those of `_choices`. Losses of all methods are those of the same tokens, so
their differences are paired.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_cuda._equal_choice import open_blocks
from seer_cuda._timing import median_ms
from seer_cuda.block_mask import BlockMask
from seer_cuda.integrations.transformers import _adaptive
from seer_cuda.integrations.transformers._attach import choosing
from seer_cuda.integrations.transformers._choices import (
    ADAPTIVE,
    BASELINES,
    DENSE,
    GATE,
    LOGITS,
    METHODS,
    ORACLE,
    SINK_LOCAL,
    Selection,
    choose,
    keep,
    keep_adaptive,
    scores,
    selections,
    true_map,
)
from seer_cuda.integrations.transformers._state import Prompt
from seer_cuda.ops import block_sparse_attn
from seer_cuda.prefill import gate_mask
from seer_cuda.select import Rule

_HEAD_ROWS = 1024  # logits at a time: those of all tokens would take gigabytes


@dataclass(frozen=True)
class Point:
    """One selection on one window.

    Attributes:
        window: Index of the window.
        method, rule, value, target: The selection; the dense model is method "dense".
        loss: Mean nats per token.
        late_loss: Over the second half of the window.
        kept: Share of the visible blocks that the sparse model kept, the diagonal ones among
            them, over all rows together (a long row weighs more), mean over heads and layers.
        recall: Share of the oracle's blocks that are kept at this density, the diagonal and rows
            that keep all they see left out; None where rows have no count.
        mass: Share of the true attention on kept blocks.

    The last two are means over the layers, measured on the dense model's own activations.
    """

    window: int
    method: str
    rule: str
    value: float
    loss: float
    late_loss: float
    kept: float = 1.0
    recall: float | None = None
    mass: float = 1.0
    target: float | None = None


def measure(
    model: nn.Module,
    tokens: Tensor,
    wanted: Sequence[Selection],
    *,
    window: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[Point]:
    """The dense model and every selection on one window.

    Args:
        model: With gates; any mode.
        tokens: int64 ``[length]`` on the model's device.
        wanted: The selections.
        window: Index of the window, for the record and the random choice.
        advance: Called after each pass of the model.

    Returns:
        One point per selection, the dense model first.

    Raises:
        ValueError: no gates.
    """
    quality = _Quality(wanted, window)
    with choosing(model, quality):
        losses = _losses(model, tokens)
    advance()
    dense = _mean_loss(losses)
    points = [Point(window, DENSE, "density", 1.0, *dense)]
    for one in wanted:
        densities: list[Tensor] = []

        def select_blocks(prompt: Prompt, one=one, densities=densities) -> BlockMask:
            mask = choose(one, prompt, window)
            densities.append(mask.density().mean())
            return mask

        with choosing(model, select_blocks):
            losses = _losses(model, tokens)
        advance()
        loss, late_loss = _mean_loss(losses)
        seen = quality.of(one) | {"kept": torch.stack(densities).mean().item()}
        points.append(Point(window, loss=loss, late_loss=late_loss, **asdict(one), **seen))
    return points


def calibrate(
    model: nn.Module,
    windows: Sequence[Tensor],
    densities: Sequence[float],
    methods: Sequence[str] = METHODS,
) -> list[Selection]:
    """Every method with shares of its own, under every adaptive rule, at mean densities.

    One dense pass per window tells the strengths of all blocks; a sparse model's differ from them
    little, and `Point` has the density that was kept.

    Args:
        model: With gates; any mode.
        windows: int64 ``[length]`` each, on the model's device, none of those to be measured.
        densities: Mean densities in (0, 1].
        methods: Those without shares are passed over.

    Raises:
        ValueError: no gates, or no windows.
    """
    able = [method for method in methods if method in ADAPTIVE]
    tallies = {(method, rule): _adaptive.Tally() for method in able for rule in _adaptive.RULES}

    def count(prompt: Prompt) -> None:
        for method in able:
            own = _adaptive.shares(scores(method, prompt), method in LOGITS)
            for rule in _adaptive.RULES:
                tallies[method, rule].add(_adaptive.strengths(rule, own))

    for tokens in windows:
        with choosing(model, count):
            _losses(model, tokens)
    return [
        Selection(method, rule, tally.value(density), density)
        for density in densities
        for (method, rule), tally in tallies.items()
    ]


class _Quality:
    """Recall and mass of every selection on the dense model's activations."""

    def __init__(self, wanted: Sequence[Selection], window: int) -> None:
        self.wanted, self.window = wanted, window
        self.seen: dict[Selection, list[dict[str, Tensor]]] = {one: [] for one in wanted}

    def __call__(self, prompt: Prompt) -> None:
        oracle, mass = true_map(prompt, "max"), true_map(prompt, "sum")
        known = {ORACLE: oracle}
        strengths: dict[tuple[str, str], Tensor] = {}
        for one in self.wanted:
            if one.method not in known:
                known[one.method] = scores(one.method, prompt, self.window)
            if one.rule == "density":
                mask = keep(known[one.method], one.value, prompt)
            elif one.target is not None:
                way = one.method, one.rule
                if way not in strengths:
                    own = _adaptive.shares(known[one.method], one.method in LOGITS)
                    strengths[way] = _adaptive.strengths(one.rule, own)
                mask = keep_adaptive(strengths[way], one.value, prompt)
            else:
                mask = choose(one, prompt)
            kept = mask.to_dense().expand_as(mass)
            values = {"mass": (mass * kept).sum() / mass.sum()}
            if one.rule == "density":
                best = keep(oracle, one.value, prompt).to_dense() & open_blocks(one.value, oracle)
                # Where nothing but diagonals is kept, there is nothing to miss.
                missed = (best & ~kept).sum() / best.sum().clamp_min(1)
                values["recall"] = 1 - missed
            self.seen[one].append(values)

    def of(self, one: Selection) -> dict[str, float]:
        """Means over the layers."""
        names = self.seen[one][0]
        return {
            name: statistics.fmean(float(values[name]) for values in self.seen[one])
            for name in names
        }


@torch.no_grad()
def _losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Nats of each token but the first, fp32 ``[length - 1]``."""
    head = model.get_output_embeddings()
    hidden = model.base_model(tokens[None], use_cache=False).last_hidden_state[0, :-1]
    parts = zip(hidden.split(_HEAD_ROWS), tokens[1:].split(_HEAD_ROWS), strict=True)
    return torch.cat(
        [F.cross_entropy(head(rows).float(), wanted, reduction="none") for rows, wanted in parts]
    )


def _mean_loss(losses: Tensor) -> tuple[float, float]:
    losses = losses.double()
    return losses.mean().item(), losses[losses.numel() // 2 :].mean().item()


def summarise(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row per selection over all windows, the dense model first.

    ``ratio`` is the perplexity over the dense model's on the same windows: exp of the mean of the
    windows' differences; ``ratio_error`` its standard error from the spread of those (None for one
    window).
    """
    dense = {point.window: point for point in points if point.method == DENSE}
    groups: dict[tuple[str, str, float, float | None], list[Point]] = {}
    for point in points:
        key = point.method, point.rule, point.value, point.target
        groups.setdefault(key, []).append(point)
    rows = []
    for (method, rule, value, target), group in groups.items():
        ratio, error = _ratio([point.loss - dense[point.window].loss for point in group])
        late, _ = _ratio([point.late_loss - dense[point.window].late_loss for point in group])
        recalls = [point.recall for point in group if point.recall is not None]
        rows.append(
            {
                "method": method,
                "rule": rule,
                "value": value,
                "target": target,
                "windows": len(group),
                "kept": statistics.fmean(point.kept for point in group),
                "perplexity": math.exp(statistics.fmean(point.loss for point in group)),
                "ratio": ratio,
                "ratio_error": error,
                "late_ratio": late,
                "recall": statistics.fmean(recalls) if recalls else None,
                "mass": statistics.fmean(point.mass for point in group),
            }
        )
    return rows


def _ratio(differences: list[float]) -> tuple[float, float | None]:
    ratio = math.exp(statistics.fmean(differences))
    if len(differences) < 2:
        return ratio, None
    return ratio, ratio * statistics.stdev(differences) / math.sqrt(len(differences))


def layer_times(
    model: nn.Module, tokens: Tensor, densities: Sequence[float], *, repeats: int = 5
) -> list[dict[str, float]]:
    """Milliseconds of each layer's attention on one window: torch's dense one, and with the gate.

    Args:
        model: With gates.
        tokens: int64 ``[length]`` on the model's device.
        densities: Of the gate.
        repeats: Calls that a median is taken of.

    Returns:
        Per layer and density ``layer``, ``density``, ``dense_ms`` (scaled_dot_product_attention),
        ``gate_ms`` (gate and selection) and ``sparse_ms`` (attention over the kept blocks).

    Raises:
        ValueError: no gates.
    """
    rows: list[dict[str, float]] = []

    def time_layer(prompt: Prompt) -> None:
        heads = [x.transpose(1, 2) for x in (prompt.q, prompt.k, prompt.v)]
        options = {"is_causal": True, "scale": prompt.scale, "enable_gqa": True}
        calls = {"dense": lambda: F.scaled_dot_product_attention(*heads, **options)}
        for density in densities:
            rule = Rule("density", density, local=1)
            before = prompt.q_before, prompt.k_before, prompt.gate, rule
            mask = gate_mask(*before)
            calls["gate", density] = lambda before=before: gate_mask(*before)
            calls["sparse", density] = lambda mask=mask: block_sparse_attn(
                prompt.q, prompt.k, prompt.v, mask, scale=prompt.scale
            )
        found = median_ms(calls, repeats, at_once=5 if prompt.q.is_cuda else 1)
        for density in densities:
            times = (found["dense"], found["gate", density], found["sparse", density])
            names = ("dense_ms", "gate_ms", "sparse_ms")
            own = dict(zip(names, times, strict=True))
            rows.append({"layer": prompt.layer, "density": density} | own)

    with choosing(model, time_layer):
        _losses(model, tokens)
    return rows


@dataclass(frozen=True)
class Example:
    """One layer for the picture: what the gate keeps, and the true map."""

    layer: int
    density: float
    mask: BlockMask
    pooled: Tensor


def example(model: nn.Module, tokens: Tensor, density: float) -> Example:
    """The layer whose gate keeps most more of the attention than sink and window do.

    Raises:
        ValueError: no gates.
    """
    found: list[tuple[float, Example]] = []

    def look(prompt: Prompt) -> None:
        mass = true_map(prompt, "sum")
        gate, window = (
            keep(scores(method, prompt), density, prompt) for method in (GATE, SINK_LOCAL)
        )
        gain = (mass * gate.to_dense()).sum() - (mass * window.to_dense()).sum()
        if not found or gain > found[0][0]:
            pooled = true_map(prompt, "max").cpu()
            found[:] = [(gain.item(), Example(prompt.layer, density, gate.to("cpu"), pooled))]

    with choosing(model, look):
        _losses(model, tokens)
    return found[0][1]


__all__ = [
    "BASELINES",
    "DENSE",
    "GATE",
    "METHODS",
    "ORACLE",
    "Point",
    "Selection",
    "calibrate",
    "choose",
    "example",
    "layer_times",
    "measure",
    "selections",
    "summarise",
]
