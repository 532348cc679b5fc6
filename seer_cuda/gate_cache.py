# SPDX-License-Identifier: Apache-2.0
"""`GateKeyCache`: gate embeddings of the keys so far, for chunked prefill.

A gate key is 1 / block of a key per head it is projected to, so a chunk pools its own keys once and
later chunks read embeddings only.

>>> cache = GateKeyCache(gate, batch=1, max_rows=131072, dtype=torch.bfloat16)
>>> for chunk in chunks:                       # each but the last a multiple of gate.config.block
...     cache.append(chunk.k)                  # before RoPE; k_rope and v go to the KV cache
...     out = sparse_prefill(chunk.q_rope, k_rope_so_far, v_so_far, chunk.q, cache, gate)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seer_cuda._contracts import ceil_div

if TYPE_CHECKING:
    from seer_cuda.gate import AttnGate


class GateKeyCache:
    """The gate keys of one layer for a batch of sequences that grow together.

    Args:
        gate: Embeds the keys.
        batch: Sequences.
        max_rows: Tokens there is room for.
        device: Default: the gate's.
        dtype: Of the keys to come. Default: the gate's.

    The memory is allocated once; `append` writes into it and reads nothing on the host, so a chunk
    may be captured in a CUDA graph together with the call that uses it. Such a graph belongs to
    this chunk's place in the sequence.

    Raises:
        ValueError: batch or max_rows is negative.
    """

    def __init__(
        self,
        gate: AttnGate,
        batch: int,
        max_rows: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("batch", batch), ("max_rows", max_rows)):
            if size < 0:
                raise ValueError(
                    f"seer::GateKeyCache: {name}: expected at least 0, got {size}. Pass the sizes "
                    "of the whole prompt."
                )
        config, weight = gate.config, gate.mask_linear_k.weight
        shape = (batch, ceil_div(max_rows, config.block), config.heads_k, config.gate_dim)
        self._gate = gate
        with torch.inference_mode(False):  # `append` may come outside of inference mode too
            self._room = torch.empty(
                shape,
                device=weight.device if device is None else device,
                dtype=weight.dtype if dtype is None else dtype,
            )
        self._max_rows = max_rows
        self._rows = 0

    @property
    def gate(self) -> AttnGate:
        """What embedded the keys."""
        return self._gate

    @property
    def rows(self) -> int:
        """Tokens whose keys are in the cache."""
        return self._rows

    @property
    def keys(self) -> Tensor:
        """``[batch, blocks, heads_k, gate_dim]``, a view: the gate keys so far."""
        return self._room[:, : ceil_div(self._rows, self._gate.config.block)]

    def append(self, k: Tensor, positions: Tensor | None = None) -> GateKeyCache:
        """Embeds the keys of the next tokens.

        Args:
            k: ``[batch, rows, heads_kv, head_dim]``, before RoPE, of the cache's dtype.
            positions: Token positions of these rows, ``[rows]`` or ``[batch|1, rows]``. Default:
                they continue those that are there.

        Returns:
            The cache.

        Raises:
            ValueError: k or positions of another shape or dtype, no room left, or the last block
                is not full: then call `truncate` and append its keys again with the new ones.
        """
        batch, block, first = self._room.shape[0], self._gate.config.block, self._rows
        if k.dim() != 4 or k.shape[0] != batch or k.dtype != self._room.dtype:
            raise ValueError(
                f"seer::GateKeyCache: k: expected {self._room.dtype} [{batch}, rows, heads_kv, "
                f"head_dim], got {k.dtype} {list(k.shape)}. Pass keys before RoPE, or set dtype= "
                "where the cache is made."
            )
        end = first + k.shape[1]
        if end > self._max_rows:
            raise ValueError(
                f"seer::GateKeyCache: k: expected at most {self._max_rows - first} more rows, got "
                f"{k.shape[1]}. Make the cache for a larger max_rows."
            )
        if first % block:
            raise ValueError(
                f"seer::GateKeyCache: rows: expected a multiple of block = {block} before more "
                f"keys, got {first}. Truncate to {first // block * block} and append the keys from "
                "there on."
            )
        with torch.no_grad():
            embedded = self._gate.embed_k(k, positions, first=first)
            self._room[:, first // block : ceil_div(end, block)].copy_(embedded)
        self._rows = end
        return self

    def reserve(self, max_rows: int) -> GateKeyCache:
        """Makes room for at least `max_rows` tokens in all, for prompts whose length is not known.

        The room grows twofold or more, so that growing with a prompt copies each key once or twice.
        It moves then: a CUDA graph captured before goes on with the old one.
        """
        if max_rows > self._max_rows:
            most = max(max_rows, 2 * self._max_rows)
            block, (batch, _, *width) = self._gate.config.block, self._room.shape
            old = self.keys
            with torch.inference_mode(False):  # as where it was made
                room = old.new_empty(batch, ceil_div(most, block), *width)
            room[:, : old.shape[1]].copy_(old)
            # Where there is no memory for it, the cache is as before.
            self._room, self._max_rows = room, most
        return self

    def truncate(self, rows: int) -> GateKeyCache:
        """Forgets all tokens from `rows` on, a multiple of the block.

        Raises:
            ValueError: rows is no multiple of the block, or more than there are.
        """
        block = self._gate.config.block
        if rows % block or not 0 <= rows <= self._rows:
            raise ValueError(
                f"seer::GateKeyCache: rows: expected a multiple of block = {block} from 0 to "
                f"{self._rows}, got {rows}. A block is pooled as a whole: cut at its start."
            )
        self._rows = rows
        return self


__all__ = ["GateKeyCache"]
