# SPDX-License-Identifier: Apache-2.0
"""Where the sequences of a batch lie: padding on either side, packed sequences, chunks.

The gate pools blocks that are counted from a sequence's own first token, and attention has no mask
of tokens, so every sequence is computed by itself: what stands beside it cannot reach it. Reading
the padding waits for the device once per call of the model, not per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A sequence's tokens in one call.

    Attributes:
        row: Row of the batch; None: the same place in all rows, which are computed together.
        begin, end: Its queries, rows of this call.
        start: Where it starts in the keys, cached ones first.
    """

    row: int | None
    begin: int
    end: int
    start: int

    @property
    def rows(self) -> slice:
        """Its rows of the batch."""
        return slice(None) if self.row is None else slice(self.row, self.row + 1)


@dataclass(frozen=True)
class Plan:
    """All sequences of a call: rows new tokens after past cached ones."""

    past: int
    rows: int
    spans: tuple[Span, ...]
    packed: bool = False

    @property
    def whole(self) -> bool:
        """Whether every token of the batch belongs to one span."""
        return len(self.spans) == 1 and (
            (self.spans[0].row, self.spans[0].begin, self.spans[0].end) == (None, 0, self.rows)
        )


def make_plan(
    batch: int,
    rows: int,
    past: int,
    mask: Tensor | None,
    positions: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> Plan:
    """The sequences of one call.

    Args:
        batch, rows, past: Sequences, new tokens and cached tokens, padding included.
        mask: ``[batch, past + rows]`` or longer, True (or not 0) at tokens; None: no padding.
        positions: ``[batch|1, rows]`` token positions. Without past and mask, a step other than 1
            starts another packed sequence.
        cu_seqlens: Starts of packed sequences (batch 1), in place of positions.

    Raises:
        ValueError: a mask of another shape, or with a hole between tokens.
    """
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < past + rows:
            raise ValueError(
                f"seer::attach: attention_mask: expected [{batch}, {past + rows}], one entry per "
                f"cached and new token, got {list(mask.shape)}. Pass the padding mask, or use the "
                "dense mode for masks of your own."
            )
        bounds = _bounds(mask[:, : past + rows])
        if any(bound != (0, past + rows) for bound in bounds):
            return Plan(past, rows, _padded(bounds, past, rows))
        # As in transformers: beside a mask, positions that jump are one sequence's.
        positions = None
    if past == 0 and batch:
        spans = _packed(batch, rows, positions, cu_seqlens)
        return Plan(past, rows, spans, packed=any(span.end - span.begin != rows for span in spans))
    return Plan(past, rows, (Span(None, 0, rows, 0),))


def _bounds(mask: Tensor) -> list[tuple[int, int]]:
    """First token and end of every row; (0, 0) where there is none."""
    kept = (mask != 0).int()
    width = kept.shape[1]
    columns = kept.argmax(1), kept.sum(1), width - kept.flip(1).argmax(1)
    bounds = []
    for row, (begin, tokens, end) in enumerate(torch.stack(columns, 1).tolist()):
        if tokens and end - begin != tokens:
            raise ValueError(
                f"seer::attach: attention_mask: expected padding at the ends only, got {tokens} "
                f"tokens between {begin} and {end} in row {row}. Pad on one side, the left one to "
                "generate."
            )
        bounds.append((begin, end) if tokens else (0, 0))
    return bounds


def _padded(bounds: list[tuple[int, int]], past: int, rows: int) -> tuple[Span, ...]:
    together = len(set(bounds)) == 1
    spans = []
    for row, (start, end) in enumerate(bounds[:1] if together else bounds):
        begin = max(start - past, 0)
        if begin < end - past:
            spans.append(Span(None if together else row, begin, end - past, start))
    return tuple(spans)


def _packed(
    batch: int, rows: int, positions: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Span, ...]:
    starts: list[set[int]] = [{0}]
    if cu_seqlens is not None:
        starts[0].update(cut for cut in cu_seqlens.tolist() if 0 < cut < rows)
    elif positions is not None:
        starts = [{0} for _ in range(positions.shape[0])]
        for row, before in (positions.diff() != 1).nonzero().tolist():
            starts[row].add(before + 1)
    if all(own == starts[0] for own in starts):
        starts = starts[:1]
    together = len(starts) == 1
    spans = []
    for row, own in enumerate(starts):
        cuts = [*sorted(own), rows]
        for begin, end in pairwise(cuts):
            spans.append(Span(None if together else row, begin, end, begin))
    return tuple(spans)
