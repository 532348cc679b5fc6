# SPDX-License-Identifier: Apache-2.0
"""The cases of attn_pool: our launches, what they allocate, and a judge of the map in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.problem import Problem, check

# A map's entry may differ from float64 by ABSOLUTE + RELATIVE of itself: what bf16 inputs and fp32
# accumulation of q k^T leave. Peers that round scores to bf16 have their own budget.
ABSOLUTE, RELATIVE = 1e-5, 2.0**-8
SAMPLED_BLOCKS = 8  # rows of blocks, of the first and of the last head


@dataclass
class PoolProblem(Problem):
    """Dense attention whose block map is wanted too: `case.pools` is "max" or "sum" per block, or
    "per_token", the maximum of every query row."""

    def ours(self) -> Callable[[], tuple[Tensor, Tensor]]:
        """What a user of this package calls; out and the map."""
        import seer_cuda

        case = self.case
        options = {
            "block_q": case.block[0],
            "block_kv": case.block[1],
            "causal": case.causal,
            "per_token": case.pools == "per_token",
            "reduce": "sum" if case.pools == "sum" else "max",
        }

        def launch() -> tuple[Tensor, Tensor]:
            out, _, pooled = seer_cuda.attn_pool(self.q, self.k, self.v, **options)
            return out, pooled

        return launch

    def dense(self) -> Callable[[], Tensor]:
        """Our dense attention: the map's price is the distance to it."""
        import seer_cuda

        causal = self.case.causal
        return lambda: seer_cuda.block_sparse_attn(self.q, self.k, self.v, None, causal=causal)

    def check(self, answer: Tensor | tuple[Tensor, Tensor], relative: float = RELATIVE) -> None:
        """Raises ValueError unless out, and the map where one is given, are right."""
        if isinstance(answer, Tensor):
            check(self, answer)
            return
        out, pooled = answer
        check(self, out)
        case = self.case
        lines = case.rows_q if case.pools == "per_token" else case.blocks_q
        shape = (case.batch, case.heads_q, lines, case.blocks_kv)
        if tuple(pooled.shape) != shape:
            raise ValueError(f"wrong shape of the map: expected {shape}, got {tuple(pooled.shape)}")
        for head in sorted({0, case.heads_q - 1}):
            for block in self._sampled_blocks():
                exact = self.exact_blocks(head, block)
                first = block * case.block[0] if case.pools == "per_token" else block
                got = pooled[0, head, first : first + exact.shape[0]].double()
                excess = (got - exact).abs() - ABSOLUTE - relative * exact
                worst = float(excess.max().nan_to_num(nan=torch.inf))
                if not worst <= 0:
                    raise ValueError(
                        f"wrong map: head {head}, query block {block}: {worst:.2e} beyond "
                        f"{ABSOLUTE:g} + {relative:.2e} of an entry"
                    )

    def exact_blocks(self, head: int, block: int) -> Tensor:
        """float64 [1 or rows of the block, blocks_kv]: the map of one query block by definition."""
        case = self.case
        block_q, block_kv = case.block
        kv_head = head * case.heads_kv // case.heads_q
        rows = torch.arange(block * block_q, min((block + 1) * block_q, case.rows_q))
        rows = rows.to(self.q.device)
        scores = self.q[0, rows, head].double() @ self.k[0, :, kv_head].double().T
        if case.causal:
            key = torch.arange(case.rows_kv, device=rows.device)
            hidden = key > rows[:, None] + case.rows_kv - case.rows_q
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = (scores * case.head_dim**-0.5).softmax(-1)
        pad = case.blocks_kv * block_kv - case.rows_kv
        weights = torch.nn.functional.pad(weights, (0, pad)).unflatten(-1, (-1, block_kv))
        if case.pools == "sum":
            return weights.sum(-1).mean(0, keepdim=True)
        tops = weights.amax(-1)
        return tops if case.pools == "per_token" else tops.amax(0, keepdim=True)

    def _sampled_blocks(self) -> list[int]:
        count = min(self.case.blocks_q, SAMPLED_BLOCKS)
        return torch.linspace(0, self.case.blocks_q - 1, count).long().unique().tolist()


def extra_megabytes(launch: Callable[[], object]) -> float:
    """Peak of device memory during a call beyond its results, in MB (1e6 bytes)."""
    launch()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = launch()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return (peak - max(after, before)) / 1e6
