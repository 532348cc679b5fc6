# SPDX-License-Identifier: Apache-2.0
"""The tensors of a case, and an independent judge of what a contestant computes from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench import masks
from bench.cases import Case

# Relative L2 error that one output row may have against float64. Rounding P and the output to
# bfloat16 gives about 2.5e-3; leaving one of 512 equally weighted blocks out gives 4e-2.
ROW_BUDGET = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


@dataclass
class Problem:
    """Inputs of a case: q [batch, rows_q, heads_q, head_dim], k and v [batch, rows_kv, heads_kv,
    head_dim] of standard normal values, mask bool [batch, heads, blocks_q, blocks_kv] or None."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    flops: float

    @classmethod
    def build(cls, case: Case, device: torch.device | str = "cuda") -> Problem:
        """Makes the inputs of a case from its seed."""
        generator = torch.Generator(device=device).manual_seed(case.seed)

        def normal(rows: int, heads: int) -> torch.Tensor:
            shape = (case.batch, rows, heads, case.head_dim)
            dtype = getattr(torch, case.dtype)
            return torch.randn(shape, device=device, dtype=dtype, generator=generator)

        mask = None if case.mask == "dense" else masks.block_mask(case, device)
        return cls(
            case,
            q=normal(case.rows_q, case.heads_q),
            k=normal(case.rows_kv, case.heads_kv),
            v=normal(case.rows_kv, case.heads_kv),
            mask=mask,
            flops=masks.flops(case, mask),
        )

    @property
    def work(self) -> float:
        """What its row's rate counts: FLOP."""
        return self.flops

    def head_mask(self) -> torch.Tensor:
        """The mask with one row per query head: bool [batch, heads_q, blocks_q, blocks_kv]."""
        if self.mask is None:
            raise ValueError("Problem.head_mask: expected a case with a mask, got a dense one")
        return self.mask.repeat_interleave(self.case.heads_q // self.mask.shape[1], dim=1)


def sample_rows(case: Case, count: int = 64) -> list[tuple[int, int, int]]:
    """(batch, head, row) triples to judge: heads in turn; first, last and random rows."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    rows = torch.randint(case.rows_q, (count,), generator=generator).tolist()
    rows[0], rows[-1] = 0, case.rows_q - 1
    batch = torch.randint(case.batch, (count,), generator=generator).tolist()
    return [(b, i % case.heads_q, row) for i, (b, row) in enumerate(zip(batch, rows, strict=True))]


def exact_row(problem: Problem, batch: int, head: int, row: int) -> torch.Tensor:
    """One output row by definition, float64 [head_dim]: softmax over the visible keys of the kept
    blocks, scale head_dim^-0.5; zeros where there is none."""
    case = problem.case
    kv_head = head * case.heads_kv // case.heads_q
    key = torch.arange(case.rows_kv, device=problem.q.device)
    keep = torch.ones_like(key, dtype=torch.bool)
    if case.causal:
        keep = key <= row + case.rows_kv - case.rows_q
    if problem.mask is not None:
        mask_head = head * problem.mask.shape[1] // case.heads_q
        bits = problem.mask[batch, mask_head, row // case.block[0]]
        keep = keep & bits[key // case.block[1]]
    keys = problem.k[batch, keep, kv_head].double()
    if keys.shape[0] == 0:
        return torch.zeros(case.head_dim, dtype=torch.float64, device=key.device)
    scores = keys @ problem.q[batch, row, head].double() * case.head_dim**-0.5
    return scores.softmax(dim=0) @ problem.v[batch, keep, kv_head].double()


def worst_row_error(problem: Problem, out: torch.Tensor, count: int = 64) -> float:
    """Largest relative L2 error over sampled rows of out [batch, rows_q, heads_q, head_dim].

    A row that holds NaN or infinity counts as infinitely wrong.
    """
    errors = []
    for batch, head, row in sample_rows(problem.case, count):
        exact = exact_row(problem, batch, head, row)
        got = out[batch, row, head].double()
        size = exact.norm().clamp(min=torch.finfo(torch.float32).tiny)
        errors.append(((got - exact).norm() / size).nan_to_num(nan=torch.inf))
    return float(torch.stack(errors).max())


def check(problem: Problem, out: torch.Tensor) -> None:
    """Raises ValueError unless `out` answers the problem (ROW_BUDGET)."""
    case = problem.case
    shape = (case.batch, case.rows_q, case.heads_q, case.head_dim)
    if tuple(out.shape) != shape:
        raise ValueError(f"wrong shape: expected {shape}, got {tuple(out.shape)}")
    error = worst_row_error(problem, out)
    budget = ROW_BUDGET[case.dtype]
    if not error <= budget:
        raise ValueError(f"wrong result: relative error {error:.2e} of a row, allowed {budget:g}")
