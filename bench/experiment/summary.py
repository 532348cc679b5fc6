# SPDX-License-Identifier: Apache-2.0
"""All groups of the evaluation put together: rows of every method, and the gate against each.

Two ways of keeping equally much are compared. "count": every row of every head keeps equally many
blocks. "mean": the mean over rows, heads and layers is equal, by the better of a method's adaptive
rules; which one that is, the validation windows say, for each density before the test is read.
Methods without an adaptive rule keep their count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.experiment.evaluate import BASELINES, points
from bench.experiment.settings import Settings
from seer_cuda.integrations.transformers import _study

COUNT, MEAN = "count", "mean"
Chosen = dict[tuple[str, float], str]  # the rule of a method at a mean density


def variant(name: str) -> str:
    """The method that another form of gate is reported as."""
    return f"{_study.GATE} {name}"


def summary(folder: Path, settings: Settings) -> dict[str, Any]:
    """Rows of every method (`_study.summarise`); the gate's over its seeds, with their spread.

    A gate's row has ``seeds``, the ratio of each, and ``ratio_low``, ``ratio_high`` between which
    they lie; the other figures are means over the seeds. ``adaptive`` has the rows of the chosen
    rules alone, with the count's rows where a method has no other.
    """
    rows = _rows(folder, settings, "test")
    chosen = choice(_rows(folder, settings, "validation"))
    return {
        "rows": rows,
        "validation": [row for row in _rows(folder, settings, "validation") if row["target"]],
        "adaptive": adaptive(rows, chosen),
        "paired": {way: paired(folder, settings, way, chosen) for way in (COUNT, MEAN)},
    }


def _rows(folder: Path, settings: Settings, split: str) -> list[dict[str, Any]]:
    """Of all groups, the dense model once and first."""
    found = _study.summarise(points(folder, BASELINES, split))
    each = [_study.summarise(points(folder, str(seed), split))[1:] for seed in settings.seeds]
    found += [_mean(own) for own in zip(*each, strict=True)]
    for name in settings.variants:
        own = _study.summarise(points(folder, name, split))[1:]
        found += [row | {"method": variant(name)} for row in own]
    return found


def choice(validation: Iterable[dict[str, Any]]) -> Chosen:
    """The rule with the smaller ratio for every method and mean density."""
    best: dict[tuple[str, float], dict[str, Any]] = {}
    for row in validation:
        if row["target"] is not None:
            key = row["method"], row["target"]
            if key not in best or row["ratio"] < best[key]["ratio"]:
                best[key] = row
    return {key: row["rule"] for key, row in best.items()}


def adaptive(rows: Sequence[dict[str, Any]], chosen: Chosen) -> list[dict[str, Any]]:
    """One row per method and density: of the chosen rule, or of the count."""
    able = {method for method, _ in chosen}
    found = []
    for row in rows:
        if row["target"] is not None:
            if chosen[row["method"], row["target"]] == row["rule"]:
                found.append(row)
        elif row["method"] not in able and row["method"] != _study.DENSE:
            found.append(row | {"target": row["value"]})
    return found


def _mean(own: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    first, ratios = own[0], [row["ratio"] for row in own]
    numbers = ("kept", "perplexity", "ratio", "late_ratio", "recall", "mass")
    means = {
        key: sum(row[key] for row in own) / len(own) for key in numbers if first[key] is not None
    }
    errors = (
        {}
        if first["ratio_error"] is None
        else {"ratio_error": max(row["ratio_error"] for row in own)}
    )
    band = {"seeds": ratios, "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return first | means | errors | band | {"values": [row["value"] for row in own]}


def paired(folder: Path, settings: Settings, way: str, chosen: Chosen) -> list[dict[str, Any]]:
    """The gate against each baseline on the same windows, at every density.

    ``gain`` is the mean over windows and seeds of (baseline's loss - gate's loss), in nats per
    token; ``error`` its standard error over the windows; ``better`` the windows in which the mean
    gate is better.
    """
    base = _losses(points(folder, BASELINES, "test"), way, chosen)
    gates = [_losses(points(folder, str(seed), "test"), way, chosen) for seed in settings.seeds]
    rows = []
    for density in settings.densities:
        own = [gate[_study.GATE, density] for gate in gates]
        mean = {window: sum(one[window] for one in own) / len(own) for window in own[0]}
        for method in _study.BASELINES:
            other = base[method, density]
            gains = torch.tensor(
                [other[window] - loss for window, loss in mean.items()], dtype=torch.float64
            )
            error = gains.std().item() / len(gains) ** 0.5 if len(gains) > 1 else None
            rows.append(
                {
                    "method": method,
                    "density": density,
                    "gain": gains.mean().item(),
                    "error": error,
                    "better": int((gains > 0).sum()),
                    "windows": len(gains),
                }
            )
    return rows


def _losses(
    found: Iterable[_study.Point], way: str, chosen: Chosen
) -> dict[tuple[str, float], dict[int, float]]:
    """Losses by window of every method and density, kept in this way."""
    able = {method for method, _ in chosen} if way == MEAN else set()
    losses: dict[tuple[str, float], dict[int, float]] = {}
    for point in found:
        density = point.target if point.method in able else point.value
        rule = chosen.get((point.method, density)) if point.method in able else "density"
        if density is not None and rule == point.rule:
            losses.setdefault((point.method, density), {})[point.window] = point.loss
    return losses
