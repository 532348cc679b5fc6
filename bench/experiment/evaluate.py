# SPDX-License-Identifier: Apache-2.0
"""The gates of every seed and all baselines on held-out packages, window by window.

A group is what one process measures: "baselines" (which read no gate) or a seed. Every window is
one line of ``points_GROUP.jsonl``, so a run that was killed goes on with the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.experiment import corpus
from bench.experiment.settings import Settings
from seer_cuda.integrations import transformers as seer_hf
from seer_cuda.integrations.transformers import _study
from seer_cuda.integrations.transformers._train import open_model

BASELINES = "baselines"
EXAMPLE_DENSITY, EXAMPLE_HEADS = 0.1, 4


def groups(settings: Settings) -> list[str]:
    """Names of all groups."""
    return [BASELINES, *map(str, settings.seeds)]


def gates_folder(folder: Path, seed: int | str) -> Path:
    """Where the gates of a seed are."""
    return folder / f"gates_{seed}"


def model_with_gates(folder: Path, settings: Settings, seed: int | str, device: str):
    """The trained model with the gates of a seed."""
    model, _ = open_model(str(folder / "model"), device)
    return seer_hf.load_gates(model, gates_folder(folder, seed), mode="dense")


def run(folder: Path, settings: Settings, group: str, device: str, log=print) -> None:
    """Measures one group on the test windows; a seed's thresholds on validation windows too."""
    # The baselines look at no gate, but the model's hooks come with one.
    seed = settings.seeds[0] if group == BASELINES else group
    model = model_with_gates(folder, settings, seed, device)
    methods = _study.BASELINES if group == BASELINES else (_study.GATE,)
    thresholds = () if group == BASELINES else settings.thresholds
    everything = _study.selections(settings.densities, thresholds, methods)
    length = settings.context
    sets = {"test": (settings.windows, everything)}
    if thresholds:
        chosen_on = [one for one in everything if one.rule == "threshold"]
        sets["validation"] = (settings.validation_windows, chosen_on)
    for split, (count, wanted) in sets.items():
        windows = corpus.windows(folder, split, count, length)
        path = folder / f"points_{group}_{split}.jsonl"
        _drop_cut_line(path)
        done = {line["window"] for line in _lines(path)}
        for index, window in enumerate(windows):
            if index in done:
                continue
            tokens = torch.from_numpy(window).to(device)
            points = _study.measure(model, tokens, wanted, window=index)
            line = {"window": index, "points": [asdict(point) for point in points]}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            log(f"eval {group}: {split} window {index + 1}/{len(windows)}")
    if group == str(settings.seeds[0]) and not (folder / "times.json").is_file():
        tokens = torch.from_numpy(corpus.windows(folder, "test", 1, length)[0]).to(device)
        times = _study.layer_times(model, tokens, settings.densities)
        save_example(_study.example(model, tokens, EXAMPLE_DENSITY), folder / "example.pt")
        (folder / "times.json").write_text(json.dumps(times))


def save_example(found: _study.Example, path: Path) -> None:
    """A layer's mask and map of the first heads, small enough to carry."""
    state = {
        "layer": found.layer,
        "density": found.density,
        "bits": found.mask.block_bits[:, :EXAMPLE_HEADS].clone(),
        "rows": found.mask.rows_q,
        "block": found.mask.block_q,
        "pooled": found.pooled[:, :EXAMPLE_HEADS].half(),
    }
    torch.save(state, path)


def load_example(path: Path) -> _study.Example:
    """What `save_example` wrote."""
    from seer_cuda import BlockMask

    state = torch.load(path, weights_only=True)
    rows, block = state["rows"], state["block"]
    mask = BlockMask(state["bits"], block, block, rows, rows, True)
    return _study.Example(state["layer"], state["density"], mask, state["pooled"].float())


def _drop_cut_line(path: Path) -> None:
    """Takes off what a kill left of a line, which the next one would be glued to."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The windows that are done; a line that was cut off by a kill is none."""
    if not path.is_file():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def points(folder: Path, group: str, split: str) -> list[_study.Point]:
    """What was measured of a group."""
    return [
        _study.Point(**point)
        for line in _lines(folder / f"points_{group}_{split}.jsonl")
        for point in line["points"]
    ]


def summary(folder: Path, settings: Settings) -> dict[str, Any]:
    """Rows of every method (`_study.summarise`); the gate's over its seeds, with their spread.

    A gate's row has ``seeds``, the ratio of each, and ``ratio_low``, ``ratio_high`` between which
    they lie; the other figures are means over the seeds. ``threshold`` is the largest one whose
    mean ratio on the validation windows is at most 1.01, chosen before the test windows are read.
    """
    rows = _study.summarise(points(folder, BASELINES, "test"))
    each = [_study.summarise(points(folder, str(seed), "test")) for seed in settings.seeds]
    rows += [_mean(own) for own in zip(*(one[1:] for one in each), strict=True)]
    validation = [
        _study.summarise(points(folder, str(seed), "validation")) for seed in settings.seeds
    ]
    checked = [_mean(own) for own in zip(*(one[1:] for one in validation), strict=True)]
    good = [row["value"] for row in checked if row["ratio"] <= 1.01]
    return {
        "rows": rows,
        "validation": checked,
        "threshold": max(good) if good else None,
        "paired": paired(folder, settings),
    }


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
    return first | means | errors | band


def paired(folder: Path, settings: Settings) -> list[dict[str, Any]]:
    """The gate against each baseline on the same windows, at every density.

    ``gain`` is the mean over windows and seeds of (baseline's loss - gate's loss), in nats per
    token; ``error`` its standard error over the windows; ``better`` the windows in which the mean
    gate is better.
    """
    base = {
        (point.method, point.value, point.window): point.loss
        for point in points(folder, BASELINES, "test")
    }
    gate: dict[tuple[float, int], list[float]] = {}
    for seed in settings.seeds:
        for point in points(folder, str(seed), "test"):
            if point.method == _study.GATE and point.rule == "density":
                gate.setdefault((point.value, point.window), []).append(point.loss)
    rows = []
    for density in settings.densities:
        for method in _study.BASELINES:
            gains = torch.tensor(
                [
                    base[method, density, window] - sum(losses) / len(losses)
                    for (value, window), losses in gate.items()
                    if value == density
                ],
                dtype=torch.float64,
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
