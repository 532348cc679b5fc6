# SPDX-License-Identifier: Apache-2.0
"""`GateConfig`: the shape of a gate, its names and the shapes of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from seer_cuda.gate_ops import pool_bits

_POOL_SETS = ("max", "min", "avg", "maxmin", "maxavg", "minavg", "maxminavg")

#: The 49 gates of the reference.
GATE_NAMES: tuple[str, ...] = tuple(f"Q{q}_K{k}" for q in _POOL_SETS for k in _POOL_SETS)


@dataclass(frozen=True)
class GateConfig:
    """Shape of an `AttnGate`.

    Attributes:
        heads_q: Query heads of the model.
        heads_kv: KV heads; divides heads_q.
        head_dim: Channels per head.
        name: Pooling, one of `GATE_NAMES`. All released prefill gates are ``Qavg_Kmaxminavg``.
        gate_dim: Channels of the gate embedding.
        block: Tokens per block, of q and of k.
        force_double: Project q even where the single-linear mode is possible.
        rope_theta: Base of the rotary frequencies (unused if the gate is given inv_freq).
        rotary_dim: Rotated channels, even, at most gate_dim. Default: gate_dim.
        attention_scaling: Factor on cos and sin (YaRN).
        init_std: Standard deviation of the initial weights.
        qk_norm: RMSNorm of both embeddings between projection and RoPE, one weight vector of
            gate_dim each for all heads, as SeerAttention-R's gates have. No released prefill gate
            has it.
        norm_eps: Added to the mean square (qk_norm).

    Raises:
        ValueError: a field outside its contract.
    """

    heads_q: int
    heads_kv: int
    head_dim: int
    name: str = "Qavg_Kmaxminavg"
    gate_dim: int = 128
    block: int = 64
    force_double: bool = False
    rope_theta: float = 10000.0
    rotary_dim: int | None = None
    attention_scaling: float = 1.0
    init_std: float = 0.02
    qk_norm: bool = False
    norm_eps: float = 1e-6
    q_pools: int = field(init=False)
    k_pools: int = field(init=False)

    def __post_init__(self) -> None:
        if self.name not in GATE_NAMES:
            raise ValueError(
                f"seer::AttnGate: name: expected Q<pools>_K<pools> with pools one of "
                f"{', '.join(_POOL_SETS)}, got {self.name!r}. Use Qavg_Kmaxminavg."
            )
        q_pools, k_pools = self.name.removeprefix("Q").split("_K")
        object.__setattr__(self, "q_pools", pool_bits(q_pools))
        object.__setattr__(self, "k_pools", pool_bits(k_pools))
        for name in ("heads_q", "heads_kv", "head_dim", "gate_dim", "block"):
            size = getattr(self, name)
            if not (is_whole(size) and size >= 1):
                raise ValueError(
                    f"seer::AttnGate: {name}: expected a whole number of at least 1, got {size!r}. "
                    "Take it from the model's configuration."
                )
        if self.heads_q % self.heads_kv:
            raise ValueError(
                f"seer::AttnGate: heads_kv: expected a divisor of heads_q = {self.heads_q}, got "
                f"{self.heads_kv}. Take both from the model's configuration."
            )
        for name in ("rope_theta", "attention_scaling", "init_std", "norm_eps"):
            value, positive = getattr(self, name), name in ("rope_theta", "attention_scaling")
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if not (number and (value > 0 or (value == 0 and not positive))):
                least = "above 0" if positive else "of at least 0"
                raise ValueError(
                    f"seer::AttnGate: {name}: expected a finite number {least}, got {value!r}. "
                    "Take it from the model's configuration, or leave it out."
                )
        if not is_whole(self.rotary) or self.rotary % 2 or not 0 <= self.rotary <= self.gate_dim:
            raise ValueError(
                f"seer::AttnGate: rotary_dim: expected an even number from 0 to gate_dim = "
                f"{self.gate_dim}, got {self.rotary!r}. Leave it out to rotate every channel."
            )

    @property
    def rotary(self) -> int:
        """Rotated channels."""
        return self.gate_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def single_linear(self) -> bool:
        """Whether pooled q is used as it is and k has one matrix per query head."""
        one_pool = self.q_pools.bit_count() == 1
        return one_pool and self.gate_dim == self.head_dim and not self.force_double

    @property
    def heads_k(self) -> int:
        """Heads of the key embedding: heads_q in single-linear mode, else heads_kv."""
        return self.heads_q if self.single_linear else self.heads_kv

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter names and shapes: projections ``[heads, n_pools * head_dim, gate_dim]``, norms
        ``[gate_dim]``."""
        shapes: dict[str, tuple[int, ...]] = {}
        if not self.single_linear:
            q_in = self.q_pools.bit_count() * self.head_dim
            shapes["mask_linear_q.weight"] = (self.heads_q, q_in, self.gate_dim)
        k_in = self.k_pools.bit_count() * self.head_dim
        shapes["mask_linear_k.weight"] = (self.heads_k, k_in, self.gate_dim)
        if self.qk_norm:
            shapes |= {"attngate_qnorm.weight": (self.gate_dim,)}
            shapes |= {"attngate_knorm.weight": (self.gate_dim,)}
        return shapes


def is_whole(value: object) -> bool:
    """Whether this is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)
