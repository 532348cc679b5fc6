# SPDX-License-Identifier: Apache-2.0
"""The sizes of a run. FULL is the experiment; TINY shows on a CPU in seconds that it works."""

from __future__ import annotations

from dataclasses import dataclass

DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        vocabulary: Of the tokenizer.
        sample_bytes: Text that the tokenizer is trained on.
        held_out_bytes, validation_bytes: Whole packages of at least these sizes in all.
        package_bytes: Smallest and largest package that may be held out.
        context: Tokens of the windows of distillation and evaluation.
        phases: (context, share of the training time); step_tokens tokens per step in all.
        gate, gate_dim: Form of the gates (`seer_cuda.gate.GATE_NAMES`) and their channels.
        cache: Windows that the model computes once for the gates of a seed.
        distil_steps, distil_batch, distil_lr: Of each seed, on these windows.
        windows: Held-out windows of the evaluation.
        variants: Other forms of gate, with head_dim channels, of the first seed alone.
        validation_windows: Those that adaptive rules are calibrated and chosen on.
    """

    vocabulary: int = 8192
    sample_bytes: int = 30_000_000
    held_out_bytes: int = 8_000_000
    validation_bytes: int = 2_500_000
    package_bytes: tuple[int, int] = (300_000, 1_500_000)

    layers: int = 8
    hidden: int = 768
    intermediate: int = 2048
    heads: tuple[int, int] = (12, 4)
    head_dim: int = 64
    theta: float = 500_000.0
    context: int = 32768

    phases: tuple[tuple[int, float], ...] = ((2048, 0.35), (8192, 0.25), (32768, 0.40))
    step_tokens: int = 65536
    lr: float = 1.5e-3
    minutes: float = 8.0
    compile: bool = True

    seeds: tuple[int, ...] = (0, 1, 2)
    gate: str = "Qmaxminavg_Kmaxminavg"
    gate_dim: int = 128
    cache: int = 1000
    distil_steps: int = 4000
    distil_batch: int = 8
    distil_lr: float = 5e-3
    variants: tuple[str, ...] = ("Qavg_Kmaxminavg",)

    windows: int = 20
    validation_windows: int = 4
    densities: tuple[float, ...] = DENSITIES


FULL = Settings()
TINY = Settings(
    vocabulary=512,
    sample_bytes=200_000,
    held_out_bytes=60_000,
    validation_bytes=30_000,
    package_bytes=(10_000, 4_000_000),
    layers=2,
    hidden=64,
    intermediate=96,
    heads=(2, 1),
    head_dim=64,
    context=640,
    phases=((128, 0.5), (640, 0.5)),
    step_tokens=1280,
    minutes=0.05,
    compile=False,
    seeds=(0, 1),
    cache=3,
    distil_steps=4,
    distil_batch=2,
    windows=2,
    validation_windows=1,
    densities=(0.5, 0.2),
)
PRESETS = {"full": FULL, "tiny": TINY}
