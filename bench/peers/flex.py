# SPDX-License-Identifier: Apache-2.0
"""FlexAttention (torch), compiled, with a block mask. Token-exact causal on the diagonal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.cases import Case
from bench.peers import compiler_missing, kept_lists
from bench.problem import Problem

NAME = "flex"

# One compiled function per shape: a new one drops the old, so that no limit on recompilations is
# ever met however many cases there are.
_compiled: dict[tuple, Callable] = {}


def available() -> str:
    """Empty, or why the peer cannot run here."""
    return compiler_missing()


def supports(case: Case) -> bool:
    """Square causal problems under a block mask with square blocks."""
    square = case.rows_q == case.rows_kv and case.block[0] == case.block[1]
    return case.mask != "dense" and case.causal and square


def _causal(batch: object, head: object, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return row >= key


def _compile(case: Case) -> Callable:
    key = (case.batch, case.heads_q, case.heads_kv, case.rows_q, case.rows_kv, case.block)
    if key not in _compiled:
        torch._dynamo.reset()
        _compiled.clear()
        _compiled[key] = torch.compile(flex_attention, dynamic=False)
    return _compiled[key]


def build(problem: Problem) -> Callable:
    """Diagonal blocks go through the mask function, the others are whole ("full" blocks)."""
    case = problem.case
    mask = problem.head_mask()
    diagonal = torch.eye(case.blocks_q, dtype=torch.bool, device=mask.device)
    block_mask = BlockMask.from_kv_blocks(
        *kept_lists(mask & diagonal),
        *kept_lists(mask & ~diagonal),
        BLOCK_SIZE=case.block,
        mask_mod=_causal,
        seq_lengths=(case.rows_q, case.rows_kv),
        compute_q_blocks=False,
    )
    # Its default tile of 128 rows cannot serve 64-row blocks.
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if case.block[0] == 64 else None
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    attend = _compile(case)

    def launch() -> torch.Tensor:
        out = attend(q, k, v, block_mask=block_mask, enable_gqa=True, kernel_options=options)
        return out.transpose(1, 2)

    return launch
