# SPDX-License-Identifier: Apache-2.0
"""The gate in eager torch with the steps of SeerAttention's published code: pooling windows over
whole tensors, keys repeated for every query head, bf16 scores of the full square, softmax, compare.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bench.cases import Case
from bench.gate import GateProblem, Side

NAME = "gate_eager"
OPS = ("pool_gate", "gate_mask")


def available() -> str:
    """Empty, or why the peer cannot run here."""
    return "" if torch.cuda.is_available() else "no CUDA device"


def supports(case: Case) -> bool:
    """The threshold rule, as inference uses it."""
    return case.op == "pool_gate" or (case.op == "gate_mask" and case.mask == "threshold")


def _pool(x: Tensor, block: int, kinds: tuple[str, ...]) -> Tensor:
    """x [batch, rows, heads, head_dim]: a 3-d pooling window of `block` rows."""
    window = {"kernel_size": (block, 1, 1), "stride": (block, 1, 1), "ceil_mode": True}
    pooled = {
        "max": lambda: functional.max_pool3d(x, **window),
        "min": lambda: -functional.max_pool3d(-x, **window),
        "avg": lambda: functional.avg_pool3d(x, **window),
    }
    return torch.cat([pooled[kind]() for kind in kinds], dim=-1)


def _rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = y.chunk(2, dim=-1)
    return y * cos + torch.cat([-second, first], dim=-1) * sin


def embed(side: Side, block: int) -> Tensor:
    """[batch, blocks, heads, gate_dim] of the inputs' dtype."""
    pooled = _pool(side.x, block, side.kinds)
    if side.weight is not None:
        pooled = pooled.repeat_interleave(side.weight.shape[0] // side.x.shape[2], dim=2)
        pooled = torch.einsum("bnhi,hio->bnho", pooled, side.weight)
    cos, sin = (
        torch.cat([table, table], -1).to(pooled.dtype)[:, None] for table in (side.cos, side.sin)
    )
    return _rotate(pooled, cos, sin)


def build(problem: GateProblem) -> Callable[[], Tensor]:
    """Tables, weights and the triangle are made beforehand."""
    case = problem.case
    if case.op == "pool_gate":
        return lambda: embed(problem.side, case.block[0])
    causal = torch.ones(case.blocks_q, case.blocks_kv, device=problem.gate_q.device).tril().bool()
    lowest = torch.finfo(problem.gate_q.dtype).min
    hidden = torch.zeros_like(causal, dtype=problem.gate_q.dtype).masked_fill(~causal, lowest)

    def launch() -> Tensor:
        q = embed(problem.q_side, case.block[0]).transpose(1, 2)
        k = embed(problem.k_side, case.block[1]).transpose(1, 2)
        scores = q @ k.transpose(-1, -2) * case.head_dim**-0.5 + hidden
        kept = scores.softmax(-1, dtype=torch.float32).to(q.dtype) > problem.value
        return kept & causal

    return launch
