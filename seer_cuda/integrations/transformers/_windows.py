# SPDX-License-Identifier: Apache-2.0
"""Windows that go through a frozen model once, however often its gates learn from them.

A gate sees a prompt pooled over blocks, and its target is a map of blocks: at blocks of 64 both are
a small part of what the model computes for them. Kept, they make a training step some twenty times
cheaper than the model's forward, so that gates can be trained for longer, on the same windows in
another order each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from seer_cuda._contracts import ceil_div
from seer_cuda._gate_pooled import embed_pooled, pooled_inputs
from seer_cuda.distill import gate_kl
from seer_cuda.integrations.transformers._attach import choosing, gates
from seer_cuda.integrations.transformers._corpus import RunError
from seer_cuda.integrations.transformers._state import Prompt
from seer_cuda.ops import attn_pool

# Probabilities below 2^-24 become 0 and others keep 11 bits; a target's row is divided by its sum.
_MAP_DTYPE = torch.float16


class KeptWindows:
    """Pooled q and k and the pooled attention map of every layer, on the layers' devices.

    Args:
        model: With gates; any mode. It may not change afterwards, nor the gates' form.
        windows: int64 ``[1, length]`` each, of one length.
        count: How many there are.

    Raises:
        RunError: there is no memory for them.
        ValueError: no gates.
    """

    def __init__(self, model: nn.Module, windows: Iterable[Tensor], count: int) -> None:
        self.gates, self.count = gates(model), count
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []
        self._now = 0
        device = next(model.parameters()).device
        with torch.no_grad(), choosing(model, self._keep):
            for self._now, window in enumerate(windows):
                model.base_model(window.to(device), use_cache=False)

    def _keep(self, prompt: Prompt) -> None:
        gate, block = prompt.gate, prompt.gate.config.block
        sizes = {"block_q": block, "block_kv": block, "scale": prompt.scale}
        pooled = attn_pool(prompt.q, prompt.k, prompt.v, **sizes)[2]
        found = (*pooled_inputs(gate, prompt.q_before, prompt.k_before), pooled.to(_MAP_DTYPE))
        if prompt.layer == len(self.layers):
            self.layers.append(self._room(found))
        for room, one in zip(self.layers[prompt.layer], found, strict=True):
            room[self._now] = one[0]

    def _room(self, like: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One layer's tensors for all windows."""
        try:
            q, k, pooled = (x.new_empty(self.count, *x.shape[1:]) for x in like)
        except RuntimeError as error:  # of the CUDA allocator, too
            size = sum(x.numel() * x.element_size() for x in like) * len(self.gates) / 2**20
            raise RunError(
                f"--cache: expected memory for {self.count} windows of {size:.0f} MiB each, got "
                "too little. Keep fewer windows."
            ) from error
        return q, k, pooled

    def order(self, count: int, seed: int, step: int) -> Tensor:
        """int64 ``[count]``: windows of a training step, each once before any comes again.

        They follow from seed and step alone.
        """
        first = step * count
        epochs = range(first // self.count, ceil_div(first + count, self.count))
        orders = [
            torch.randperm(
                self.count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            )
            for epoch in epochs
        ]
        return torch.cat(orders)[first - epochs[0] * self.count :][:count]

    def loss(self, index: Tensor) -> Tensor:
        """fp32 scalar: `gate_loss` of these windows, differentiable in the gates' weights.

        index: int64 ``[batch]``.
        """
        losses = []
        for gate, layer in zip(self.gates, self.layers, strict=True):
            q, k, pooled = (x[index.to(x.device)] for x in layer)
            losses.append(gate_kl(*embed_pooled(gate, q, k), pooled))
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
