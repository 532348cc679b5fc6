# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-3. Dense only; runs where `flash_attn_interface` is installed or the environment
variable SEER_BENCH_FA3 names its operator library (`flash_attn_3/_C*.so`)."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from bench.cases import Case
from bench.problem import Problem

NAME = "fa3"


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
    """Dense attention, causal or not."""
    return case.mask == "dense"


def build(problem: Problem) -> Callable:
    """Calls the operator itself; whatever its version wants beyond q, k, v is left out (None)."""
    op = torch.ops.flash_attn_3.fwd.default
    arguments = {a.name: None for a in op._schema.arguments if not a.has_default_value()}
    arguments |= {"q": problem.q, "k": problem.k, "v": problem.v}
    arguments |= {"softmax_scale": problem.case.head_dim**-0.5, "is_causal": problem.case.causal}
    return lambda: op(**arguments)[0]
