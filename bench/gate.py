# SPDX-License-Identifier: Apache-2.0
"""The cases of the gate: their tensors, our launches, and an independent judge in float64.

Everyone is timed as a CUDA graph: the gate's kernels are as short as the host's work for them, and
a model that cares runs its prefill so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench import masks
from bench.cases import Case
from bench.problem import ROW_BUDGET, Problem, check

# Probability that the threshold rule compares with, from the range that SeerAttention's README uses
# (5e-4 to 5e-3). Every rule's work is the same whatever its value.
THRESHOLD = 2e-3
# Spread of the weights: scores of random inputs then differ by about 1 within a row.
WEIGHT_STD = 0.5
# Distance of a score to the place of decision below which bf16 embeddings and, in the peers, bf16
# scores may decide otherwise than float64; probabilities by its exponential.
SCORE_SLACK = 0.06
SAMPLED_ROWS = 32  # of the first and of the last head


@dataclass
class Side:
    """What becomes one gate embedding: x [batch, rows, heads, head_dim] before RoPE, weight
    [heads_out, kinds * head_dim, gate_dim] or None, cos and sin fp32 [blocks, gate_dim / 2]."""

    x: Tensor
    weight: Tensor | None
    cos: Tensor
    sin: Tensor
    kinds: tuple[str, ...]


def kinds_of(pools: str) -> tuple[str, ...]:
    """("max", "avg") of "maxavg"."""
    return tuple(pools[at : at + 3] for at in range(0, len(pools), 3))


@dataclass
class GateProblem:
    """Inputs of a case: gate_q and gate_k before RoPE, standard normal; the gate, bf16 weights; for
    sparse_prefill also q, k and v of the attention. `work`: bytes that must move, for
    sparse_prefill FLOP of the kept blocks, 0 for gate_select (no rate is told)."""

    case: Case
    gate: torch.nn.Module
    gate_q: Tensor
    gate_k: Tensor
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    mask: Tensor | None = None
    work: float = 0.0

    @classmethod
    def build(cls, case: Case, device: torch.device | str = "cuda") -> GateProblem:
        """Makes the inputs of a case from its seed."""
        import seer_cuda

        generator = torch.Generator(device=device).manual_seed(case.seed)
        dtype = getattr(torch, case.dtype)

        def normal(rows: int, heads: int) -> Tensor:
            shape = (case.batch, rows, heads, case.head_dim)
            return torch.randn(shape, device=device, dtype=dtype, generator=generator)

        config = seer_cuda.GateConfig(
            case.heads_q, case.heads_kv, case.head_dim, gate_dim=case.head_dim, block=case.block[0]
        )
        gate = seer_cuda.AttnGate(config, device=device, dtype=dtype)
        weight = gate.mask_linear_k.weight.requires_grad_(False)
        weight.normal_(std=WEIGHT_STD, generator=generator)
        q, k = normal(case.rows_q, case.heads_q), normal(case.rows_kv, case.heads_kv)
        problem = cls(case, gate, q, k)
        if case.op == "sparse_prefill":
            problem.q, problem.k = (
                normal(case.rows_q, case.heads_q),
                normal(case.rows_kv, case.heads_kv),
            )
            problem.v = normal(case.rows_kv, case.heads_kv)
            bits = seer_cuda.gate_mask(q, k, gate, problem.rule())
            problem.mask = bits.to_dense()
            problem.work = masks.flops(case, problem.mask)
        elif case.op != "gate_select":
            problem.work = problem._bytes()
        return problem

    @property
    def value(self) -> float:
        """The parameter of the rule."""
        return self.case.density if self.case.mask == "density" else THRESHOLD

    def rule(self) -> object:
        """The rule as `seer_cuda.gate_mask` takes it."""
        import seer_cuda

        return seer_cuda.Rule(self.case.mask, self.value)

    def _side(self, x: Tensor, weight: Tensor | None, pools: str) -> Side:
        at = torch.arange(x.shape[1], device=x.device)
        return Side(x, weight, *self.gate.rope_tables(at), kinds_of(pools))

    @cached_property
    def q_side(self) -> Side:
        """Averages of q, as they are."""
        return self._side(self.gate_q, None, "avg")

    @cached_property
    def k_side(self) -> Side:
        """Maxima, minima and averages of k, one matrix per query head."""
        return self._side(self.gate_k, self.gate.mask_linear_k.weight, "maxminavg")

    @cached_property
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """What gate_select reads, made once."""
        with torch.no_grad():
            return self.gate.embed(self.gate_q, self.gate_k)

    @property
    def side(self) -> Side:
        """What pool_gate embeds."""
        return self.q_side if self.case.pools == "avg" else self.k_side

    def _bytes(self) -> float:
        case = self.case
        size = self.gate_q.element_size()
        weight = self.gate.mask_linear_k.weight.numel()
        embedding = case.batch * case.heads_q * case.head_dim
        if case.op == "pool_gate" and case.pools == "avg":
            return size * (self.gate_q.numel() + embedding * case.blocks_q)
        keys = size * (self.gate_k.numel() + weight)
        if case.op == "pool_gate":
            return keys + size * embedding * case.blocks_kv
        # The embeddings between the two launches are not counted: they stay in the L2 cache.
        words = math.ceil(case.blocks_kv / 32)
        return (
            keys
            + size * self.gate_q.numel()
            + 4 * case.batch * case.heads_q * (case.blocks_q * words)
        )

    # ------------------------------------------------------------------------------- contestants

    def ours(self) -> Callable[[], Tensor]:
        """What a user of this package calls."""
        import seer_cuda

        case, gate = self.case, self.gate
        if case.op == "pool_gate":
            side = self.side
            return lambda: seer_cuda.pool_gate(
                side.x, side.weight, side.cos, side.sin, block=case.block[0], pools=case.pools
            )
        rule = self.rule()
        if case.op == "gate_mask":
            return lambda: seer_cuda.gate_mask(self.gate_q, self.gate_k, gate, rule).block_bits
        if case.op == "gate_select":
            q_gate, k_gate = self.embeddings
            return lambda: seer_cuda.gate_select(
                q_gate, k_gate, method=rule.method, value=rule.value
            ).block_bits
        return lambda: seer_cuda.sparse_prefill(
            self.q, self.k, self.v, self.gate_q, self.gate_k, gate, rule
        )

    def copy(self) -> Callable[[], Tensor] | None:
        """A device copy that reads and writes `work` bytes in all; None where no bytes count."""
        if self.case.op not in ("pool_gate", "gate_mask"):
            return None
        count = int(self.work) // 2
        source = torch.empty(count, dtype=torch.uint8, device=self.gate_q.device).random_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    # -------------------------------------------------------------------------------------- judge

    def check(self, out: Tensor, dense: bool = False) -> None:
        """Raises ValueError unless `out` is a right answer; dense: of a peer without masks."""
        if self.case.op == "pool_gate":
            self._check_embedding(out)
        elif self.case.op == "sparse_prefill":
            self._check_mask(self.mask)
            mask = None if dense else self.mask
            check(Problem(self.case, self.q, self.k, self.v, mask, self.work), out)
        else:
            self._check_mask(out)

    def _check_embedding(self, out: Tensor) -> None:
        from seer_cuda import reference

        side, case = self.side, self.case
        block = case.block[0]
        blocks = math.ceil(side.x.shape[1] / block)
        heads = side.x.shape[2] if side.weight is None else side.weight.shape[0]
        shape = (case.batch, blocks, heads, case.head_dim)
        if tuple(out.shape) != shape:
            raise ValueError(f"wrong shape: expected {shape}, got {tuple(out.shape)}")
        at = torch.linspace(0, blocks - 1, min(blocks, 16)).long().unique().to(out.device)
        tokens = torch.cat([side.x[:, n * block : (n + 1) * block] for n in at.tolist()], dim=1)
        pools = sum({"max": 1, "min": 2, "avg": 4}[kind] for kind in side.kinds)
        exact = reference.pool_gate(
            tokens, side.weight, side.cos[at], side.sin[at], block=block, pools=pools
        )
        error = (out[:, at].double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        worst = float(error.nan_to_num(nan=torch.inf).max())
        if not worst <= ROW_BUDGET[case.dtype]:
            raise ValueError(
                f"wrong result: relative error {worst:.2e} of an embedding, allowed "
                f"{ROW_BUDGET[case.dtype]:g}"
            )

    def _check_mask(self, out: Tensor) -> None:
        """Sampled rows keep what float64 keeps, but for scores too close to the decision."""
        case = self.case
        if out.dtype == torch.int32:
            out = torch.ops.seer.unpack_block_bits(out, case.blocks_kv)
        shape = (case.batch, case.heads_q, case.blocks_q, case.blocks_kv)
        if out.dtype != torch.bool or tuple(out.shape) != shape:
            raise ValueError(f"wrong mask: expected bool {shape}, got {out.dtype} {out.shape}")
        for head, rows, must, may in self._decisions:
            kept = out[0, head, rows]
            wrong = int(((must & ~kept) | (kept & ~may)).sum())
            if wrong:
                raise ValueError(f"wrong result: {wrong} blocks of {len(rows)} rows, head {head}")

    @cached_property
    def _decisions(self) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """(head, rows, what they must keep, what they may keep)."""
        case = self.case
        rows = torch.linspace(0, case.blocks_q - 1, min(case.blocks_q, SAMPLED_ROWS))
        rows = rows.long().unique().to(self.gate_q.device)
        heads = sorted({0, case.heads_q - 1})
        return [(head, rows, *self._decided(self._exact_scores(head, rows))) for head in heads]

    def _exact_scores(self, head: int, rows: Tensor) -> Tensor:
        """float64 [rows, blocks_kv] of the first sequence, -inf where hidden."""
        from seer_cuda import reference

        case, q_side, k_side = self.case, self.q_side, self.k_side
        kv_head = head * case.heads_kv // case.heads_q
        block = case.block[0]

        def one(side: Side, index: int, weight: Tensor | None, pools: int) -> Tensor:
            x = side.x[:1, :, index : index + 1]
            gate = reference.pool_gate(x, weight, side.cos, side.sin, block=block, pools=pools)
            return gate[0, :, 0]

        q_gate = one(q_side, head, None, 4)[rows]
        k_gate = one(k_side, kv_head, k_side.weight[head : head + 1], 7)
        scores = q_gate @ k_gate.T * case.head_dim**-0.5
        last = rows[:, None] + case.blocks_kv - case.blocks_q
        hidden = torch.arange(case.blocks_kv, device=rows.device) > last
        return scores.masked_fill(hidden, -torch.inf)

    def _decided(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """What rows with these scores must keep, and may keep."""
        visible = scores > -torch.inf
        if self.case.mask == "threshold":
            above = below = scores.log_softmax(-1) - math.log(self.value)
        else:
            from seer_cuda.select import density_to_k

            k = density_to_k(self.value, scores.shape[-1])
            padded = torch.nn.functional.pad(scores, (0, 1), value=-torch.inf)
            best = padded.topk(min(k, scores.shape[-1]) + 1).values.clamp_min(-1e30)
            above, below = scores - best[:, -1:], scores - best[:, -2:-1]
        return (above > SCORE_SLACK) & visible, (below >= -SCORE_SLACK) & visible


def captured(launch: Callable[[], Tensor], device: torch.device | str) -> Callable[[], Tensor]:
    """The launch as the replay of a CUDA graph; on the CPU the launch itself.

    A graph holds addresses, not tensors: what the launch reads lives as long as the replay.
    """
    if torch.device(device).type != "cuda":
        return launch
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(2):
            launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = launch()

    def replay(_keeps: object = launch) -> Tensor:
        graph.replay()
        return out

    return replay
