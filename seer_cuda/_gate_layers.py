# SPDX-License-Identifier: Apache-2.0
"""The parameters of a gate, under the names of the released checkpoints."""

from __future__ import annotations

import torch
from torch import nn


class HeadLinear(nn.Module):
    """The weights of one projection per head, ``[heads, in, out]``; applied by `pool_gate`."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        std: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights from N(0, std)."""
        nn.init.normal_(self.weight, std=self.std)

    def extra_repr(self) -> str:
        heads, width_in, width_out = self.weight.shape
        return f"heads={heads}, in={width_in}, out={width_out}"


class GateNorm(nn.Module):
    """The weight of an embedding's RMSNorm, ``[gate_dim]``; applied by `AttnGate.embed`."""

    def __init__(
        self,
        gate_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(gate_dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Sets the weight to 1."""
        nn.init.ones_(self.weight)
