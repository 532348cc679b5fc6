# SPDX-License-Identifier: Apache-2.0
"""docs/experiment.md: its tables and figures from the newest result of bench/results/experiment.

What stands between the markers `<!-- generated: NAME -->` and `<!-- end: NAME -->` is written here,
everything else by hand. A digest in the page says which result the figures were drawn from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bench.experiment.results import EXAMPLE, RESULTS
from bench.experiment.sections import SECTIONS
from bench.figures import with_section
from bench.source import ROOT

PAGE = ROOT / "docs" / "experiment.md"
IMAGES = ROOT / "docs" / "img"
FIGURES = ("accuracy", "adaptive", "time", "mask", "training")


def newest(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The result with the latest date."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return max(found, key=lambda result: result["date"], default=None)


def figure(name: str) -> Path:
    """Of the page."""
    return IMAGES / f"experiment_{name}.png"


def digest(result: dict[str, Any]) -> str:
    """Of what the figures are drawn from."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def generated(text: str, result: dict[str, Any]) -> str:
    """The page as it should be."""
    for name, section in SECTIONS.items():
        text = with_section(text, name, section(result))
    return with_section(text, "digest", f"<!-- figures of {digest(result)} -->")


def draw(result: dict[str, Any], example: Path) -> None:
    """All figures (matplotlib); the mask only where the run's example still is."""
    from bench.experiment.evaluate import load_example
    from seer_cuda.integrations.transformers import _report

    _report.draw_accuracy(result["eval"]["rows"], figure("accuracy"))
    panels = {
        "equal count per row": [row for row in result["eval"]["rows"] if row["rule"] == "density"],
        "equal mean density": result["eval"]["adaptive"],
    }
    _report.draw_ratios(panels, figure("adaptive"))
    _report.draw_time(result["times"], figure("time"))
    if example.is_file():
        _report.draw_example(load_example(example), figure("mask"))
    _draw_training(result, figure("training"))


def _draw_training(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    image = Figure(figsize=(10, 3.4), layout="constrained")
    model, gates = image.subplots(1, 2)
    curve = result["train"]["curve"]
    # The first rows would set the scale.
    shown = [row for row in curve if row[0] > 0.02 * curve[-1][0]]
    for context in dict.fromkeys(row[1] for row in shown):
        own = [row for row in shown if row[1] == context]
        model.plot([row[0] for row in own], [row[2] for row in own], label=f"{context:.0f} tokens")
    model.set_xlabel("seconds")
    model.set_title("model: nats per token, training batches", fontsize=10)
    model.legend(frameon=False)
    for seed, own in result["distil"].items():
        gates.plot(*zip(*own["curve"], strict=True), label=f"seed {seed}")
    for name, own in result["variants"].items():
        gates.plot(*zip(*own["curve"], strict=True), "--", label=name)
    gates.set_xlabel("step")
    gates.set_yscale("log")
    gates.set_title("gates: loss", fontsize=10)
    gates.legend(frameon=False)
    for axis in (model, gates):
        axis.grid(alpha=0.3)
    image.savefig(path, dpi=120)


def main(out: Path, check: bool) -> int:
    """Rewrites the page and its figures, or says whether they are stale; the exit status.

    out: where `collect` wrote the example, which is too large to be kept with the results.
    """
    result = newest()
    if result is None:
        print(f"{RESULTS.relative_to(ROOT)}: no result")
        return 1
    text = PAGE.read_text()
    wanted = generated(text, result)
    if check:
        fresh = text == wanted and all(figure(name).is_file() for name in FIGURES)
        print(f"{PAGE.relative_to(ROOT)}: {'shows the present result' if fresh else 'stale'}")
        return 0 if fresh else 1
    draw(result, out / EXAMPLE)
    PAGE.write_text(wanted)
    return 0
