# SPDX-License-Identifier: Apache-2.0
"""The gate's mathematics in plain torch under torch.compile: reductions over views, one product per
KV head for its whole group, fp32 softmax. What one would write who does not write kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Case
from bench.gate import GateProblem, Side
from bench.peers import compiler_missing

NAME = "gate_compile"
OPS = ("pool_gate", "gate_mask")


def available() -> str:
    """Empty, or why the peer cannot run here."""
    return compiler_missing()


def supports(case: Case) -> bool:
    """Whole blocks; the threshold rule."""
    whole = not (case.rows_q % case.block[0] or case.rows_kv % case.block[1])
    return whole and (
        case.op == "pool_gate" or (case.op == "gate_mask" and case.mask == "threshold")
    )


def embed(side: Side, block: int) -> Tensor:
    """[batch, blocks, heads, gate_dim] of the inputs' dtype; RoPE in fp32."""
    tokens = side.x.unflatten(1, (-1, block))
    pooled = {
        "max": lambda: tokens.amax(2),
        "min": lambda: tokens.amin(2),
        "avg": lambda: tokens.mean(2),
    }
    gate = torch.cat([pooled[kind]() for kind in side.kinds], dim=-1)
    if side.weight is not None:
        weight = side.weight.unflatten(0, (side.x.shape[2], -1))
        gate = torch.einsum("bnui,ugio->bnugo", gate, weight).flatten(2, 3)
    first, second = gate.float().chunk(2, dim=-1)
    cos, sin = side.cos[:, None], side.sin[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(gate.dtype)


def build(problem: GateProblem) -> Callable[[], Tensor]:
    """Compiled for the very shapes."""
    case = problem.case
    torch._dynamo.reset()
    if case.op == "pool_gate":
        compiled = torch.compile(embed, dynamic=False)
        return lambda: compiled(problem.side, case.block[0])
    causal = torch.ones(case.blocks_q, case.blocks_kv, device=problem.gate_q.device).tril().bool()
    scale, value = case.head_dim**-0.5, problem.value

    def mask(q_side: Side, k_side: Side) -> Tensor:
        q = embed(q_side, case.block[0]).transpose(1, 2)
        k = embed(k_side, case.block[1]).permute(0, 2, 3, 1)
        scores = ((q @ k).float() * scale).masked_fill(~causal, -torch.inf)
        return scores.softmax(-1) > value

    compiled = torch.compile(mask, dynamic=False)
    return lambda: compiled(problem.q_side, problem.k_side)
