# SPDX-License-Identifier: Apache-2.0
"""Gates of one seed, by the package's own command."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.experiment.evaluate import gates_folder
from bench.experiment.settings import Settings
from seer_cuda import cli
from seer_cuda.integrations import transformers as seer_hf
from seer_cuda.integrations.transformers._train import open_model


def run(folder: Path, settings: Settings, seed: int, device: str, gate: str | None = None) -> None:
    """``python -m seer_cuda distill`` on the training packages' tokens.

    The papers' recipe (AdamW, rate 1e-3, 20 steps of warm-up, a cosine, gates alone) with fewer
    windows. gate: another form than the released gates', whose weights then begin in a folder.

    Raises:
        RuntimeError: the command failed; it has said why.
    """
    options = {
        "--model": folder / "model",
        "--text": folder / "train.npy",
        "--out": gates_folder(folder, gate or seed),
        "--context": settings.context,
        "--batch": 1,
        "--accumulate": settings.distil_batch,
        "--steps": settings.distil_steps,
        "--save-every": max(1, settings.distil_steps // 6),
        "--seed": seed,
        "--device": device,
    }
    if gate is not None:
        model, _ = open_model(str(folder / "model"), "cpu")
        torch.manual_seed(seed)
        seer_hf.attach(model, seer_hf.SeerConfig(gate=gate), dtype=torch.float32)
        options["--gates"] = folder / f"begin_{gate}"
        seer_hf.save_gates(model, options["--gates"])
    words = [str(word) for option in options.items() for word in option]
    if code := cli.main(["distill", *words]):
        raise RuntimeError(f"distill: expected exit code 0, got {code}")
