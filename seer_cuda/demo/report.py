# SPDX-License-Identifier: Apache-2.0
"""What the demo says: the table, and sentences that follow from its numbers."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.table import Table

from seer_cuda._version import __version__
from seer_cuda.demo import config as configuration
from seer_cuda.demo.config import DemoConfig
from seer_cuda.demo.evaluate import GATE, ORACLE, RANDOM, SINK_LOCAL, Results, Row
from seer_cuda.demo.text import Corpus

#: Perplexities this close, relatively, are called equal.
_SAME = 5e-4


def opening(config: DemoConfig, corpus: Corpus, device: str) -> list[str]:
    """What is about to happen."""
    model = config.model
    return [
        f"Text: {corpus.name}, bytes as tokens: {corpus.files[0]} files "
        f"({corpus.train.numel() / 1e6:.1f} MB) to train, {corpus.files[1]} held out "
        f"({corpus.held_out.numel() / 1e6:.1f} MB).",
        f"Model: {model.layers} layers, {model.heads_q} query and {model.heads_kv} KV heads of "
        f"{model.head_dim}, context {model.context} = {config.blocks} blocks of {config.block}. "
        f"Device: {device}. Seed {config.seed}.",
        "",
    ]


def table(config: DemoConfig, results: Results) -> Table:
    """One line per method and density, the dense model first."""
    windows = min(config.evaluation.windows_at_once, config.evaluation.windows)
    grid = Table(
        title="Held-out text",
        caption=f"ms: one layer, {windows} windows; the gate itself takes {results.gate_ms:.2f} ms",
        box=box.SIMPLE,
    )
    grid.add_column("blocks kept")
    grid.add_column("chosen by")
    for name in (
        "perplexity",
        "x dense",
        "late x dense",
        "recall",
        "mass",
        "attention ms",
        "speed",
    ):
        grid.add_column(name, justify="right")
    grid.add_row(
        "100.0 %",
        "(dense)",
        f"{results.dense_perplexity:.3f}",
        "1.0000",
        "1.0000",
        "",
        "",
        f"{results.dense_ms:.2f}",
        "1.0x",
        end_section=True,
    )
    for density in config.evaluation.densities:
        rows = [row for row in results.rows if row.density == density]
        for row in rows:
            grid.add_row(*_cells(row, results.dense_ms), end_section=row is rows[-1])
    return grid


def _cells(row: Row, dense_ms: float) -> list[str]:
    return [
        f"{100 * row.kept:.1f} %",
        row.method,
        f"{row.perplexity:.3f}",
        f"{row.ratio:.4f}",
        f"{row.late_ratio:.4f}",
        f"{100 * row.recall:.0f} %",
        f"{100 * row.mass:.0f} %",
        f"{row.attention_ms:.2f}",
        f"{dense_ms / row.attention_ms:.1f}x",
    ]


def notes(config: DemoConfig) -> list[str]:
    """How to read the table."""
    densities = ", ".join(f"{100 * d:g} %" for d in config.evaluation.densities)
    return [
        f"Asked for: {densities} of the causal triangle. All methods keep equally many blocks in "
        "every row: its diagonal block, given to all alike, and the best others by the method's "
        "own score.",
        "oracle: the true attention map, pooled. late: second half of each window, where there is "
        "most to choose from. recall: share of the oracle's blocks that were found, in rows with a "
        "choice, the diagonal left out. mass: share of the true attention probability on kept "
        "blocks.",
        "ms and speed are of the attention alone: the time to make the choice is not in them. The "
        "oracle cannot be used for speed, as it needs the dense map first.",
        "",
    ]


def findings(results: Results) -> list[str]:
    """Sentences computed from the numbers, one paragraph each."""
    densities = sorted({row.density for row in results.rows}, reverse=True)
    lines = [_cost(results, density) for density in densities]
    lines.append(_verdict(results, densities))
    lines.append(_speed(results, densities))
    lines.append(
        f"Left alone, the gate ranks the diagonal block among its own choice in "
        f"{100 * results.free_diagonal:.0f} % of the rows with a choice at "
        f"{100 * densities[-1]:g} %."
    )
    return lines


def _percent(ratio: float) -> str:
    """A perplexity ratio in words."""
    if abs(ratio - 1) < _SAME:
        return "the same perplexity as dense attention"
    word = "more" if ratio > 1 else "less"
    return f"{100 * abs(ratio - 1):.2g} % {word} perplexity than dense attention"


def _cost(results: Results, density: float) -> str:
    gate, oracle = results.row(GATE, density), results.row(ORACLE, density)
    window, random = results.row(SINK_LOCAL, density), results.row(RANDOM, density)
    return (
        f"With {100 * gate.kept:.0f} % of the blocks the learned gate gives {_percent(gate.ratio)} "
        f"(oracle {_signed(oracle.ratio)}, sink + local {_signed(window.ratio)}, random "
        f"{_signed(random.ratio)}): it finds {100 * gate.recall:.0f} % of the blocks that matter "
        f"most and keeps {100 * gate.mass:.0f} % of the attention."
    )


def _signed(ratio: float) -> str:
    # Adding 0.0 turns -0.0 into 0.0.
    return f"{round(100 * (ratio - 1), 1) + 0.0:+.1f} %"


def beaten(results: Results, rival: str) -> list[float]:
    """Densities at which the learned gate has a lower perplexity than the rival."""
    densities = {row.density for row in results.rows}
    better = (d for d in densities if results.row(GATE, d).ratio < results.row(rival, d).ratio)
    return sorted(better, reverse=True)


def _verdict(results: Results, densities: list[float]) -> str:
    parts = []
    for rival in (SINK_LOCAL, RANDOM):
        won = beaten(results, rival)
        if won == densities:
            parts.append(f"beats {rival} at every density")
        elif won:
            at = ", ".join(f"{100 * d:g} %" for d in won)
            parts.append(f"beats {rival} at {at} only")
        else:
            parts.append(f"beats {rival} at no density")
    text = f"At equal cost the learned gate {' and '.join(parts)}."
    shares = [(share, d) for d in densities if (share := _gap_closed(results, d)) is not None]
    if shares:
        share, density = min(shares)
        text += (
            f" It closes at least {100 * share:.0f} % of the gap between sink + local and the "
            f"oracle (at {100 * density:g} %)."
        )
    return text


def _gap_closed(results: Results, density: float) -> float | None:
    """How far the gate comes from the window's log perplexity to the oracle's; None: no gap."""
    window, gate, oracle = (
        math.log(results.row(method, density).ratio) for method in (SINK_LOCAL, GATE, ORACLE)
    )
    if window - oracle < _SAME:
        return None
    return max(0.0, (window - gate) / (window - oracle))


def _speed(results: Results, densities: list[float]) -> str:
    parts = []
    for density in densities:
        total = results.row(GATE, density).attention_ms + results.gate_ms
        parts.append(f"{results.dense_ms / total:.1f}x at {100 * density:g} %")
    return f"Gate and sparse attention together against dense attention: {', '.join(parts)}."


def as_json(config: DemoConfig, corpus: Corpus, results: Results) -> dict[str, Any]:
    """Everything that was set and measured."""
    return {
        "seer_cuda": __version__,
        "torch": torch.__version__,
        "config": configuration.as_json(config),
        "text": {
            "name": corpus.name,
            "files": list(corpus.files),
            "bytes": [corpus.train.numel(), corpus.held_out.numel()],
        },
        "dense": {
            "perplexity": results.dense_perplexity,
            "late_perplexity": results.dense_late_perplexity,
            "attention_ms": results.dense_ms,
        },
        "gate_ms": results.gate_ms,
        "free_diagonal": results.free_diagonal,
        "rows": [asdict(row) for row in results.rows],
        "gate_beats": {rival: beaten(results, rival) for rival in (SINK_LOCAL, RANDOM)},
    }
