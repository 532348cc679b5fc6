# SPDX-License-Identifier: Apache-2.0
"""SeerAttention's own Triton kernels: block-sparse attention, and attention with a pooled map.

Runs where the package `seer_attn` is installed or the environment variable
SEER_BENCH_SEERATTENTION names a checkout of it; only two files of its `seer_attn/kernels` are
loaded. Both kernels take as many K/V heads as query heads: they are repeated beforehand, untimed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bench.cases import ATTENTION, ATTN_POOL, Case
from bench.peers import compiler_missing
from bench.pool import PoolProblem
from bench.problem import Problem

NAME = "seer_triton"
OPS = (ATTENTION, ATTN_POOL)
# Share of an entry. It rounds scores to bf16: 2^-9 of up to 10 (of normal inputs, in units of log2)
# is 1.4 % behind exp2, the row's sum likewise; then it rounds the map itself.
ROUNDED_SCORES = 0.04


def _kernels() -> Path | None:
    checkout = os.environ.get("SEER_BENCH_SEERATTENTION")
    if checkout:
        return Path(checkout) / "seer_attn" / "kernels"
    package = importlib.util.find_spec("seer_attn")  # finds it without running it
    folders = package.submodule_search_locations if package else None
    return Path(next(iter(folders))) / "kernels" if folders else None


@cache
def _module(name: str) -> ModuleType:
    folder = _kernels()
    spec = importlib.util.spec_from_file_location(f"seer_attn_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def available() -> str:
    """Empty, or why the peer cannot run here."""
    if reason := compiler_missing():
        return reason
    folder = _kernels()
    if folder is None or not folder.is_dir():
        return "not installed (seer_attn, or a checkout named by SEER_BENCH_SEERATTENTION)"
    return ""


def supports(case: Case) -> bool:
    """Causal self-attention over whole blocks of 64; maps of block maxima."""
    whole = case.rows_q == case.rows_kv and case.rows_q % 64 == 0
    kind = case.mask != "dense" if case.op == ATTENTION else case.pools == "max"
    return whole and case.causal and case.block == (64, 64) and kind


def build(problem: Problem) -> Callable[[], object]:
    """Layout [batch, heads, rows, head_dim], contiguous, as both kernels want it."""
    case = problem.case
    group = case.heads_q // case.heads_kv
    repeated = (problem.q, *(x.repeat_interleave(group, dim=2) for x in (problem.k, problem.v)))
    q, k, v = (x.transpose(1, 2).contiguous() for x in repeated)
    scale = case.head_dim**-0.5
    if case.op == ATTENTION:
        mask = problem.head_mask().contiguous()
        sparse = _module("block_sparse_attn").block_sparse_triton_fn
        return lambda: sparse(q, k, v, mask, scale).transpose(1, 2)
    pool = _module("attn_pooling_kernel_2d").attn_with_pooling

    def launch() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out, pooled = pool(q, k, v, True, scale, case.block[0])
        return out.transpose(1, 2), pooled

    return launch


class NormalisedRows(PoolProblem):
    """The same problem, its map divided by the sum of each row, bf16 accuracy."""

    def exact_blocks(self, head: int, block: int) -> Tensor:
        """As of the problem, every row adding up to 1."""
        exact = super().exact_blocks(head, block)
        return exact / exact.sum(-1, keepdim=True)

    def check(self, answer: tuple[Tensor, Tensor], relative: float = ROUNDED_SCORES) -> None:
        """With the budget of rounded scores."""
        super().check(answer, relative)


def answers(problem: Problem) -> Problem:
    """It divides every row of its map by the row's sum."""
    if problem.case.op == ATTENTION:
        return problem
    return NormalisedRows(**vars(problem))
