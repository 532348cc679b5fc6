# SPDX-License-Identifier: Apache-2.0
"""The demo from text to table: train, distil, evaluate, report."""

from __future__ import annotations

import json
import time
from pathlib import Path

from seer_cuda.demo import device, report, text
from seer_cuda.demo.config import DemoConfig, make_config
from seer_cuda.demo.console import make_console, stage
from seer_cuda.demo.distil import distil
from seer_cuda.demo.evaluate import Evaluator, Results
from seer_cuda.demo.figure import draw
from seer_cuda.demo.train import train

__all__ = ["make_config", "run"]


def run(config: DemoConfig, source: Path | None, out: Path) -> Results:
    """Runs the demo, prints its findings, and writes out/results.json and out/figure.png.

    Args:
        config: From `make_config`.
        source: Text file or folder; None: the Python standard library.
        out: Folder for the results, made if missing.

    Raises:
        TextError: the text cannot be used.
        OSError: out cannot be written.
    """
    started = time.perf_counter()
    console = make_console()
    corpus = text.load(source, config.train_bytes, config.held_out_bytes)
    # Before minutes of work, not after.
    out.mkdir(parents=True, exist_ok=True)
    for line in report.opening(config, corpus, device.describe(config.device)):
        console.print(line)
    with stage(console, "train the model", config.train.steps) as training:
        model = train(config, corpus, training)
    with stage(console, "distil the gates", config.distil.steps) as distilling:
        gates = distil(config, model, corpus, distilling)
    evaluator = Evaluator(config, model, gates, corpus)
    with stage(console, "evaluate", evaluator.steps) as advance:
        results = evaluator.run(advance)
    seconds = time.perf_counter() - started
    console.print(report.table(config, results))
    for line in report.notes(config) + report.findings(results):
        console.print(line)
    data = report.as_json(config, corpus, results)
    data["steps_made"] = {"train": training.done, "distil": distilling.done}
    data["seconds"] = seconds
    (out / "results.json").write_text(json.dumps(data, indent=2) + "\n")
    draw(config, results, out / "figure.png")
    console.print(
        f"\n{seconds:.0f} s in all. Written: {out / 'results.json'}, {out / 'figure.png'}"
    )
    return results
