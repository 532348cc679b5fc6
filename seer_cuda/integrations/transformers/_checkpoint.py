# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of a training run: weights, optimiser and step in one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seer_cuda.integrations.transformers._attach import gates
from seer_cuda.integrations.transformers._corpus import RunError, option

FILE = "checkpoint.pt"


def save(
    folder: Path,
    fixed: dict[str, Any],
    model: nn.Module,
    own: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    step: int,
) -> None:
    """Replaces the checkpoint as a whole.

    Args:
        folder: The run's.
        fixed: Options that a run which goes on may not change.
        model: With gates.
        own: The model's own weights by name, if they train.
        optimiser: Of all.
        step: Steps that are done.
    """
    state = {
        "step": step,
        "options": fixed,
        "gates": [gate.state_dict() for gate in gates(model)],
        "model": {name: weight.detach() for name, weight in own.items()},
        "optimiser": optimiser.state_dict(),
    }
    part = folder / f".{FILE}.part"
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / FILE)


@torch.no_grad()
def resume(
    folder: Path,
    fixed: dict[str, Any],
    model: nn.Module,
    own: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> int:
    """Puts everything back as it was saved; arguments as in `save`.

    Returns:
        Steps that the run in the folder has done; 0 for a new one.

    Raises:
        RunError: the run has other options or another text.
    """
    if not (folder / FILE).is_file():
        return 0
    state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    for name, value in fixed.items():
        began = state["options"].get(name)
        if name == "tokens" and began != value:
            raise RunError(
                f"--text: expected the tokens that the run in {folder} began with, got others. Put "
                "text and tokenizer back, or use another --out for another run."
            )
        if began != value:
            raise RunError(
                f"{option(name)}: expected {began}, as the run in {folder} has, "
                f"got {value}. Use another --out for another run."
            )
    for gate, weights in zip(gates(model), state["gates"], strict=True):
        gate.load_state_dict(weights)
    for name, weight in own.items():
        weight.copy_(state["model"][name])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]
