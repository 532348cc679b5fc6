# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity and selection quality of the learned gate and of its rivals.

Every method is a score per pair of blocks, and one rule picks from all of them, that of
`_equal_choice`. So all methods keep exactly as many blocks in every row.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

import seer_cuda
from seer_cuda import BlockMask, _equal_choice, heuristics
from seer_cuda._equal_choice import open_blocks
from seer_cuda._timing import median_ms
from seer_cuda.demo.config import DemoConfig
from seer_cuda.demo.model import AttentionInput, CausalLM, next_byte_loss
from seer_cuda.demo.text import Corpus
from seer_cuda.demo.train import Advance

GATE, ORACLE, SINK_LOCAL, RANDOM = "learned gate", "oracle", "sink + local", "random"
METHODS = (ORACLE, GATE, SINK_LOCAL, RANDOM)


@dataclass(frozen=True)
class Row:
    """One method at one density.

    Attributes:
        kept: Share of the causally visible blocks that was kept.
        perplexity, late_perplexity: Over all positions, and over the second half of each window.
        ratio, late_ratio: The same over the dense model's.
        recall: Share of the oracle's blocks that the method keeps, the diagonal left out.
        mass: Share of the true attention probability on kept blocks.
        attention_ms: Time of `block_sparse_attn` for one layer of one batch.
    """

    method: str
    density: float
    kept: float
    perplexity: float
    ratio: float
    late_perplexity: float
    late_ratio: float
    recall: float
    mass: float
    attention_ms: float


@dataclass
class Example:
    """One head for the picture: its true map, and what the gate and the window keep of it."""

    layer: int
    head: int
    density: float
    pooled: Tensor  # [blocks, blocks]
    gate: Tensor  # bool [blocks, blocks]


@dataclass
class Results:
    """All measurements of a run."""

    dense_perplexity: float
    dense_late_perplexity: float
    dense_ms: float
    gate_ms: float
    rows: list[Row] = field(default_factory=list)
    free_diagonal: float = 1.0  # share of rows with a choice whose diagonal the gate ranks in its k
    example: Example | None = None

    def row(self, method: str, density: float) -> Row:
        """The row of a method at a density."""
        return next(r for r in self.rows if (r.method, r.density) == (method, density))


def keep(scores: Tensor, density: float, config: DemoConfig) -> BlockMask:
    """The common rule: the diagonal and the best others, equally many for every method."""
    return _equal_choice.keep(scores, density, config.block)


class Scorer:
    """Scores ``[batch|1, heads_q, blocks, blocks]`` of every method for the input of a layer."""

    def __init__(self, config: DemoConfig, gates: nn.ModuleList) -> None:
        self.config, self.gates = config, gates

    def __call__(self, method: str, x: AttentionInput, batch_index: int) -> Tensor:
        (batch, rows, heads), device = x.q.shape[:3], x.q.device
        if method == GATE:
            return self.gates[x.layer](x.q, x.k)
        if method == ORACLE:
            return true_map(x, self.config)[2]
        if method == SINK_LOCAL:
            scores = heuristics.sink_local(rows, block=self.config.block, device=device)
            return scores.expand(1, heads, -1, -1)
        seed = (self.config.seed * 1009 + x.layer) * 1009 + batch_index
        sizes = {"block": self.config.block, "seed": seed, "device": device}
        # Every window has a choice of its own.
        return heuristics.random(rows, batch * heads, **sizes).unflatten(1, (batch, heads))[0]


def true_map(x: AttentionInput, config: DemoConfig) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and block maxima of the layer's dense attention."""
    return seer_cuda.attn_pool(x.q_rope, x.k_rope, x.v, block_q=config.block, block_kv=config.block)


class Evaluator:
    """Runs the model over the held-out windows, batch by batch."""

    def __init__(
        self, config: DemoConfig, model: CausalLM, gates: nn.ModuleList, corpus: Corpus
    ) -> None:
        self.config, self.model = config, model
        self.score = Scorer(config, gates)
        self.gates = gates
        plan = config.evaluation
        windows = corpus.held_out_windows(plan.windows, config.model.context + 1)
        self.batches = windows.split(plan.windows_at_once)

    def run(self, advance: Advance) -> Results:
        """Everything; advances once per `steps`."""
        densities = self.config.evaluation.densities
        quality = Quality(self.config, self.score)
        dense, dense_late = _perplexities(
            self._losses(quality.dense_attention, advance, "dense, and every selection")
        )
        times = self._times(quality.sample)
        results = Results(dense, dense_late, times["dense"], times["gate"])
        results.free_diagonal = quality.free_diagonal()
        results.example = quality.example(densities[len(densities) // 2])
        for density in densities:
            for method in METHODS:
                losses = self._losses(self._sparse(method, density), advance, method)
                perplexity, late = _perplexities(losses)
                row = Row(
                    method=method,
                    density=density,
                    kept=quality.mean("kept", method, density),
                    perplexity=perplexity,
                    ratio=perplexity / dense,
                    late_perplexity=late,
                    late_ratio=late / dense_late,
                    recall=quality.mean("recall", method, density),
                    mass=quality.mean("mass", method, density),
                    attention_ms=times[method, density],
                )
                results.rows.append(row)
        return results

    def _times(self, x: AttentionInput) -> dict[Hashable, float]:
        """Milliseconds of the attention of one layer: dense, of every row, and of the gate."""
        config, heads = self.config, (x.q_rope, x.k_rope, x.v)
        blocks = {"block_q": config.block, "block_kv": config.block}
        gate, lowest = self.gates[x.layer], config.evaluation.densities[-1]
        calls: dict[Hashable, Callable[[], object]] = {
            "dense": lambda: seer_cuda.block_sparse_attn(*heads, **blocks),
            "gate": lambda: gate.select(x.q, x.k, "density", lowest, local=1),
        }
        for method, density in product(METHODS, config.evaluation.densities):
            mask = keep(self.score(method, x, 0), density, config)
            calls[method, density] = partial(seer_cuda.block_sparse_attn, *heads, mask)
        # GPU calls are queued: the cost of waiting for them is shared among several.
        at_once = 10 if config.device == "cuda" else 1
        return median_ms(calls, config.evaluation.timing_repeats, at_once)

    @property
    def steps(self) -> int:
        """How often `run` advances."""
        return len(self.batches) * (1 + len(METHODS) * len(self.config.evaluation.densities))

    def _sparse(self, method: str, density: float) -> Callable[[AttentionInput, int], Tensor]:
        def attention(x: AttentionInput, batch_index: int) -> Tensor:
            mask = keep(self.score(method, x, batch_index), density, self.config)
            return seer_cuda.block_sparse_attn(x.q_rope, x.k_rope, x.v, mask)

        return attention

    @torch.no_grad()
    def _losses(
        self, attention: Callable[[AttentionInput, int], Tensor], advance: Advance, name: str
    ) -> Tensor:
        """Nats per byte, fp64 ``[windows, context]``."""
        config, losses = self.config, []
        for index, tokens in enumerate(self.batches):
            tokens = tokens.to(config.device)
            with torch.autocast(config.device, config.dtype, enabled=config.dtype != torch.float32):
                logits = self.model(tokens[:, :-1], lambda x, i=index: attention(x, i))
            losses.append(next_byte_loss(logits, tokens).double().cpu())
            advance(name)
        return torch.cat(losses)


def _perplexities(losses: Tensor) -> tuple[float, float]:
    return math.exp(losses.mean()), math.exp(losses[:, losses.shape[1] // 2 :].mean())


class Quality:
    """Recall and kept attention mass, layer by layer on the dense model's own activations.

    So all methods are measured on one and the same attention map.
    """

    def __init__(self, config: DemoConfig, score: Scorer) -> None:
        self.config, self.score = config, score
        self.sums: dict[tuple[str, str, float], list[float]] = defaultdict(list)
        self.diagonal_in_top: list[float] = []
        self.inputs: list[AttentionInput] = []  # of the first batch, one per layer

    @property
    def sample(self) -> AttentionInput:
        """The last layer's input for the first batch of windows."""
        return self.inputs[-1]

    def dense_attention(self, x: AttentionInput, batch_index: int) -> Tensor:
        """Dense attention that measures every method on its way."""
        out, lse, pooled = true_map(x, self.config)
        if batch_index == 0:
            self.inputs.append(x)
        scores = {ORACLE: pooled}
        for method in (GATE, SINK_LOCAL, RANDOM):
            scores[method] = self.score(method, x, batch_index)
        for density in self.config.evaluation.densities:
            best = keep(pooled, density, self.config).to_dense() & open_blocks(density, pooled)
            for method in METHODS:
                mask = keep(scores[method], density, self.config)
                found = (mask.to_dense() & best).sum() / best.sum().clamp_min(1)
                _, kept_lse = seer_cuda.block_sparse_attn(
                    x.q_rope, x.k_rope, x.v, mask, return_lse=True
                )
                # Both are log-sums of the same scores, so their difference is the kept share.
                mass = (kept_lse - lse).exp().mean()
                kept = mask.density().mean()
                for quantity, value in (("recall", found), ("mass", mass), ("kept", kept)):
                    # Once per window: the last batch may be smaller.
                    self.sums[quantity, method, density] += [value.item()] * x.q.shape[0]
        self._note_diagonal(scores[GATE])
        return out

    def _note_diagonal(self, scores: Tensor) -> None:
        """How often the gate alone, nothing forced, would have kept the diagonal."""
        density = self.config.evaluation.densities[-1]
        free = seer_cuda.select.from_scores(scores, "density", density).to_dense()
        # Rows before k keep all they see, their diagonal too.
        k = seer_cuda.select.density_to_k(density, self.config.blocks)
        kept = free.diagonal(dim1=-2, dim2=-1)[..., k:]
        if kept.numel():
            self.diagonal_in_top.append(kept.float().mean().item())

    def free_diagonal(self) -> float:
        """Share of the rows with a choice, at the lowest density; 1 if no row has one."""
        return statistics.fmean(self.diagonal_in_top or [1.0])

    def mean(self, quantity: str, method: str, density: float) -> float:
        """Mean over windows, layers, heads and rows; quantity: recall, mass or kept."""
        return statistics.fmean(self.sums[quantity, method, density])

    def example(self, density: float) -> Example:
        """The head in which the gate keeps most more of the map than a window does."""
        best: tuple[float, Example] | None = None
        for x in self.inputs:
            pooled = true_map(x, self.config)[2][0]
            share = seer_cuda.distill.target_prefill(pooled)
            gate, window = (
                keep(self.score(method, x, 0), density, self.config).to_dense()[0]
                for method in (GATE, SINK_LOCAL)
            )
            gain = (share * gate - share * window).sum(-1).mean(-1)
            head = int(gain.argmax())
            if best is None or gain[head].item() > best[0]:
                example = Example(x.layer, head, density, pooled[head].cpu(), gate[head].cpu())
                best = gain[head].item(), example
        assert best is not None, "measured before the dense pass"
        return best[1]
