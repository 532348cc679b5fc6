# SPDX-License-Identifier: Apache-2.0
"""`Distill`: the options of a training run, checked, and its rates step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from seer_cuda.distill import LOSS_SCALE
from seer_cuda.integrations.transformers._config import SeerConfig
from seer_cuda.integrations.transformers._corpus import RunError, option

_JOINT = ("model_lr", "gate_scale", "checkpointing")
# Every generator of a run takes its seed from this range and a few numbers more.
_SEEDS = 2**31


@dataclass(frozen=True)
class Distill:
    """Options of a training run; those of the reference's recipes are the rates, warm_up and the
    losses.

    Attributes:
        cache: Windows that the model computes once and steps draw from; 0: every step has new
            ones.
        gates: A folder with gates to begin with; None: new ones.
        gate, gate_dim: Form of new ones, as in `SeerConfig`.
        train_all: Train the model too, on its own loss plus gate_scale times the gates'.
        model_lr: The model's rate; lr is the gates'.
        checkpointing: Keep a layer's input only and compute the layer again in backward.
        tensorboard: A folder for its events.

    Raises:
        RunError: a value outside its range, or options that exclude each other.
    """

    model: str
    text: str
    out: str
    context: int = 8192
    batch: int = 1
    accumulate: int = 16
    steps: int = 500
    lr: float = 1e-3
    warm_up: int = 20
    seed: int = 0
    save_every: int = 25
    device: str = "auto"
    cache: int = 0
    gates: str | None = None
    gate: str = SeerConfig.gate
    gate_dim: int | None = None
    train_all: bool = False
    model_lr: float = 1e-5
    gate_scale: float = LOSS_SCALE
    checkpointing: bool = False
    tensorboard: str | None = None

    def __post_init__(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in _JOINT:
            value = getattr(self, name)
            if not self.train_all and value != defaults[name]:
                raise RunError(
                    f"{option(name)}: expected --train-all with it, got none. Add --train-all, or "
                    "leave it out: gates alone need nothing of the model but its forward."
                )
        for name in ("lr", "model_lr", "gate_scale"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise RunError(f"{option(name)}: expected a finite number >= 0, got {value}.")
        if self.train_all and self.cache:
            raise RunError(
                f"--cache: expected none with --train-all, got {self.cache}. A model that trains "
                "computes every window anew."
            )
        if self.gates is not None and (self.gate, self.gate_dim) != (SeerConfig.gate, None):
            raise RunError(
                "--gate, --gate-dim: expected none with --gates, got one. Gates in a folder have "
                "their form."
            )
        # A window of one token has no next one, and nothing to attend to but itself.
        least = {"context": 2, "warm_up": 0, "cache": 0}
        for name in ("context", "batch", "accumulate", "steps", "save_every", "warm_up", "cache"):
            value, low = getattr(self, name), least.get(name, 1)
            if value < low:
                raise RunError(f"{option(name)}: expected at least {low}, got {value}.")
        if not 0 <= self.seed < _SEEDS:
            raise RunError(f"--seed: expected 0 to {_SEEDS - 1}, got {self.seed}.")

    @property
    def peaks(self) -> dict[str, float]:
        """The highest rates: of the gates, then of the model if it trains."""
        return {"lr": self.lr} | ({"model_lr": self.model_lr} if self.train_all else {})


def schedule(step: int, options: Distill) -> float:
    """Factor on the rates: linear warm-up, then half a cosine down to 0."""
    rise = min(1.0, (step + 1) / max(1, options.warm_up))
    return rise * 0.5 * (1 + math.cos(math.pi * step / options.steps))
