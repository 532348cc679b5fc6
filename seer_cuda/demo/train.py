# SPDX-License-Identifier: Apache-2.0
"""Training the language model with torch's own dense attention."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from seer_cuda.demo.config import DemoConfig, TrainConfig
from seer_cuda.demo.model import CausalLM, next_byte_loss
from seer_cuda.demo.text import Corpus

#: Called after every step with a short description of where it stands.
Advance = Callable[[str], None]

_MOMENTUM = 0.95
#: Odd polynomial a x + b x^3 + c x^5 that drives singular values towards 1 in five rounds.
_ROUNDS, _POLYNOMIAL = 5, (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor) -> Tensor:
    """``[n, rows, columns]`` with the singular vectors kept and the singular values near 1."""
    a, b, c = _POLYNOMIAL
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Orthogonalised momentum (Muon, Jordan et al. 2024): matrices learn in far fewer steps."""

    def __init__(self, matrices: list[nn.Parameter], weight_decay: float) -> None:
        self.weight_decay = weight_decay
        shapes = {matrix.shape for matrix in matrices}
        # One product serves all matrices of a shape.
        self.groups = [[m for m in matrices if m.shape == shape] for shape in sorted(shapes)]
        self.momenta = [torch.zeros_like(torch.stack(list(group))) for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from the gradients present."""
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group])
            momentum.lerp_(gradient, 1 - _MOMENTUM)
            update = orthogonalised(gradient.lerp(momentum, _MOMENTUM))
            rows, columns = update.shape[1:]
            size = rate * max(1.0, rows / columns) ** 0.5
            for matrix, one in zip(group, update, strict=True):
                matrix.mul_(1 - rate * self.weight_decay).sub_(one, alpha=size)


class Pace:
    """How far a stage is, from 0 to 1: by its steps or, on a slow machine, by its time limit."""

    def __init__(self, steps: int, seconds: float | None) -> None:
        self.steps, self.seconds = steps, seconds
        self.started = time.monotonic()

    def __call__(self, step: int) -> float:
        """At the start of a step; 1 or more ends the stage."""
        by_time = 0.0 if self.seconds is None else (time.monotonic() - self.started) / self.seconds
        return max(step / self.steps, by_time)


def rate_factor(step: int, progress: float, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay."""
    return min(1.0, (step + 1) / config.warm_up, (1 - progress) / config.decay_share)


def train(config: DemoConfig, corpus: Corpus, advance: Advance) -> CausalLM:
    """A trained model on the configured device, frozen and in evaluation mode."""
    plan = config.train
    torch.manual_seed(config.seed)
    model = CausalLM(config.model).to(config.device)
    matrices = [
        p for layer in model.layers for name, p in layer.named_parameters() if _is_matrix(name)
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=plan.weight_decay, fused=True)
    muon = Muon(matrices, plan.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    pace, step = Pace(plan.steps, plan.seconds), 0
    while (progress := pace(step)) < 1:
        short = progress < plan.short_share
        context = plan.short_context if short else config.model.context
        tokens = corpus.sample(plan.tokens // context, context + 1, generator).to(config.device)
        with torch.autocast(config.device, config.dtype, enabled=config.dtype != torch.float32):
            logits = model(tokens[:, :-1])
        loss = next_byte_loss(logits, tokens).mean()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = rate_factor(step, progress, plan)
        for group in adam.param_groups:
            group["lr"] = plan.adam_rate * factor
        adam.step()
        muon.step(plan.muon_rate * factor)
        # Reading the loss waits for the device, so not at every step.
        advance(f"loss {loss.item():.2f}" if step % 10 == 0 else "")
        step += 1
    return model.eval().requires_grad_(False)


def _is_matrix(name: str) -> bool:
    return name.endswith(".weight") and "norm" not in name
