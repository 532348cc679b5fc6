# SPDX-License-Identifier: Apache-2.0
"""Gates of one seed, by the package's own command."""

from __future__ import annotations

from pathlib import Path

from bench.experiment.evaluate import gates_folder
from bench.experiment.settings import Settings
from seer_cuda import cli


def run(folder: Path, settings: Settings, seed: int, device: str, variant: str | None) -> None:
    """``python -m seer_cuda distill`` on the training packages' tokens.

    AdamW, warm-up, a cosine and the loss are the papers' and the command's own; the model computes
    `Settings.cache` windows once, and many more steps than the papers' draw from them. variant:
    another form than the run's, with as many channels as the model's heads.

    Raises:
        RuntimeError: the command failed; it has said why.
    """
    form = {"--gate": settings.gate, "--gate-dim": settings.gate_dim}
    if variant is not None:
        form = {"--gate": variant, "--gate-dim": settings.head_dim}
    options = {
        "--model": folder / "model",
        "--text": folder / "train.npy",
        "--out": gates_folder(folder, variant or seed),
        "--context": settings.context,
        "--cache": settings.cache,
        "--batch": settings.distil_batch,
        "--accumulate": 1,
        "--steps": settings.distil_steps,
        "--lr": settings.distil_lr,
        "--save-every": max(1, settings.distil_steps // 6),
        "--seed": seed,
        "--device": device,
    } | form
    words = [str(word) for option in options.items() for word in option]
    if code := cli.main(["distill", *words]):
        raise RuntimeError(f"distill: expected exit code 0, got {code}")
