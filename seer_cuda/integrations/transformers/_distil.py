# SPDX-License-Identifier: Apache-2.0
"""The distillation loss of one layer, whose gradients are made on the way forward.

A gate's loss needs nothing from other layers, and nothing of it reaches the model around it. So
each layer makes its weights' gradients at once and keeps those instead of q and k (at 64k tokens of
an 8B model 0.7 GB a layer), whatever kind of gradient checkpointing the model uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seer_cuda.distill import gate_kl
from seer_cuda.gate import AttnGate


class _LayerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: AttnGate, q: Tensor, k: Tensor, pooled: Tensor, *weights: Tensor
    ) -> Tensor:
        with torch.enable_grad():
            loss = gate_kl(*gate.embed(q, k), pooled)
            grads = torch.autograd.grad(loss, weights)
        ctx.save_for_backward(*grads)
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None,) * 4 + tuple(saved * grad for saved in ctx.saved_tensors)


def layer_loss(gate: AttnGate, q: Tensor, k: Tensor, pooled: Tensor, training: bool) -> Tensor:
    """fp32 scalar: `seer_cuda.distill.gate_kl` of one gate.

    With gradients where they are enabled, and in training even where they are not: the forward of
    a checkpointed layer runs without.
    """
    weights = [weight for weight in gate.parameters() if weight.requires_grad]
    wanted = (torch.is_grad_enabled() or training) and not torch.is_inference_mode_enabled()
    q, k = q.detach(), k.detach()
    if not (weights and wanted):
        with torch.no_grad():
            return gate_kl(*gate.embed(q, k), pooled)
    with torch.enable_grad():
        return _LayerLoss.apply(gate, q, k, pooled, *weights)
