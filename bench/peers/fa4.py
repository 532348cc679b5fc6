# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-4 (flash_attn.cute, compiled by CuTe-DSL): dense and block-sparse."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bench.cases import Case
from bench.peers import kept_lists
from bench.problem import Problem

NAME = "fa4"


def available() -> str:
    """Empty, or why the peer cannot run here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        import flash_attn.cute.block_sparsity
        import flash_attn.cute.interface  # noqa: F401
    except ImportError as error:
        return f"not installed ({error})"
    return ""


def supports(case: Case) -> bool:
    """Dense, or causal under a mask with square blocks of a square problem."""
    square = case.rows_q == case.rows_kv and case.block[0] == case.block[1]
    return case.mask == "dense" or (case.causal and square)


@functools.cache
def _causal() -> Callable:
    """The mask function; made once, because kernels are compiled per function object."""
    import cutlass.cute as cute

    @cute.jit
    def causal(batch, head, row, key, seqlen_info, aux_tensors):
        return key <= row

    return causal


def build(problem: Problem) -> Callable:
    """Diagonal blocks go through a causal mask function, the others are whole ("full" blocks)."""
    from flash_attn.cute.interface import _flash_attn_fwd as forward

    case, q, k, v = problem.case, problem.q, problem.k, problem.v
    if problem.mask is None:
        return lambda: forward(q, k, v, causal=case.causal)[0]

    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    mask = problem.head_mask()
    diagonal = torch.eye(case.blocks_q, dtype=torch.bool, device=mask.device)
    blocks = BlockSparseTensorsTorch(
        *kept_lists(mask & diagonal), *kept_lists(mask & ~diagonal), block_size=case.block
    )
    return lambda: forward(
        q, k, v, causal=False, mask_mod=_causal(), block_sparse_tensors=blocks, pack_gqa=False
    )[0]
