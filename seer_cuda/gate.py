# SPDX-License-Identifier: Apache-2.0
"""`AttnGate`: SeerAttention's learned gate for prefill (Gao et al. 2024, section 3.1).

A gate pools q and k over blocks, projects them per head, rotates both by the position of each
block's first token, and scores every pair of blocks. All 49 pooling combinations of the reference
are built by name, ``Q{pools}_K{pools}``; parameter names and shapes are those of the released
checkpoints (``mask_linear_q.weight``, ``mask_linear_k.weight``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seer_cuda._checkpoint import check_gate_state, released_gate_state
from seer_cuda._contracts import ceil_div, check_gate_alignment
from seer_cuda._gate_config import GATE_NAMES, GateConfig
from seer_cuda._gate_layers import GateNorm, HeadLinear
from seer_cuda._gate_math import norm_rotate
from seer_cuda._packed import Packed
from seer_cuda._rope_tables import KeptTables
from seer_cuda.block_mask import BlockMask
from seer_cuda.gate_ops import POOLS, gate_scores, pool_gate
from seer_cuda.prefill import gate_mask
from seer_cuda.select import Method, Rule

if TYPE_CHECKING:
    from seer_cuda.gate_cache import GateKeyCache

_Tables = tuple[Tensor | None, Tensor | None]


class AttnGate(nn.Module):
    """The learned gate. Inputs are q and k after projection, before RoPE.

    ``A[h, i, j] = gate_dim ** -0.5 * rope(q_gate)[i, h] . rope(k_gate)[j, h or h // group]``

    Single-linear mode (one q pooling, gate_dim == head_dim, not force_double): pooled q is used
    as it is and pooled k of head h // group meets one matrix per query head. Double-linear mode:
    one matrix per query head for q, one per KV head for k. With qk_norm, each embedding goes
    through ``x / sqrt(mean(x^2) + norm_eps) * weight`` before RoPE.

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
            if len(shape) == 1:
                module: nn.Module = GateNorm(shape[0], device, dtype)
            else:
                module = HeadLinear(shape, config.init_std, device, dtype)
            self.add_module(name.removesuffix(".weight"), module)
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
        with torch.inference_mode(False):  # an own copy with a version, for the kept tables
            self._frequencies = inv_freq.detach().to("cpu", torch.float32, copy=True)
        self.register_buffer("inv_freq", self._frequencies, persistent=False)
        self._place_frequencies()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttnGate:
        # .to(bfloat16) must not round the frequencies: at 128k tokens they are angles of 1e5.
        placed = self.inv_freq
        super()._apply(fn, recurse)
        if self.mask_linear_k.weight.device == placed.device:
            # Not a copy, and the tables stay: a captured CUDA graph may read both.
            self.inv_freq = placed
        else:
            self._place_frequencies()
        return self

    def _place_frequencies(self) -> None:
        with torch.inference_mode(False):
            self.inv_freq = self._frequencies.to(self.mask_linear_k.weight.device)
        self._kept_tables = KeptTables()

    def rope_tables(self, positions: Tensor) -> _Tables:
        """cos and sin, fp32 ``[..., blocks, rotary / 2]``, at the first token of every block.

        positions: ``[..., rows]`` token positions. (None, None) where nothing rotates.
        """
        if self.config.rotary == 0:
            return None, None
        return self._rope_at(positions[..., :: self.config.block])

    def _rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[..., None].to(torch.float32) * self.inv_freq
        scaling = self.config.attention_scaling
        return angle.cos() * scaling, angle.sin() * scaling

    def _tables(self, positions: Tensor | None, first: int, rows: int) -> _Tables:
        """RoPE tables of `rows` rows: at positions, or for None at first, first + 1, ..."""
        if positions is not None or self.config.rotary == 0:
            return (None, None) if positions is None else self.rope_tables(positions)
        block = self.config.block
        blocks = first // block, ceil_div(first + rows, block)
        return self._kept_tables.get(self.inv_freq, blocks, block, self._rope_at)

    def embed(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor | None = None,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_rows_q: int = 0,
        max_rows_kv: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Gate embeddings of q and k.

        Args:
            q: ``[batch, rows_q, heads_q, head_dim]``, before RoPE.
            k: ``[batch, rows_kv, heads_kv, head_dim]``, before RoPE, rows_kv >= rows_q. rows_kv -
                rows_q is a multiple of the block, since the gate's causal rule counts in blocks:
                start chunks of a prompt at multiples of the block.
            positions: Token positions of the KV rows, ``[rows_kv]`` or ``[batch|1, rows_kv]``; the
                query rows are the last rows_q of them. Default: 0, 1, 2, ...
            cu_seqlens_q, cu_seqlens_kv: int32 ``[batch + 1]``, both or neither: packed sequences,
                q ``[total_q, heads_q, head_dim]``, k ``[total_kv, heads_kv, head_dim]``, positions
                ``[total_kv]``, each sequence as above by itself. Lengths are not read: that the
                queries of each start at a multiple of the block is up to the caller. One tensor
                for both saves four small launches.
            max_rows_q, max_rows_kv: Longest sequences; needed with cu_seqlens.

        Returns:
            q_gate ``[batch, blocks_q, heads_q, gate_dim]`` and k_gate ``[batch, blocks_kv, heads_q
            (single-linear) or heads_kv, gate_dim]``, of q's dtype; packed with the block counts of
            max_rows, and 0 past a shorter sequence.

        Raises:
            ValueError: q, k or positions of another shape, rows_kv < rows_q, a chunk that does
                not start at a multiple of the block, or one of cu_seqlens without the other.
            RuntimeError: refused by the op.
        """
        lengths = (cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv)
        packed = Packed.of("AttnGate", *lengths)
        self._check("q", q, packed=packed is not None)
        self._check("k", k, positions, packed=packed is not None)
        if packed is not None:
            tables_q, tables_k = self._packed_tables(positions, packed)
        else:
            tables_q, tables_k = self._chunk_tables(positions, q.shape[1], k.shape[1])
        if torch.is_grad_enabled():
            return (
                self._embed_one("q", q, tables_q, cu_seqlens_q, max_rows_q),
                self._embed_one("k", k, tables_k, cu_seqlens_kv, max_rows_kv),
            )
        # One launch for both.
        config = self.config
        q_gate, k_gate = torch.ops.seer._pool_gate_pair(
            q,
            k,
            self._weight("q", q),
            self._weight("k", k),
            *self._fused(tables_q),
            *self._fused(tables_k),
            config.block,
            config.block,
            config.q_pools,
            config.k_pools,
            *lengths,
        )
        return self._normed("q", q_gate, tables_q), self._normed("k", k_gate, tables_k)

    def _packed_tables(self, positions: Tensor | None, packed: Packed) -> tuple[_Tables, _Tables]:
        """RoPE tables of packed q and k, ``[blocks, w]`` or ``[batch, blocks, w]``."""
        block = self.config.block
        if self.config.rotary == 0:
            return (None, None), (None, None)
        if positions is not None and positions.numel():  # no tokens have no first one
            at_q, at_k = (positions[at] for at in packed.first_tokens(block, len(positions)))
            return self._rope_at(at_q), self._rope_at(at_k)
        most = max(packed.blocks(block))
        tables = self._kept_tables.get(self.inv_freq, (0, most), block, self._rope_at)
        return packed.tables(*tables, block)

    def _chunk_tables(
        self, positions: Tensor | None, rows_q: int, rows_kv: int
    ) -> tuple[_Tables, _Tables]:
        """RoPE tables of q and k, where the queries are the last of the rows."""
        first = rows_kv - rows_q
        if first < 0:
            raise ValueError(
                f"seer::AttnGate: k: expected rows_kv of at least rows_q = {rows_q}, got "
                f"{rows_kv}. Pass the keys of the whole prompt so far."
            )
        block = self.config.block
        check_gate_alignment("AttnGate", rows_q, rows_kv, block, block, "block")
        at_q = None if positions is None else positions[..., first:]
        return self._tables(at_q, first, rows_q), self._tables(positions, 0, rows_kv)

    def embed_q(self, q: Tensor, positions: Tensor | None = None, *, first: int = 0) -> Tensor:
        """Gate embedding of q alone, e.g. of a later chunk against kept keys.

        Args:
            q: ``[batch, rows, heads_q, head_dim]``, before RoPE.
            positions: Token positions of these rows, ``[rows]`` or ``[batch|1, rows]``. Default:
                first, first + 1, ...
            first: Index of the first row in its sequence, a multiple of the block.

        Returns:
            ``[batch, blocks, heads_q, gate_dim]`` of q's dtype.

        Raises:
            ValueError: q or positions of another shape, or first is no multiple of the block.
        """
        return self._embed_alone("q", q, positions, first)

    def embed_k(self, k: Tensor, positions: Tensor | None = None, *, first: int = 0) -> Tensor:
        """Gate embedding of k alone: what a cache of gate keys holds (`GateKeyCache`).

        Args:
            k: ``[batch, rows, heads_kv, head_dim]``, before RoPE.
            positions, first: As in `embed_q`.

        Returns:
            ``[batch, blocks, heads_q (single-linear) or heads_kv, gate_dim]`` of k's dtype.

        Raises:
            ValueError: k or positions of another shape, or first is no multiple of the block.
        """
        return self._embed_alone("k", k, positions, first)

    def _embed_alone(self, side: str, x: Tensor, positions: Tensor | None, first: int) -> Tensor:
        self._check(side, x, positions)
        if first < 0 or first % self.config.block:
            raise ValueError(
                f"seer::AttnGate: first: expected a multiple of block = {self.config.block}, got "
                f"{first}. Start chunks at multiples of the block."
            )
        return self._embed_one(side, x, self._tables(positions, first, x.shape[1]))

    def _embed_one(
        self,
        side: str,
        x: Tensor,
        tables: _Tables,
        cu_seqlens: Tensor | None = None,
        max_rows: int = 0,
    ) -> Tensor:
        config = self.config
        pools = config.q_pools if side == "q" else config.k_pools
        gate = pool_gate(
            x,
            self._weight(side, x),
            *self._fused(tables),
            block=config.block,
            pools=pools,
            cu_seqlens=cu_seqlens,
            max_rows=max_rows,
        )
        return self._normed(side, gate, tables)

    def _fused(self, tables: _Tables) -> _Tables:
        """The tables that `pool_gate` applies: none where a norm stands before RoPE."""
        return (None, None) if self.config.qk_norm else tables

    def _normed(self, side: str, gate: Tensor, tables: _Tables) -> Tensor:
        if not self.config.qk_norm:
            return gate
        norm = self.attngate_qnorm if side == "q" else self.attngate_knorm
        return norm_rotate(gate, norm.weight, self.config.norm_eps, *tables)

    def _weight(self, side: str, x: Tensor) -> Tensor | None:
        if side == "q" and self.config.single_linear:
            return None
        linear = self.mask_linear_q if side == "q" else self.mask_linear_k
        return linear.weight.to(x.dtype)

    def _check(
        self, side: str, x: Tensor, positions: Tensor | None = None, *, packed: bool = False
    ) -> None:
        config = self.config
        heads = config.heads_q if side == "q" else config.heads_kv
        rank, rows_of = (3, "total") if packed else (4, "batch, rows")
        if x.dim() != rank or tuple(x.shape[-2:]) != (heads, config.head_dim):
            raise ValueError(
                f"seer::AttnGate: {side}: expected [{rows_of}, {heads}, {config.head_dim}] "
                f"(heads, head_dim of the GateConfig), got {list(x.shape)}. Pass {side} before "
                "RoPE, one row per token."
            )
        rows = x.shape[rank - 3]
        if positions is not None and (
            positions.dim() < 1 or positions.shape[-1] != rows or (packed and positions.dim() > 1)
        ):
            raise ValueError(
                f"seer::AttnGate: positions: expected {rows} in the last dimension, got "
                f"{list(positions.shape)}. Pass one position per row of {side}."
            )

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> Tensor:
        """Gate scores, fp32 ``[batch, heads_q, blocks_q, blocks_kv]``, -inf where not visible.

        Arguments and errors as in `embed`. Differentiable in the weights, q and k, in reverse
        mode only; this is what `seer_cuda.distill.gate_loss` takes.
        """
        return gate_scores(*self.embed(q, k, positions))

    def select(
        self,
        q: Tensor,
        k: Tensor | GateKeyCache,
        method: Method = "threshold",
        value: float = 5e-4,
        positions: Tensor | None = None,
        *,
        sink: int = 0,
        local: int = 0,
        dense_last_rows: int = 0,
        **lengths: Any,
    ) -> BlockMask:
        """The block mask for these q and k: `seer_cuda.gate_mask` with the rule spelled out.

        Arguments q, k, positions, cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv and errors
        as in `seer_cuda.gate_mask`, the others as in `seer_cuda.select.Rule`.
        """
        rule = Rule(method, value, sink, local, dense_last_rows)
        return gate_mask(q, k, self, rule, positions, **lengths)

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
        own = released_gate_state(state, layer, norms=self.config.qk_norm)
        shapes = self.config.weight_shapes()
        check_gate_state(own, shapes, layer, single_linear=self.config.single_linear)
        if any(weight.is_meta for weight in self.parameters()):
            # There is no memory to copy into. Copies, so that training leaves the checkpoint alone.
            dtype = self.mask_linear_k.weight.dtype
            own = {name: value.detach().to(dtype, copy=True) for name, value in own.items()}
            self.load_state_dict(own, assign=True)
            self._place_frequencies()
        else:
            self.load_state_dict(own)
        return self


__all__ = ["GATE_NAMES", "POOLS", "AttnGate", "GateConfig", "GateNorm", "HeadLinear"]
