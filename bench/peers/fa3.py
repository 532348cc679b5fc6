# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-3. Dense only; runs where `flash_attn_interface` is installed or the environment
variable SEER_BENCH_FA3 names its operator library (`flash_attn_3/_C*.so`)."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from bench.cases import ATTENTION, ATTN_POOL, Case
from bench.problem import Problem

NAME = "fa3"
OPS = (ATTENTION, ATTN_POOL, "sparse_prefill")


def available() -> str:
    """Empty, or why the peer cannot run here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    library = os.environ.get("SEER_BENCH_FA3")
    try:
        if library:
            torch.ops.load_library(library)
        else:
            import flash_attn_interface  # noqa: F401  (registers torch.ops.flash_attn_3)
    except (ImportError, OSError) as error:
        return f"not installed ({error})"
    return ""


def supports(case: Case) -> bool:
    """Dense attention, causal or not; also beside attn_pool, without the map, and as what a gate's
    whole pipeline replaces."""
    return case.mask == "dense" or case.op == "sparse_prefill"


def build(problem: Problem) -> Callable:
    """Calls the operator itself, one split (its own choice for problems that fill the GPU)."""
    op = torch.ops.flash_attn_3.fwd.default
    case = problem.case
    options = {"softmax_scale": case.head_dim**-0.5, "is_causal": case.causal, "num_splits": 1}
    return lambda: op(problem.q, problem.k, problem.v, **options)[0]
