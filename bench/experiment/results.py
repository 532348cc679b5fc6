# SPDX-License-Identifier: Apache-2.0
"""What a run found, in one small JSON, and the files that its page is made of."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.experiment import evaluate, summary
from bench.experiment.settings import Settings
from bench.source import ROOT

RESULTS = ROOT / "bench" / "results" / "experiment"
EXAMPLE = "example.pt"
_CURVE_ROWS = 200


def device_name() -> str:
    """Of the GPU, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def result_path(folder: Path, gpu: str) -> Path:
    """results file of a machine."""
    return folder / f"{gpu.lower().replace(' ', '_')}.json"


def collect(folder: Path, out: Path, settings: Settings, date: str) -> Path:
    """Writes the result of what is done so far, and the example, into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    marks = sorted((folder / "done").glob("*.json"))
    found: dict[str, Any] = {
        "gpu": device_name(),
        "torch": torch.__version__,
        "date": date,
        "settings": asdict(settings),
        "seconds": {mark.stem: json.loads(mark.read_text())["seconds"] for mark in marks},
    }
    done = set(found["seconds"])
    if "corpus" in done:
        found["corpus"] = json.loads((folder / "corpus.json").read_text())
    if "train" in done:
        found["train"] = _train(folder)
    seeds = [seed for seed in settings.seeds if f"distil_{seed}" in done]
    found["distil"] = {str(seed): _distil(evaluate.gates_folder(folder, seed)) for seed in seeds}
    found["variants"] = {
        name: _distil(evaluate.gates_folder(folder, name))
        for name in settings.variants
        if f"distil_{name}" in done
    }
    measured = replace(
        settings,
        seeds=tuple(seed for seed in settings.seeds if f"eval_{seed}" in done),
        variants=tuple(name for name in settings.variants if f"eval_{name}" in done),
    )
    if f"eval_{evaluate.BASELINES}" in done and measured.seeds[:1] == settings.seeds[:1]:
        found["eval"] = summary.summary(folder, measured)
        found["times"] = json.loads((folder / "times.json").read_text())
        shutil.copy(folder / EXAMPLE, out / EXAMPLE)
    if (folder / "prefill.json").is_file():
        found["prefill"] = json.loads((folder / "prefill.json").read_text())
        found["prefill_date"] = date
    elif (kept := result_path(RESULTS, found["gpu"])).is_file():
        # Times depend on no weights: without a measurement of its own a run keeps the last one's.
        last = json.loads(kept.read_text())
        if "prefill" in last:
            found["prefill"] = last["prefill"]
            found["prefill_date"] = last.get("prefill_date", last["date"])
    path = result_path(out, found["gpu"])
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def _train(folder: Path) -> dict[str, Any]:
    from safetensors import safe_open

    rows = _rows(folder / "train" / "log.csv")
    with safe_open(str(folder / "model" / "model.safetensors"), "pt") as weights:
        sizes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return {
        "parameters": sum(torch.Size(size).numel() for size in sizes),
        "steps": int(rows[-1]["step"]),
        "tokens": int(rows[-1]["tokens"]),
        "seconds": float(rows[-1]["seconds"]),
        "curve": _thinned(rows, ("seconds", "context", "loss")),
    }


def _distil(folder: Path) -> dict[str, Any]:
    rows = _rows(folder / "log.csv")
    return {
        "steps": int(rows[-1]["step"]),
        "tokens": int(rows[-1]["tokens"]),
        "seconds": float(rows[-1]["seconds"]),
        "curve": _thinned(rows, ("step", "loss")),
    }


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _thinned(rows: list[dict[str, str]], names: tuple[str, ...]) -> list[list[float]]:
    every = -(-len(rows) // _CURVE_ROWS)
    return [[float(row[name]) for name in names] for row in rows[::every]]
