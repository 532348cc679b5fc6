# SPDX-License-Identifier: Apache-2.0
"""`AttnGate`: SeerAttention's learned gate for prefill (Gao et al. 2024, section 3.1).

A gate pools q and k over blocks, projects them per head, rotates both by the position of each
block's first token, and scores every pair of blocks. All 49 pooling combinations of the reference
are built by name, ``Q{pools}_K{pools}``; parameter names and shapes are those of the released
checkpoints (``mask_linear_q.weight``, ``mask_linear_k.weight``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from seer_cuda._checkpoint import released_gate_state
from seer_cuda._contracts import check_gate_alignment
from seer_cuda.block_mask import BlockMask
from seer_cuda.ops import POOLS, Method, gate_scores, gate_select, pool_bits, pool_gate

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
            if getattr(self, name) < 1:
                raise ValueError(
                    f"seer::AttnGate: {name}: expected at least 1, got {getattr(self, name)}. "
                    "Take it from the model's configuration."
                )
        if self.heads_q % self.heads_kv:
            raise ValueError(
                f"seer::AttnGate: heads_kv: expected a divisor of heads_q = {self.heads_q}, got "
                f"{self.heads_kv}. Take both from the model's configuration."
            )
        if self.rotary % 2 or not 0 <= self.rotary <= self.gate_dim:
            raise ValueError(
                f"seer::AttnGate: rotary_dim: expected an even number from 0 to gate_dim = "
                f"{self.gate_dim}, got {self.rotary}. Leave it out to rotate every channel."
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

    def weight_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Parameter names and shapes ``[heads, n_pools * head_dim, gate_dim]``."""
        k_in = self.k_pools.bit_count() * self.head_dim
        if self.single_linear:
            return {"mask_linear_k.weight": (self.heads_q, k_in, self.gate_dim)}
        q_in = self.q_pools.bit_count() * self.head_dim
        return {
            "mask_linear_q.weight": (self.heads_q, q_in, self.gate_dim),
            "mask_linear_k.weight": (self.heads_kv, k_in, self.gate_dim),
        }


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


class AttnGate(nn.Module):
    """The learned gate. Inputs are q and k after projection, before RoPE.

    ``A[h, i, j] = gate_dim ** -0.5 * rope(q_gate)[i, h] . rope(k_gate)[j, h or h // group]``

    Single-linear mode (one q pooling, gate_dim == head_dim, not force_double): pooled q is used
    as it is and pooled k of head h // group meets one matrix per query head. Double-linear mode:
    one matrix per query head for q, one per KV head for k.

    Args:
        config: The shape.
        inv_freq: float ``[rotary / 2]`` rotary frequencies, e.g. a Hugging Face rotary module's
            (llama3 or YaRN scaling included). Default: ``theta ** (-2 i / rotary)``.
        device, dtype: Of the weights. Frequencies stay float32 whatever the module is cast to.

    Raises:
        ValueError: inv_freq has another length than rotary / 2, or no values (meta).
    """

    def __init__(
        self,
        config: GateConfig,
        inv_freq: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        for name, shape in config.weight_shapes().items():
            linear = HeadLinear(shape, config.init_std, device, dtype)
            self.add_module(name.removesuffix(".weight"), linear)
        half = config.rotary // 2
        if inv_freq is None:
            # On the CPU whatever the default device: under torch.device("meta") they need values.
            exponent = torch.arange(half, dtype=torch.float64, device="cpu") / max(1, half)
            inv_freq = config.rope_theta**-exponent
        if inv_freq.shape != (half,):
            raise ValueError(
                f"seer::AttnGate: inv_freq: expected [{half}] (rotary_dim / 2), got "
                f"{list(inv_freq.shape)}. Set rotary_dim to twice its length."
            )
        if inv_freq.is_meta:
            raise ValueError(
                "seer::AttnGate: inv_freq: expected values, got a meta tensor. Leave it out, or "
                "compute it on the CPU."
            )
        self._frequencies = inv_freq.detach().to("cpu", torch.float32)
        self.register_buffer("inv_freq", self._frequencies, persistent=False)
        self._place_frequencies()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttnGate:
        # .to(bfloat16) must not round the frequencies: at 128k tokens they are angles of 1e5.
        super()._apply(fn, recurse)
        self._place_frequencies()
        return self

    def _place_frequencies(self) -> None:
        self.inv_freq = self._frequencies.to(self.mask_linear_k.weight.device)

    def rope_tables(self, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin, fp32 ``[..., blocks, rotary / 2]``, at the first token of every block.

        positions: ``[..., rows]`` token positions. (None, None) where nothing rotates.
        """
        if self.config.rotary == 0:
            return None, None
        first = positions[..., :: self.config.block]
        angle = first[..., None].to(torch.float32) * self.inv_freq
        scaling = self.config.attention_scaling
        return angle.cos() * scaling, angle.sin() * scaling

    def embed(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gate embeddings of q and k.

        Args:
            q: ``[batch, rows_q, heads_q, head_dim]``, before RoPE.
            k: ``[batch, rows_kv, heads_kv, head_dim]``, before RoPE, rows_kv >= rows_q. rows_kv -
                rows_q is a multiple of the block, since the gate's causal rule counts in blocks:
                start chunks of a prompt at multiples of the block.
            positions: Token positions of the KV rows, ``[rows_kv]`` or ``[batch|1, rows_kv]``; the
                query rows are the last rows_q of them. Default: 0, 1, 2, ...

        Returns:
            q_gate ``[batch, blocks_q, heads_q, gate_dim]`` and k_gate ``[batch, blocks_kv, heads_q
            (single-linear) or heads_kv, gate_dim]``, of q's dtype.

        Raises:
            ValueError: q, k or positions of another shape, rows_kv < rows_q, or a chunk that does
                not start at a multiple of the block.
        """
        self._check_inputs(q, k, positions)
        rows_q, rows_kv = q.shape[1], k.shape[1]
        if positions is None:
            positions = torch.arange(rows_kv, device=k.device)
        q_tables = self.rope_tables(positions[..., rows_kv - rows_q :])
        k_tables = self.rope_tables(positions)
        block = self.config.block
        q_gate = pool_gate(
            q, self._weight("mask_linear_q", q), *q_tables, block=block, pools=self.config.q_pools
        )
        k_gate = pool_gate(
            k, self._weight("mask_linear_k", k), *k_tables, block=block, pools=self.config.k_pools
        )
        return q_gate, k_gate

    def _check_inputs(self, q: Tensor, k: Tensor, positions: Tensor | None) -> None:
        config = self.config
        for name, x, heads in (("q", q, config.heads_q), ("k", k, config.heads_kv)):
            if x.dim() != 4 or tuple(x.shape[2:]) != (heads, config.head_dim):
                raise ValueError(
                    f"seer::AttnGate: {name}: expected [batch, rows, {heads}, {config.head_dim}] "
                    f"(heads, head_dim of the GateConfig), got {list(x.shape)}. Pass {name} "
                    "before RoPE, one row per token."
                )
        rows_q, rows_kv = q.shape[1], k.shape[1]
        if rows_kv < rows_q:
            raise ValueError(
                f"seer::AttnGate: k: expected rows_kv of at least rows_q = {rows_q}, got "
                f"{rows_kv}. Pass the keys of the whole prompt so far."
            )
        if positions is not None and (positions.dim() < 1 or positions.shape[-1] != rows_kv):
            raise ValueError(
                f"seer::AttnGate: positions: expected rows_kv = {rows_kv} in the last dimension, "
                f"got {list(positions.shape)}. Pass one position per KV row."
            )
        check_gate_alignment("AttnGate", rows_q, rows_kv, config.block, config.block, "block")

    def _weight(self, name: str, x: Tensor) -> Tensor | None:
        if name == "mask_linear_q" and self.config.single_linear:
            return None
        return getattr(self, name).weight.to(x.dtype)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> Tensor:
        """Gate scores, fp32 ``[batch, heads_q, blocks_q, blocks_kv]``, -inf where not visible.

        Arguments and errors as in `embed`. Differentiable in the weights, q and k; this is what
        `seer_cuda.distill.gate_loss` takes.
        """
        return gate_scores(*self.embed(q, k, positions))

    def select(
        self,
        q: Tensor,
        k: Tensor,
        method: Method = "threshold",
        value: float = 5e-4,
        positions: Tensor | None = None,
        *,
        sink: int = 0,
        local: int = 0,
        dense_last_rows: int = 0,
    ) -> BlockMask:
        """The block mask for these q and k; `seer_cuda.gate_select` explains the options.

        Arguments q, k, positions and errors as in `embed`. No gradient flows through a selection.

        The gate was trained on pooled blocks of queries. rows_q < block, a decode step above all,
        is outside of that distribution: the paper keeps decode dense, and so should the caller.
        """
        with torch.no_grad():
            q_gate, k_gate = self.embed(q, k, positions)
            return gate_select(
                q_gate,
                k_gate,
                method=method,
                value=value,
                sink=sink,
                local=local,
                dense_last_rows=dense_last_rows,
                block_q=self.config.block,
                block_kv=self.config.block,
                rows_q=q.shape[1],
                rows_kv=k.shape[1],
            )

    def load_released_state_dict(
        self, state: Mapping[str, Tensor], layer: int | None = None
    ) -> AttnGate:
        """Loads one layer of a released checkpoint (``attn_gate_weights.pth``).

        Args:
            state: All layers, with keys ``...layers.{i}.self_attn.attn_gate.mask_linear_k.weight``
                under any prefix (other keys of a whole model are skipped), or one gate's own keys.
                Weights are cast to the module's dtype. Parameters on the meta device take copies
                on the checkpoint's device, and the frequencies follow them there.
            layer: Which layer; needed where the keys carry layer numbers.

        Returns:
            The module.

        Raises:
            KeyError: a weight is missing, or another gate's weights are there; names the keys.
            ValueError: a weight has another shape (names the key and both shapes) or no values
                (meta), or the checkpoint is a decode gate of SeerAttention-R.
        """
        own = released_gate_state(state, layer)
        expected = self.config.weight_shapes()
        where = "" if layer is None else f" of layer {layer}"
        for name, shape in expected.items():
            if name not in own:
                raise KeyError(
                    f"seer::AttnGate: {name}{where}: expected a weight of shape {list(shape)}, got "
                    f"none among {sorted(own) or 'no keys'}. Check the layer and the key prefix."
                )
            if tuple(own[name].shape) != shape:
                raise ValueError(
                    f"seer::AttnGate: {name}{where}: expected shape {list(shape)}, got "
                    f"{list(own[name].shape)}. Set the GateConfig of this checkpoint."
                )
            if own[name].is_meta:
                raise ValueError(
                    f"seer::AttnGate: {name}{where}: expected values, got a meta tensor. Load the "
                    "checkpoint onto a device with memory."
                )
        extra = sorted(set(own) - set(expected))
        if extra:
            mode = "single" if self.config.single_linear else "double"
            raise KeyError(
                f"seer::AttnGate: {', '.join(extra)}{where}: expected only {sorted(expected)} in "
                f"{mode}-linear mode, got more. Set force_double, or use a prefill checkpoint."
            )
        if any(weight.is_meta for weight in self.parameters()):
            # There is no memory to copy into. Copies, so that training leaves the checkpoint alone.
            dtype = self.mask_linear_k.weight.dtype
            own = {name: value.detach().to(dtype, copy=True) for name, value in own.items()}
            self.load_state_dict(own, assign=True)
            self._place_frequencies()
        else:
            self.load_state_dict(own)
        return self


__all__ = ["GATE_NAMES", "POOLS", "AttnGate", "GateConfig", "HeadLinear", "released_gate_state"]
