# SPDX-License-Identifier: Apache-2.0
"""Which blocks to keep: rules on score maps, and masks that need no scores.

`seer_cuda.gate_select` applies the same rules straight from gate embeddings. The functions here
take any score map that fits in memory (the oracle: pooled attention probabilities), or none
(attention sink + local window, random), and all return a `BlockMask` on the scores' device without
a host synchronisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seer_cuda import _gate_math
from seer_cuda._contracts import ceil_div, check_block, check_forced, check_rows, rows_of_blocks
from seer_cuda.block_mask import BlockMask

#: Names of the selection rules and their numbers in ``torch.ops.seer.gate_select``.
METHODS: dict[str, int] = {
    "threshold": _gate_math.THRESHOLD,
    "topk": _gate_math.TOP_K,
    "density": _gate_math.DENSITY,
    "topp": _gate_math.TOP_P,
}


Method = Literal["threshold", "topk", "density", "topp"]


def resolve_method(op: str, method: str, value: float) -> tuple[int, float]:
    """The number of a rule and its value, checked.

    Args:
        op: Name of the caller, for the error text.
        method: One of `METHODS`.
        value: threshold: softmax probability >= 0; topk: blocks per row, a whole number >= 1;
            density: kept share of the causal triangle in (0, 1]; topp: softmax mass in (0, 1].

    Raises:
        ValueError: unknown method, or a value outside its range.
        TypeError: value is not a number.
    """
    if method not in METHODS:
        raise ValueError(
            f"seer::{op}: method: expected one of {', '.join(METHODS)}, got {method!r}. Choose one."
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"seer::{op}: value: expected a number, got {type(value).__name__}. "
            "Pass a Python float."
        )
    contract = {
        "threshold": ("a probability of at least 0", 0 <= value < math.inf),
        "topk": ("a whole number of blocks, at least 1", value >= 1 and value % 1 == 0),
        "density": ("a density in (0, 1]", 0 < value <= 1),
        "topp": ("a softmax mass in (0, 1]", 0 < value <= 1),
    }
    expected, fits = contract[method]
    if not fits:
        raise ValueError(
            f"seer::{op}: value: expected {expected} for method {method!r}, got {value}. "
            "See seer_cuda.gate_select for the methods and their values."
        )
    return METHODS[method], float(value)


@dataclass(frozen=True)
class Rule:
    """Which blocks a row of the gate's scores keeps; `seer_cuda.gate_select` has the definitions.

    Attributes:
        method: ``"threshold"``, ``"topk"``, ``"density"`` or ``"topp"``.
        value: The method's parameter.
        sink: First blocks that every row keeps besides, where visible.
        local: Last visible blocks that every row keeps besides; 1 is the diagonal.
        dense_last_rows: Last query-block rows that keep every visible block.

    Raises:
        ValueError: unknown method, a value out of its range, or a negative count.
        TypeError: value is not a number.
    """

    method: Method = "threshold"
    value: float = 5e-4
    sink: int = 0
    local: int = 0
    dense_last_rows: int = 0

    def __post_init__(self) -> None:
        resolve_method("Rule", self.method, self.value)
        check_forced("Rule", self.sink, self.local, self.dense_last_rows)


def check_rule(op: str, name: str, rule: object) -> None:
    """TypeError unless this is a `Rule`."""
    if not isinstance(rule, Rule):
        raise TypeError(
            f"seer::{op}: {name}: expected a seer_cuda.Rule, got {rule!r}. Pass e.g. "
            'Rule("topk", 16, local=1).'
        )


def density_to_k(density: float, blocks_kv: int) -> int:
    """Blocks per row whose causal top-k mask keeps about `density` of the visible blocks.

    ``k = max(1, floor((1 - sqrt(1 - density)) * blocks_kv))``: with the same k for every row, the
    lower triangle of n x n blocks keeps ``k n - k (k - 1) / 2`` of its ``n (n + 1) / 2`` blocks
    (SeerAttention's `nz_ratio`).
    """
    resolve_method("density_to_k", "density", density)
    return _gate_math.blocks_of_density(density, blocks_kv)


def from_scores(
    scores: Tensor,
    method: str,
    value: float,
    *,
    causal: bool = True,
    probabilities: bool = False,
    sink: int = 0,
    local: int = 0,
    dense_last_rows: int = 0,
    block_q: int = 64,
    block_kv: int = 64,
    rows_q: int | None = None,
    rows_kv: int | None = None,
) -> BlockMask:
    """The mask that a selection rule makes of a score map.

    Args:
        scores: float ``[batch|1, heads, blocks_q, blocks_kv]``; below fp32 they are cast to fp32.
            NaN is never selected.
        method, value: The rule; see `seer_cuda.gate_select`.
        causal: Block j is a candidate of row i iff it holds a key that a query of block i sees
            (`BlockMask.causal_visible`), for any lengths and block sizes.
        probabilities: False: scores are logits and go through a softmax over the candidates.
            True: they are used as they are, e.g. `attn_pool`'s map for the oracle selection; topp
            then wants rows that sum to 1 (`seer_cuda.distill.target_prefill`).
        sink: First blocks of a row that are always kept (where visible).
        local: Last visible blocks of a row that are always kept; 1 is the diagonal.
        dense_last_rows: Last query-block rows that keep every visible block.
        block_q, block_kv: Tokens per block.
        rows_q, rows_kv: Tokens; default: whole blocks.

    Raises:
        ValueError: unknown method, value out of range, scores not 4-D, rows that do not fit the
            blocks, a block size below 1, negative sink, local or dense_last_rows.
        TypeError: value is not a number, or scores are not floating point.
    """
    number, value = resolve_method("from_scores", method, value)
    if scores.dim() != 4:
        raise ValueError(
            "seer::from_scores: scores: expected [batch, heads, blocks_q, blocks_kv], got "
            f"{list(scores.shape)}. Add the missing dimensions."
        )
    if not scores.is_floating_point():
        raise TypeError(
            f"seer::from_scores: scores: expected floating point, got {scores.dtype}. "
            "Convert them to float32."
        )
    check_forced("from_scores", sink, local, dense_last_rows)
    check_block("from_scores", "block_q", block_q)
    check_block("from_scores", "block_kv", block_kv)
    rows_q = rows_of_blocks("from_scores", "rows_q", rows_q, block_q, scores.shape[2])
    rows_kv = rows_of_blocks("from_scores", "rows_kv", rows_kv, block_kv, scores.shape[3])
    empty = _no_blocks("from_scores", rows_q, rows_kv, block_q, block_kv, causal, scores.device)
    visible = empty.causal_visible()
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    kept = _gate_math.select_scores(scores, visible, number, value, probabilities)
    kept = kept | _gate_math.forced_blocks(visible, empty.blocks_q, sink, local, dense_last_rows)
    return BlockMask.from_dense(kept, block_q, block_kv, rows_q, rows_kv, causal)


def _no_blocks(
    op: str, rows_q: int, rows_kv: int, block_q: int, block_kv: int, causal: bool, device: object
) -> BlockMask:
    check_block(op, "block_q", block_q)
    check_block(op, "block_kv", block_kv)
    check_rows(op, "rows_q", rows_q)
    check_rows(op, "rows_kv", rows_kv)
    words = ceil_div(ceil_div(rows_kv, block_kv), 32)
    bits = torch.zeros((1, 1, ceil_div(rows_q, block_q), words), dtype=torch.int32, device=device)
    return BlockMask(bits, block_q, block_kv, rows_q, rows_kv, causal)


def sink_local(
    rows_q: int,
    rows_kv: int,
    *,
    sink: int = 1,
    local: int = 1,
    dense_last_rows: int = 0,
    block_q: int = 64,
    block_kv: int = 64,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Attention sink + local window (StreamingLLM, Xiao et al. 2023): ``[1, 1, ...]``, any model.

    Args:
        rows_q, rows_kv: Tokens.
        sink: First blocks that every row keeps, where visible.
        local: Last visible blocks that every row keeps; 1 is the diagonal.
        dense_last_rows: Last query-block rows that keep every visible block.
        block_q, block_kv, causal: As in `BlockMask`.
        device: Where the mask is made.

    Raises:
        ValueError: negative rows, sink, local or dense_last_rows, or a block size below 1.
    """
    check_forced("sink_local", sink, local, dense_last_rows)
    empty = _no_blocks("sink_local", rows_q, rows_kv, block_q, block_kv, causal, device)
    kept = _gate_math.forced_blocks(
        empty.causal_visible(), empty.blocks_q, sink, local, dense_last_rows
    )
    return BlockMask.from_dense(kept[None, None], block_q, block_kv, rows_q, rows_kv, causal)


def random_blocks(
    rows_q: int,
    rows_kv: int,
    density: float,
    *,
    batch: int = 1,
    heads: int = 1,
    local: int = 1,
    block_q: int = 64,
    block_kv: int = 64,
    causal: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> BlockMask:
    """A random baseline: every row keeps ``round(density * visible)`` of its visible blocks.

    Args:
        rows_q, rows_kv: Tokens.
        density: Kept share of each row's visible blocks, in [0, 1].
        batch, heads: Shape of the mask.
        local: Last visible blocks that every row keeps, counted in the density (rows keep at
            least these); 1 is the diagonal.
        block_q, block_kv, causal: As in `BlockMask`.
        generator: Source of randomness, on `device`.
        device: Where the mask is made.

    Raises:
        ValueError: density outside [0, 1], negative rows or local, or a block size below 1.
    """
    if not 0 <= density <= 1:
        raise ValueError(
            f"seer::random_blocks: density: expected a share in [0, 1], got {density}. Choose one."
        )
    check_forced("random_blocks", 0, local, 0)
    empty = _no_blocks("random_blocks", rows_q, rows_kv, block_q, block_kv, causal, device)
    visible = empty.causal_visible()
    shape = (batch, heads, *visible.shape)
    forced = _gate_math.forced_blocks(
        visible, empty.blocks_q, sink=0, local=local, dense_last_rows=0
    )
    draw = torch.rand(shape, generator=generator, device=empty.device)
    # Forced blocks rank before, hidden ones after every other.
    draw = draw.masked_fill(forced, -1.0).masked_fill(~visible, 2.0)
    rank = draw.argsort(dim=-1, stable=True).argsort(dim=-1)
    count = (visible.sum(-1, keepdim=True) * density).round()
    kept = ((rank < count) | forced) & visible
    return BlockMask.from_dense(kept, block_q, block_kv, rows_q, rows_kv, causal)
