# SPDX-License-Identifier: Apache-2.0
"""cuDNN frontend's block-sparse attention.

It knows no causal mode: of a causal case it computes the kept blocks, the diagonal ones whole.
That is what it is judged by; its time is compared as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from bench.cases import Case
from bench.peers import kept_lists
from bench.problem import Problem

NAME = "cudnn_frontend"


def available() -> str:
    """Empty, or why the peer cannot run here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        import cudnn.block_sparse_attention.api  # noqa: F401
    except ImportError as error:
        return f"not installed ({error})"
    return ""


def supports(case: Case) -> bool:
    """Masked, square blocks."""
    return case.mask != "dense" and case.block[0] == case.block[1]


def answers(problem: Problem) -> Problem:
    """The problem that it really solves: the same blocks without the causal cut."""
    return dataclasses.replace(problem, case=dataclasses.replace(problem.case, causal=False))


def build(problem: Problem) -> Callable:
    """Index lists cut to the longest row, [batch, heads_q, blocks_q, longest]."""
    from cudnn.block_sparse_attention.api import block_sparse_attention_forward as forward

    counts, indices = kept_lists(problem.head_mask())
    indices = indices[..., : int(counts.max())].contiguous()
    block = problem.case.block[0]

    def launch() -> torch.Tensor:
        return forward(
            problem.q,
            problem.k,
            problem.v,
            indices,
            q2k_block_nums=counts,
            sparse_block_size=block,
            layout="bshd",
        )["o_tensor"]

    return launch
