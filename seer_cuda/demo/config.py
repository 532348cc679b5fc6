# SPDX-License-Identifier: Apache-2.0
"""Every number of the demo: model, training, distillation, evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from seer_cuda.gate import GateConfig

#: The smallest block size of the compiled CUDA kernels; the CPU kernels also take 16 and 32.
_CUDA_BLOCK = 64
# A run makes its own seeds of this one and small numbers; they fit 64 bits.
_SEEDS = 2**31
#: With fewer, 10 % of the causal triangle is the diagonal alone and leaves nothing to choose.
LEAST_BLOCKS = 40


class ConfigError(ValueError):
    """Options that do not fit together; the message says which."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the language model."""

    layers: int
    width: int
    mlp: int
    heads_q: int
    heads_kv: int
    head_dim: int
    context: int  # tokens of a window; the longest the model can read
    bytes_seen: int = 6  # bytes that a token's embedding sums over
    rope_theta: float = 1e6


@dataclass(frozen=True)
class TrainConfig:
    """Training of the language model: short windows first, they cost less attention."""

    steps: int
    tokens: int  # per step, a multiple of both window lengths
    short_context: int
    short_share: float = 0.4  # of all steps
    warm_up: int = 20
    decay_share: float = 0.5  # last part of the steps, in which the rates fall to nearly 0
    adam_rate: float = 5e-3  # embedding, head, norms
    muon_rate: float = 2e-2  # matrices of the layers
    weight_decay: float = 0.05
    seconds: float | None = 150.0  # a machine too slow for the steps makes fewer; None: all


@dataclass(frozen=True)
class DistilConfig:
    """Distillation of the gates (SeerAttention, Gao et al. 2024, section 4.1)."""

    steps: int
    windows: int  # per step
    rate: float  # the paper: 1e-3 for 500 steps of a million tokens; fewer tokens want more
    warm_up: int = 20
    seconds: float | None = 50.0


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text."""

    windows: int
    windows_at_once: int
    densities: tuple[float, ...] = (0.5, 0.25, 0.1)
    timing_repeats: int = 9


@dataclass(frozen=True)
class DemoConfig:
    """A whole run."""

    size: str
    model: ModelConfig
    train: TrainConfig
    distil: DistilConfig
    evaluation: EvalConfig
    block: int  # tokens per block, of queries and of keys
    device: str = "cpu"
    seed: int = 0

    @property
    def blocks(self) -> int:
        """Blocks of a window."""
        return self.model.context // self.block

    @property
    def dtype(self) -> torch.dtype:
        """Of activations; weights stay float32."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def train_bytes(self) -> int:
        """Text needed to train: enough that windows of one step hardly repeat those of another."""
        return 64 * (self.model.context + 1)

    @property
    def held_out_bytes(self) -> int:
        """Text needed to evaluate: disjoint windows."""
        return self.evaluation.windows * (self.model.context + 1)

    def gate(self) -> GateConfig:
        """The gate of a layer: single-linear, block RoPE at the model's frequencies."""
        return GateConfig(
            heads_q=self.model.heads_q,
            heads_kv=self.model.heads_kv,
            head_dim=self.model.head_dim,
            name="Qavg_Kmaxminavg",
            gate_dim=self.model.head_dim,
            block=self.block,
            rope_theta=self.model.rope_theta,
        )


#: Two minutes on 2 CPU cores that have nothing else to do.
SMALL = DemoConfig(
    size="small",
    model=ModelConfig(
        layers=2, width=192, mlp=384, heads_q=4, heads_kv=2, head_dim=64, context=2048
    ),
    train=TrainConfig(steps=320, tokens=2048, short_context=512),
    distil=DistilConfig(steps=120, windows=2, rate=2e-2),
    evaluation=EvalConfig(windows=16, windows_at_once=4),
    block=16,
)

#: One GPU: 128 blocks of 64 tokens.
LARGE = DemoConfig(
    size="large",
    model=ModelConfig(
        layers=4, width=512, mlp=1024, heads_q=8, heads_kv=2, head_dim=128, context=8192
    ),
    train=TrainConfig(steps=800, tokens=65536, short_context=1024, warm_up=50),
    distil=DistilConfig(steps=200, windows=4, rate=1e-2),
    evaluation=EvalConfig(windows=16, windows_at_once=4),
    block=64,
)

SIZES: dict[str, DemoConfig] = {"small": SMALL, "large": LARGE}


def make_config(
    size: str,
    device: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    distil_steps: int | None = None,
    windows: int | None = None,
    context: int | None = None,
) -> DemoConfig:
    """A size of `SIZES` on a device, with some of its numbers replaced.

    Args:
        size: A key of `SIZES`.
        device: "cpu" or "cuda". CUDA kernels need blocks of 64: smaller ones grow to it, and the
            context with them.
        seed: Of the model's weights, the training windows and the random selection.
        steps, distil_steps: Optimiser steps, made however long they take.
        windows: Held-out windows.
        context: Tokens of a window.

    Raises:
        ConfigError: a seed out of its range, a number below 1, or a context that is not a multiple
            of the block with at least `LEAST_BLOCKS` blocks.
    """
    if not 0 <= seed < _SEEDS:
        raise ConfigError(f"--seed: expected 0 to {_SEEDS - 1}, got {seed}.")
    config = replace(SIZES[size], device=device, seed=seed)
    given = {"steps": steps, "distil-steps": distil_steps, "windows": windows, "context": context}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: expected at least 1, got {value}.")
    if device == "cuda" and config.block < _CUDA_BLOCK:
        longer = config.model.context * _CUDA_BLOCK // config.block
        config = _with_context(replace(config, block=_CUDA_BLOCK), longer)
    if steps is not None:
        warm_up = min(config.train.warm_up, steps)
        plan = replace(config.train, steps=steps, warm_up=warm_up, seconds=None)
        config = replace(config, train=plan)
    if distil_steps is not None:
        warm_up = min(config.distil.warm_up, distil_steps)
        plan = replace(config.distil, steps=distil_steps, warm_up=warm_up, seconds=None)
        config = replace(config, distil=plan)
    if windows is not None:
        config = replace(config, evaluation=replace(config.evaluation, windows=windows))
    if context is not None:
        config = _with_context(config, context)
    return config


def _with_context(config: DemoConfig, context: int) -> DemoConfig:
    if context % config.block or context < LEAST_BLOCKS * config.block:
        raise ConfigError(
            f"--context: expected a multiple of {config.block} (the block), at least "
            f"{LEAST_BLOCKS * config.block}, got {context}."
        )
    short = math.gcd(config.train.short_context, context)
    tokens = max(1, round(config.train.tokens / context)) * context
    return replace(
        config,
        model=replace(config.model, context=context),
        train=replace(config.train, short_context=short, tokens=tokens),
    )


def as_json(config: object) -> object:
    """Plain dictionaries, lists and values of a configuration."""
    if hasattr(config, "__dataclass_fields__"):
        return {f.name: as_json(getattr(config, f.name)) for f in fields(config)}
    return list(config) if isinstance(config, tuple) else config
