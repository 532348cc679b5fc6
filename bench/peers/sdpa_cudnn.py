# SPDX-License-Identifier: Apache-2.0
"""cuDNN's attention, as torch's scaled_dot_product_attention carries it. Dense only."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn.attention import SDPBackend

from bench.peers.sdpa_flash import available, supports
from bench.peers.sdpa_flash import build as build_sdpa
from bench.problem import Problem

__all__ = ["NAME", "available", "build", "supports"]

NAME = "sdpa_cudnn"


def build(problem: Problem) -> Callable:
    """SDPA restricted to the cuDNN backend."""
    return build_sdpa(problem, SDPBackend.CUDNN_ATTENTION)
