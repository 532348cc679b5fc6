# SPDX-License-Identifier: Apache-2.0
"""What a user would run instead. One small module per peer, all of one form:

- NAME: the key in the record's `peers`;
- OPS, optional -> the operators whose cases it takes part in, default block_sparse_attn;
- available() -> "" or the reason why it cannot run here;
- supports(case) -> whether it can do this case's work;
- build(problem) -> a function without arguments that computes and returns
  out [batch, rows_q, heads_q, head_dim] (a view of another layout is fine), in cases of the gate
  what bench.gate.GateProblem.check takes, in those of attn_pool (out, map) or out alone;
- answers(problem), optional -> the problem it is judged by, where it solves a variation of it.

Nothing but the launch itself belongs into the returned function: index lists and the like are
made in build().
"""

from __future__ import annotations

from fnmatch import fnmatch
from types import ModuleType

import torch

from bench.cases import ATTENTION, Case

# Cases by name to which a peer is limited; others are timed wherever they can. It keeps the record
# short: these are far behind others that know the same work, or compile anew for a kind of case.
LIMITED_TO = {
    "sdpa_flash": ("*-8k-64x64-dense-*", "*-32k-64x64-dense-*", "*-sparse_prefill-*"),
    "sdpa_cudnn": ("*-8k-*", "*-32k-*"),
    "fa4": ("*k-64x64-dense-*", "*k-64x64-random-*", "*k-128x128-*", "*-noncausal-*", "*-hd64-*"),
    "seer_triton": ("*-32k-64x64-random-*", "*-attn_pool-8k-*", "*-attn_pool-32k-*"),
    "flex": ("*-32k-64x64-random-*", "*-32k-128x128-random-*"),
    "cudnn_frontend": ("*k-64x64-*", "*-hd64-*"),
    "gate_eager": ("*-32k-*", "*-gate_mask-128k-*"),
}


def all_peers() -> list[ModuleType]:
    """The peer modules, in the order of the report."""
    from bench.peers import (
        cudnn_frontend,
        fa3,
        fa4,
        flex,
        gate_compile,
        gate_eager,
        sdpa_cudnn,
        sdpa_flash,
        seer_triton,
    )

    attention = [sdpa_flash, sdpa_cudnn, fa3, fa4, flex, cudnn_frontend, seer_triton]
    return [*attention, gate_eager, gate_compile]


def compiler_missing() -> str:
    """Empty, or why torch.compile has no GPU code to make here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return ""


def worth_timing(peer: str, case: Case) -> bool:
    """Whether a peer is timed in a case that it supports (LIMITED_TO)."""
    return any(fnmatch(case.name, names) for names in LIMITED_TO.get(peer, ("*",)))


def takes_part(peer: ModuleType, case: Case) -> bool:
    """Whether a peer is timed in a case."""
    ops = getattr(peer, "OPS", (ATTENTION,))
    return case.op in ops and peer.supports(case) and worth_timing(peer.NAME, case)


def kept_lists(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts int32 [..., blocks_q] and kept block indices int32 [..., blocks_q, blocks_kv] of a
    bool mask: ascending, the unused tail holds the other indices (valid, never read)."""
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1).int().contiguous(), order.int().contiguous()
