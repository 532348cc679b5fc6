# SPDX-License-Identifier: Apache-2.0
"""``python -m seer_cuda eval --out``: the study of a local model, as a table, JSON and figures."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer_cuda.integrations.transformers import _adaptive, _study
from seer_cuda.integrations.transformers._choices import (
    ANTIDIAGONAL,
    DENSE,
    GATE,
    METHODS,
    ORACLE,
    POOLED,
    RANDOM,
    SINK_LOCAL,
    VERTICAL_SLASH,
)
from seer_cuda.integrations.transformers._corpus import RunError, load
from seer_cuda.integrations.transformers._files import load_gates
from seer_cuda.integrations.transformers._train import open_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05)
THRESHOLDS = (5e-4, 1e-3, 2e-3, 5e-3)
RESULTS, ACCURACY, TIME, MASK = "results.json", "accuracy.png", "time.png", "mask.png"
ADAPTIVE = "adaptive.png"
CALIBRATION = 2
_THRESHOLD = f"{GATE}, threshold"
_LOSS = "perplexity above the dense model's (%)"
# Colour-blind safe (Okabe and Ito 2008); markers tell the lines apart in greyscale.
STYLE = {
    GATE: ("#0072B2", "o", "-"),
    ORACLE: ("#009E73", "^", "--"),
    _THRESHOLD: ("#56B4E9", "D", ":"),
    VERTICAL_SLASH: ("#CC79A7", "v", "-"),
    ANTIDIAGONAL: ("#E69F00", "P", "-"),
    POOLED: ("#8B6F47", "<", "-"),
    SINK_LOCAL: ("#D55E00", "s", "-"),
    RANDOM: ("#777777", "x", "-"),
}


def study(
    model_folder: str,
    gates_folder: str,
    text: str,
    out: str,
    *,
    context: int = 8192,
    windows: int = 8,
    densities: Sequence[float] = DENSITIES,
    thresholds: Sequence[float] = THRESHOLDS,
    calibration: int = CALIBRATION,
    device: str = "auto",
) -> dict[str, Any]:
    """Measures a model with its gates on the held-out part of a text, and writes what it found.

    calibration: windows of the other part, on which the adaptive rules' numbers are found; 0: none
    of these rules.

    Returns:
        What ``results.json`` holds: ``rows`` (`_study.summarise`), ``times``
        (`_study.layer_times`) and what they were measured on.

    Raises:
        RunError: options that cannot be used.
    """
    if context < 2 or windows < 1:
        raise RunError("--context, --windows: expected at least 2 tokens and 1 window, got less.")
    # A density that is named twice would count its windows twice.
    densities, thresholds = list(dict.fromkeys(densities)), list(dict.fromkeys(thresholds))
    if not densities or not all(0 < density <= 1 for density in densities):
        got = ", ".join(map(str, densities)) or "none"
        raise RunError(f"--densities: expected each density in (0, 1], got {got}.")
    if not all(0 <= threshold < math.inf for threshold in thresholds):
        got = ", ".join(map(str, thresholds))
        raise RunError(f"--thresholds: expected probabilities of at least 0, got {got}.")
    if calibration < 0:
        raise RunError(f"--calibration: expected 0 or more windows, got {calibration}.")
    wanted = _study.selections(densities, thresholds)
    model, tokenizer = open_model(model_folder, device)
    corpus = load(Path(text), tokenizer)
    tokens = corpus.evaluation(windows, context)
    load_gates(model, gates_folder)
    where = model.get_output_embeddings().weight.device
    tokens = tokens.to(where)
    if calibration:
        known = corpus.sample(calibration, context, 0, 0).to(where)
        wanted += _study.calibrate(model, known, densities)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    points = []
    for index, window in enumerate(tokens):
        points += _study.measure(model, window, wanted, window=index)
        print(f"window {index + 1}/{windows}", flush=True)
    result = {
        "model": model_folder,
        "gates": gates_folder,
        "text": text,
        "context": context,
        "windows": windows,
        "calibration": calibration,
        "rows": _study.summarise(points),
        "times": _study.layer_times(model, tokens[0], densities),
    }
    (folder / RESULTS).write_text(json.dumps(result, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        draw_accuracy(result["rows"], folder / ACCURACY)
        draw_time(result["times"], folder / TIME)
        if calibration:
            own = [row for row in result["rows"] if row["target"] is not None]
            rules = {rule: [row for row in own if row["rule"] == rule] for rule in _adaptive.RULES}
            draw_ratios(rules, folder / ADAPTIVE)
        middle = sorted(densities)[len(densities) // 2]
        draw_example(_study.example(model, tokens[0], middle), folder / MASK)
    return result


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a study as aligned text."""
    head = ("method", "rule", "kept", "perplexity", "ratio", "+-", "recall", "mass")
    lines = [head]
    for row in rows:
        rule = "" if row["method"] == DENSE else f"{row['rule']} {row['value']:g}"
        if row.get("target") is not None:
            rule = f"{row['rule']} {row['value']:.3g}, mean {row['target']:g}"
        lines.append(
            (
                row["method"],
                rule,
                f"{row['kept']:.1%}",
                f"{row['perplexity']:.4f}",
                f"{row['ratio']:.4f}",
                "" if row["ratio_error"] is None else f"{row['ratio_error']:.4f}",
                "" if row["recall"] is None else f"{row['recall']:.1%}",
                f"{row['mass']:.1%}",
            )
        )
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of every line of the figure, by the share that is kept."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["method"] != DENSE and row.get("target") is None:
            name = row["method"] if row["rule"] == "density" else _THRESHOLD
            lines.setdefault(name, []).append(row)
    order = {name: sorted(lines.get(name, ()), key=lambda row: row["kept"]) for name in STYLE}
    return {name: own for name, own in order.items() if own}


def draw_accuracy(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss of perplexity, recall and kept attention against the share of blocks that is kept.

    A row may have ``ratio_low`` and ``ratio_high``: a band, e.g. of several seeds.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, own in curves(rows).items():
        kept, style = _line(axes[0], name, own)
        for axis, key in zip(axes[1:], ("recall", "mass"), strict=True):
            if all(row[key] is not None for row in own):
                axis.plot(kept, [100 * row[key] for row in own], **style)
    axes[0].set_yscale("log")
    titles = (
        _LOSS,
        "blocks of the oracle that are kept (%)",
        "attention on kept blocks (%)",
    )
    for axis, title in zip(axes, titles, strict=True):
        _style(axis, title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def draw_ratios(panels: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Loss of perplexity against the share that is kept, a panel for each way of choosing.

    Args:
        panels: By title, rows with at most one per method and density.
        path: Of the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        for name in STYLE:
            own = sorted(
                (row for row in rows if row["method"] == name), key=lambda row: row["kept"]
            )
            if own:
                _line(axis, name, own)
        axis.set_yscale("log")
        _style(axis, f"{title}: {_LOSS}")
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=120)


def _line(
    axis: Axes, name: str, own: Sequence[dict[str, Any]]
) -> tuple[list[float], dict[str, Any]]:
    """One method's loss of perplexity; the share it keeps and how it is drawn."""
    color, marker, line = STYLE[name]
    style = {"color": color, "marker": marker, "linestyle": line, "markersize": 5}
    kept = [100 * row["kept"] for row in own]
    # On a logarithmic axis a gain, or a loss within rounding, is drawn at its foot.
    axis.plot(kept, [_percent(row["ratio"]) for row in own], label=name, **style)
    if all("ratio_low" in row for row in own):
        band = [[_percent(row[key]) for row in own] for key in ("ratio_low", "ratio_high")]
        axis.fill_between(kept, *band, color=color, alpha=0.2, linewidth=0)
    return kept, style


def _percent(ratio: float) -> float:
    return max(100 * (ratio - 1), 1e-3)


def _style(axis: Axes, title: str) -> None:
    axis.set_xscale("log")
    axis.set_xlabel("visible blocks kept (%)")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, which="both")
    ticks = [5, 10, 20, 30, 50, 100]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()


def draw_time(times: Sequence[dict[str, float]], path: Path) -> None:
    """Time of a layer's attention against density, the mean over the layers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4), layout="constrained")
    axis = figure.subplots()
    densities = sorted({row["density"] for row in times})
    means = {
        key: [
            sum(row[key] for row in times if row["density"] == density)
            / sum(row["density"] == density for row in times)
            for density in densities
        ]
        for key in ("dense_ms", "gate_ms", "sparse_ms")
    }
    x = [100 * density for density in densities]
    whole = [
        gate + sparse for gate, sparse in zip(means["gate_ms"], means["sparse_ms"], strict=True)
    ]
    axis.plot(x, means["dense_ms"], "k-", label="dense (scaled_dot_product_attention)")
    axis.plot(x, whole, color=STYLE[GATE][0], marker="o", label="gate, selection and attention")
    axis.plot(x, means["gate_ms"], color="#E69F00", marker="P", label="of that gate and selection")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("density (%)")
    axis.set_ylabel("ms per layer")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def draw_example(example: _study.Example, path: Path, *, heads: int = 4) -> None:
    """A layer's mask beside its true map, by head.

    Raises:
        ImportError: matplotlib is not installed.
    """
    title = f"layer {example.layer}: blocks kept at density {example.density:g}, and the attention"
    example.mask.plot(example.pooled, max_heads=heads, title=title).savefig(path, dpi=120)


__all__ = [
    "METHODS",
    "curves",
    "draw_accuracy",
    "draw_example",
    "draw_ratios",
    "draw_time",
    "study",
    "table",
]
