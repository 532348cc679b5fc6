# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-2, as torch's scaled_dot_product_attention carries it. Dense only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import ATTENTION, Case
from bench.problem import Problem

NAME = "sdpa_flash"
OPS = (ATTENTION, "sparse_prefill")


def available() -> str:
    """Empty, or why the peer cannot run here."""
    return "" if torch.cuda.is_available() else "no CUDA device"


def supports(case: Case) -> bool:
    """Dense attention, also as what a gate's whole pipeline replaces; torch aligns its causal
    diagonal at the top left."""
    dense = case.mask == "dense" or case.op == "sparse_prefill"
    return dense and (not case.causal or case.rows_q == case.rows_kv)


def build(problem: Problem, backend: SDPBackend = SDPBackend.FLASH_ATTENTION) -> Callable:
    """SDPA restricted to one backend; it raises where the backend refuses."""
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    causal = problem.case.causal

    def launch() -> torch.Tensor:
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=True
            )
        return out.transpose(1, 2)

    return launch
