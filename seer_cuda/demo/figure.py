# SPDX-License-Identifier: Apache-2.0
"""The picture: perplexity over density, and what a gate keeps beside the true attention."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seer_cuda.demo.config import DemoConfig
from seer_cuda.demo.evaluate import GATE, METHODS, ORACLE, RANDOM, SINK_LOCAL, Example, Results

# Colour-blind safe (Okabe and Ito 2008); markers tell the lines apart in greyscale.
_STYLE = {
    GATE: ("#0072B2", "o", "-"),
    ORACLE: ("#009E73", "^", "--"),
    SINK_LOCAL: ("#D55E00", "s", "-"),
    RANDOM: ("#777777", "x", "-"),
}


def draw(config: DemoConfig, results: Results, path: Path) -> None:
    """Writes the picture as PNG.

    Raises:
        OSError: path cannot be written.
    """
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    curves, kept, true = figure.subplots(1, 3, width_ratios=(1.25, 1, 1.15))
    _curves(curves, results)
    if results.example is not None:
        _example(kept, true, results.example)
        _label_blocks((kept, true), config.block)
    figure.savefig(path, dpi=150)


def _curves(axes: Axes, results: Results) -> None:
    for method in METHODS:
        color, marker, line = _STYLE[method]
        rows = sorted((r for r in results.rows if r.method == method), key=lambda r: r.kept)
        axes.plot(
            [100 * r.kept for r in rows],
            [r.perplexity for r in rows],
            color=color,
            marker=marker,
            linestyle=line,
            label=method,
        )
    axes.axhline(results.dense_perplexity, color="black", linewidth=1, label="dense")
    axes.set_xlabel("visible blocks kept (%)")
    axes.set_ylabel("held-out perplexity per byte")
    axes.set_title("The same number of blocks for all")
    axes.set_ylim(
        bottom=min(results.dense_perplexity, *(r.perplexity for r in results.rows)) * 0.99
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _example(kept: Axes, true: Axes, example: Example) -> None:
    visible = torch.ones_like(example.gate).tril()
    state = visible.int() + (visible & example.gate).int()
    palette = ListedColormap(["#FFFFFF", "#DDDDDD", "#0072B2"])
    kept.imshow(state.numpy(), cmap=palette, vmin=0, vmax=2, interpolation="nearest")
    kept.set_title(f"Kept by the gate at {100 * example.density:g} %")
    values = example.pooled.float().masked_fill(~visible, torch.nan)
    scale = LogNorm(vmin=1e-3, vmax=1.0, clip=True)
    image = true.imshow(values.numpy(), cmap="cividis", norm=scale, interpolation="nearest")
    true.set_title(f"True attention: layer {example.layer}, head {example.head}")
    true.figure.colorbar(image, ax=true, shrink=0.85, label="largest probability in block")


def _label_blocks(panels: tuple[Axes, ...], block: int) -> None:
    for panel in panels:
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel(f"key block ({block} tokens)")
    panels[0].set_ylabel("query block")
