# SPDX-License-Identifier: Apache-2.0
"""Rules that let a row keep what it needs, for scores of any origin, at a mean density.

A method's scores become shares of a row that sum to 1 over its visible blocks (`shares`). A rule
ranks blocks by them (`strengths`) and keeps those at or above one number, the same for all rows,
heads and layers, and the diagonal. `Tally` finds the number that keeps a wanted share of all
visible blocks, from one dense pass of the model over windows of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_cuda.block_mask import BlockMask

#: threshold: a block's share; topp: what a row would miss without it and all weaker ones.
RULES = ("threshold", "topp")
_OCTAVES, _PER_OCTAVE = 64, 256  # of a tally's bins: 0.3 % apart, down to 2^-64
_NONE = 2.0  # above every strength: diagonals alone


def shares(scores: Tensor, logits: bool) -> Tensor:
    """Scores as shares of their row, hidden blocks 0.

    Args:
        scores: ``[batch|1, heads, blocks, blocks]``.
        logits: A softmax makes shares of them; else they are masses, not negative, and are divided
            by their sum.

    Returns:
        fp32, of the scores' shape.
    """
    hidden = ~torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    values = scores.float()
    if logits:
        return values.masked_fill(hidden, -torch.inf).softmax(-1)
    values = values.masked_fill(hidden, 0.0)
    return values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def strengths(rule: str, own: Tensor) -> Tensor:
    """What the rule compares with its number: more is kept first.

    The block of a row's largest share has the strength 1 under topp, so top-p with mass p is
    "strength above 1 - p": sums from the smallest share up keep their digits near p = 1.

    Args:
        rule: One of `RULES`.
        own: `shares`.
    """
    if rule == "threshold":
        return own
    values, order = own.sort(-1)
    return torch.empty_like(own).scatter_(-1, order, values.cumsum(-1).clamp_max(1.0))


def keep(own: Tensor, value: float, rows: int, block: int) -> BlockMask:
    """The diagonal and all visible blocks whose strength is at least `value`.

    Args:
        own: `strengths`, ``[batch|1, heads, blocks, blocks]``.
        value: The rule's number.
        rows, block: Tokens of the prompt and of a block.
    """
    diagonal = torch.eye(own.shape[-1], dtype=torch.bool, device=own.device)
    return BlockMask.from_dense(((own >= value) | diagonal).tril(), block, block, rows, rows, True)


class Tally:
    """Counts of strengths, from which the number for any mean density can be read."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.diagonals = self.visible = 0

    def add(self, own: Tensor) -> None:
        """Counts the `strengths` of one layer of one window."""
        maps, blocks = own.shape[:-2].numel(), own.shape[-1]
        below = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).tril(-1)
        values = own[..., below].flatten()
        at = ((values.log2() + _OCTAVES) * _PER_OCTAVE).floor().clamp(0, _OCTAVES * _PER_OCTAVE)
        counts = at.long().bincount(minlength=_OCTAVES * _PER_OCTAVE + 1)
        self.counts = counts if self.counts is None else self.counts + counts
        self.diagonals += maps * blocks
        self.visible += maps * blocks * (blocks + 1) // 2

    def value(self, density: float) -> float:
        """The number that keeps at most `density` of all visible blocks, diagonals among them.

        Every visible block of every head, layer and window counts once, so long rows weigh more
        than short ones, as in the time of attention. Where equal strengths leave a choice, fewer
        are kept.

        Raises:
            ValueError: nothing was counted.
        """
        if self.counts is None:
            raise ValueError("seer::eval: calibration: expected windows, got none. Give one.")
        kept = self.counts.flip(0).cumsum(0).flip(0) + self.diagonals
        fits = (kept <= density * self.visible).cpu()
        # Bin 0 also has all that lies below it, zeros above all: it is kept by keeping everything.
        if bool(fits[0]):
            return 0.0
        first = int(fits.long().argmax())
        return 2.0 ** (first / _PER_OCTAVE - _OCTAVES) if bool(fits[first]) else _NONE
