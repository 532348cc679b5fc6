# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m bench.experiment STAGE --folder DIR``."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

from bench.experiment.settings import PRESETS, Settings

STAGES = ("all", "corpus", "train", "distil", "eval", "prefill", "collect", "page")


def parser() -> argparse.ArgumentParser:
    """Options of every stage."""
    command = argparse.ArgumentParser(prog="python -m bench.experiment", description=__doc__)
    command.add_argument("stage", choices=STAGES)
    command.add_argument("--folder", type=Path, default=Path("/tmp/seer_experiment"))
    command.add_argument("--out", type=Path, help="of collect: default FOLDER/out")
    command.add_argument("--size", choices=tuple(PRESETS), default="full")
    command.add_argument("--packages", type=Path, nargs="+", help="folders of packages")
    command.add_argument("--minutes", type=float, help="of training")
    command.add_argument("--distil-steps", type=int)
    command.add_argument("--windows", type=int, help="of the evaluation")
    command.add_argument("--seed", type=int, help="of distil")
    command.add_argument("--gate", help="of distil: another form of gate")
    command.add_argument("--group", help="of eval: baselines, a seed or a form of gate")
    command.add_argument(
        "--gpus",
        nargs="+",
        default=["0"],
        help="of all; the first one trains; 1@480: the second one from 480 s on",
    )
    command.add_argument("--no-prefill", action="store_true", help="all: without prefill")
    command.add_argument("--check", action="store_true", help="of page: only say what is stale")
    return command


def settings_of(options: argparse.Namespace) -> Settings:
    """The preset with what the command line changes."""
    names = ("minutes", "distil_steps", "windows")
    changes = {name: getattr(options, name) for name in names}
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(PRESETS[options.size], **changes)


def _passed_on(options: argparse.Namespace) -> list[str]:
    """What the stages of `all` are given."""
    words = ["--size", options.size]
    for name in ("minutes", "distil_steps", "windows"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if options.packages:
        words += ["--packages", *map(str, options.packages)]
    return words


def main(argv: list[str] | None = None) -> int:
    """Runs a stage; the exit status."""
    options = parser().parse_args(argv)
    if options.stage == "page":
        from bench.experiment import page

        return page.main(options.out or options.folder / "out", options.check)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import torch

    settings, folder = settings_of(options), options.folder
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def log(text: str) -> None:
        print(text, flush=True)

    def collect() -> None:
        from bench.experiment import results

        out = options.out or folder / "out"
        log(f"results: {results.collect(folder, out, settings, date.today().isoformat())}")

    if options.stage == "all":
        from bench.experiment import driver

        gpus = options.gpus if device == "cuda" else ["cpu"]
        prefill = device == "cuda" and not options.no_prefill
        words = _passed_on(options)
        return driver.run(folder, settings, gpus, words, prefill=prefill, collect=collect)
    if options.stage == "corpus":
        from bench.experiment import corpus

        corpus.run(folder, settings, options.packages, library=options.packages is None)
    elif options.stage == "train":
        from bench.experiment import train

        train.run(folder, settings, device, log)
    elif options.stage == "distil":
        from bench.experiment import distil

        distil.run(folder, settings, options.seed, device, options.gate)
    elif options.stage == "eval":
        from bench.experiment import evaluate

        evaluate.run(folder, settings, options.group, device, log)
    elif options.stage == "prefill":
        from bench.experiment import prefill

        prefill.run(folder, settings, log)
    else:
        collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
