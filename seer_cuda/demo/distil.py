# SPDX-License-Identifier: Apache-2.0
"""Distilling one gate per layer from the frozen model (SeerAttention, Gao et al. 2024)."""

from __future__ import annotations

import math

import torch
from torch import nn

import seer_cuda
from seer_cuda.demo.config import DemoConfig, DistilConfig
from seer_cuda.demo.model import AttentionInput, CausalLM, rope_frequencies
from seer_cuda.demo.text import Corpus
from seer_cuda.demo.train import Advance, Pace


def make_gates(config: DemoConfig) -> nn.ModuleList:
    """Untrained gates, one per layer, with the model's rotary frequencies."""
    frequencies = rope_frequencies(config.model)
    gates = [seer_cuda.AttnGate(config.gate(), frequencies) for _ in range(config.model.layers)]
    return nn.ModuleList(gates).to(config.device)


def cosine_factor(step: int, progress: float, config: DistilConfig) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    return min(1.0, (step + 1) / config.warm_up) * 0.5 * (1 + math.cos(math.pi * progress))


def distil(config: DemoConfig, model: CausalLM, corpus: Corpus, advance: Advance) -> nn.ModuleList:
    """Trained gates.

    The model runs dense and frozen. In every layer one pass gives the attention output and the
    block maxima of the true attention map; normalised by row they are the gate's target. The loss
    is the KL divergence without the first quarter of block rows; AdamW, no weight decay.
    """
    plan = config.distil
    torch.manual_seed(config.seed + 1)
    gates = make_gates(config)
    optimiser = torch.optim.AdamW(gates.parameters(), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(config.seed + 1)
    losses: list[torch.Tensor] = []

    def attention(x: AttentionInput) -> torch.Tensor:
        out, _, pooled = seer_cuda.attn_pool(
            x.q_rope, x.k_rope, x.v, block_q=config.block, block_kv=config.block
        )
        with torch.enable_grad():
            scores = gates[x.layer](x.q, x.k)
            target = seer_cuda.distill.target_prefill(pooled)
            losses.append(seer_cuda.distill.gate_loss(scores, target))
        return out

    pace, step = Pace(plan.steps, plan.seconds), 0
    while (progress := pace(step)) < 1:
        losses.clear()
        tokens = corpus.sample(plan.windows, config.model.context, generator).to(config.device)
        # The layers' losses are independent: only the gates are in the graph.
        with (
            torch.no_grad(),
            torch.autocast(config.device, config.dtype, enabled=config.dtype != torch.float32),
        ):
            model(tokens, attention)
        loss = torch.stack(losses).sum()
        gates.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = plan.rate * cosine_factor(step, progress, plan)
        optimiser.step()
        advance(f"KL loss {loss.item():.3f}" if step % 10 == 0 else "")
        step += 1
    return gates.eval().requires_grad_(False)
