# SPDX-License-Identifier: Apache-2.0
"""The gates of every seed and all baselines on held-out packages, window by window.

A group is what one process measures: "baselines" (which read no gate), a seed, or another form of
gate. Every window is one line of ``points_GROUP_SPLIT.jsonl``, so a run that was killed goes on
with the next one. `bench.experiment.summary` puts the groups together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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
    """Names of all groups, the most important first."""
    first, *more = map(str, settings.seeds)
    return [first, BASELINES, *more, *settings.variants]


def gates_folder(folder: Path, seed: int | str) -> Path:
    """Where the gates of a seed are."""
    return folder / f"gates_{seed}"


def model_with_gates(folder: Path, group: str, device: str):
    """The trained model with the gates of a group; baselines look at none, but come with some."""
    model, _ = open_model(str(folder / "model"), device)
    if group == BASELINES:
        return seer_hf.attach(model, seer_hf.SeerConfig(mode="dense"))
    return seer_hf.load_gates(model, gates_folder(folder, group), mode="dense")


def run(folder: Path, settings: Settings, group: str, device: str, log=print) -> None:
    """Measures one group on the test windows; adaptive rules on validation windows first."""
    model = model_with_gates(folder, group, device)
    methods = _study.BASELINES if group == BASELINES else (_study.GATE,)
    length = settings.context
    known = corpus.windows(folder, "validation", settings.validation_windows, length)
    adaptive = _calibrated(folder, settings, group, model, methods, torch.from_numpy(known))
    fixed = _study.selections(settings.densities, methods=methods)
    tests = corpus.windows(folder, "test", settings.windows, length)
    for split, windows, wanted in (
        ("validation", known, adaptive),
        ("test", tests, fixed + adaptive),
    ):
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
        tokens = torch.from_numpy(tests[0]).to(device)
        times = _study.layer_times(model, tokens, settings.densities)
        save_example(_study.example(model, tokens, EXAMPLE_DENSITY), folder / "example.pt")
        (folder / "times.json").write_text(json.dumps(times))


def _calibrated(
    folder: Path,
    settings: Settings,
    group: str,
    model: torch.nn.Module,
    methods: Sequence[str],
    windows: torch.Tensor,
) -> list[_study.Selection]:
    """The adaptive rules' numbers, found once: all windows of a run are measured with the same."""
    path = folder / f"numbers_{group}.json"
    if not path.is_file():
        tokens = windows.to(next(model.parameters()).device)
        found = _study.calibrate(model, list(tokens), settings.densities, methods)
        part = path.with_suffix(".part")
        part.write_text(json.dumps([asdict(one) for one in found]))
        part.replace(path)
    return [_study.Selection(**one) for one in json.loads(path.read_text())]


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
