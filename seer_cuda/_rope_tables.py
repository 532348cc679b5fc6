# SPDX-License-Identifier: Apache-2.0
"""RoPE tables of the default positions, kept from call to call (`AttnGate`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SHORTEST = 64  # blocks; tables grow in powers of two from here


class _Kept(NamedTuple):
    cos: Tensor
    sin: Tensor
    stream: torch.cuda.Stream | None  # what made them, and where it was done; None off CUDA
    made: torch.cuda.Event | None

    def order(self) -> None:
        """Lets the current stream read the tables, without a wait of the host."""
        if self.made is None:
            return
        stream = torch.cuda.current_stream(self.cos.device)
        # A capture refuses events from outside of it. Instead, whoever captures makes sure that
        # earlier calls are done, as torch.cuda.graph does.
        if stream != self.stream and not _capturing(self.cos.device):
            stream.wait_event(self.made)


class KeptTables:
    """cos and sin at tokens 0, block, 2 block, ..., made by eight launches once per length.

    Shorter tables are never dropped: a captured CUDA graph may read them. Frequencies that change
    would pile them up, so tables are kept for the first frequencies only.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._frequencies: tuple[Tensor, int] | None = None  # and their version

    def __reduce__(self) -> tuple[Any, ...]:
        # The copy of a gate makes its own: streams and events cannot be copied.
        return KeptTables, ()

    def get(
        self,
        inv_freq: Tensor,
        blocks: tuple[int, int],
        block: int,
        make: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Tables of blocks[0] to blocks[1]; make(positions) makes them from inv_freq."""
        begin, end = blocks
        # Kept tables would also tie compiled code to one length.
        if torch.compiler.is_compiling() or not self._unchanged(inv_freq):
            return make(torch.arange(begin, end, device=inv_freq.device) * block)
        for kept in self._kept:
            if kept.cos.shape[0] >= end:
                kept.order()
                return kept.cos[begin:end], kept.sin[begin:end]
        length = max(_SHORTEST, 1 << (end - 1).bit_length())
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = make(torch.arange(length, device=inv_freq.device) * block)
        self._keep(inv_freq, cos, sin)
        return cos[begin:end], sin[begin:end]

    def _unchanged(self, inv_freq: Tensor) -> bool:
        if inv_freq.is_inference():  # has no version
            return False
        if self._frequencies is None:
            return True
        known, version = self._frequencies
        return known is inv_freq and version == inv_freq._version

    def _keep(self, inv_freq: Tensor, cos: Tensor, sin: Tensor) -> None:
        # A fake tensor never holds values; what is made during a capture, not before the replay.
        if type(cos) is not Tensor or (cos.is_cuda and _capturing(cos.device)):
            return
        stream = made = None
        if cos.is_cuda:
            stream = torch.cuda.current_stream(cos.device)
            made = stream.record_event()
        self._frequencies = (inv_freq, inv_freq._version)
        self._kept.append(_Kept(cos, sin, stream, made))


def _capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
