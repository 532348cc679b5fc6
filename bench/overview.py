# SPDX-License-Identifier: Apache-2.0
"""The second figure, docs/img/overview_{light,dark}.svg: length, limits, what map and gate cost.

Drawn from the same record as the speed figure (bench.figures draws and checks both).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import report
from bench.cases import ATTN_POOL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bench.figures import Theme

# Of the data sheets: bf16 TFLOP/s of the tensor cores without sparsity, at the boost clock.
PEAK_TFLOPS = {"NVIDIA H200": 989.0, "NVIDIA H100 80GB HBM3": 989.0}
_GATE_NAMES = {"ours": "seer_cuda", **report.GATE_TITLES}


def by_length(rows: list[dict]) -> dict[int, dict[int, list[tuple[float, float]]]]:
    """{rows: [(density, TFLOP/s)]} of random masks at 64x64, for the newest family."""
    chosen = report.headline(rows, "random", causal=True, block=[64, 64])
    newest = report.families(chosen)[:1]
    lines: dict[int, list[tuple[float, float]]] = {}
    for row in sorted(chosen, key=lambda row: -row["density"]):
        if row["arch"] in newest:
            lines.setdefault(row["rows_kv"], []).append((row["density"], row["tflops"]))
    return dict(sorted(lines.items()))


def shares(record: dict) -> list[tuple[str, float]]:
    """(what, share of its limit): rates of attention over the tensor cores' peak, those of the
    gate over a copy's."""
    rows, peak = record["rows"], PEAK_TFLOPS.get(record["gpu"])
    found = []
    for mask, density, title in (
        ("dense", 1.0, "dense"),
        ("random", 0.5, "50 % kept"),
        ("random", 0.2, "20 % kept"),
        ("random", 0.1, "10 % kept"),
    ):
        same = report.headline(
            rows, mask, rows_kv=32768, causal=True, block=[64, 64], density=density
        )
        if same and peak:
            found.append((f"attention, {title}", same[0]["tflops"] / peak))
    for row in rows:
        share = report.copy_share(row)
        if share is not None and row["op"] == "pool_gate":
            found.append((f"pool_gate, {row['pools']}", share))
        elif share is not None and row["op"] == "gate_mask":
            found.append((f"gate_mask, {report.length(row['rows_kv'])}", share))
    return found


def map_costs(rows: list[dict]) -> list[tuple[str, float]]:
    """(map, the share by which its time is above our dense attention's)."""
    found = []
    for row in rows:
        if row["op"] == ATTN_POOL and "dense_ms" in row:
            parts = [report.length(row["rows_kv"]), row["pools"].replace("_", " ")]
            if row["block"] != [64, 64]:
                parts.append("x".join(map(str, row["block"])))
            if row["head_dim"] != 128:
                parts.append(f"head_dim {row['head_dim']}")
            found.append((", ".join(parts), row["ms"] / row["dense_ms"] - 1.0))
    return found


def gate_times(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """{who: [(rows, ms)]} from q and k to block bits, and of the attention that it prepares."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["op"] == "gate_mask":
            lines.setdefault("ours", []).append((row["rows_kv"], row["ms"]))
            for name in report.GATE_TITLES:
                if name in row["peers"]:
                    lines.setdefault(name, []).append((row["rows_kv"], row["peers"][name]))
    sparse = report.headline(rows, "random", causal=True, block=[64, 64], density=0.1)
    newest = report.families(sparse)[:1]
    attention = sorted((row["rows_kv"], row["ms"]) for row in sparse if row["arch"] in newest)
    if lines and attention:
        lines["attention"] = attention
    return lines


def draw_axes(record: dict, theme: Theme, axes: list[Axes]) -> None:
    """The four panels."""
    speed, limits, maps, gates = axes
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(length=0)
    _speed(speed, by_length(record["rows"]), theme)
    _bars(limits, shares(record), theme, "share of the limit", limit=1.0)
    _bars(maps, map_costs(record["rows"]), theme, "attn_pool: time beyond dense", limit=None)
    _gates(gates, gate_times(record["rows"]), theme)


def _speed(axis: Axes, lines: dict[int, list[tuple[float, float]]], theme: Theme) -> None:
    densities = sorted({d for points in lines.values() for d, _ in points}, reverse=True)
    place = {density: index for index, density in enumerate(densities)}
    for (rows, points), colour in zip(lines.items(), _tones(theme, len(lines)), strict=True):
        x, y = [place[density] for density, _ in points], [rate for _, rate in points]
        axis.plot(x, y, color=colour, marker="o", markersize=4, linewidth=2)
        note = {"fontsize": 9, "color": colour, "xytext": (6, 0), "textcoords": "offset points"}
        axis.annotate(report.length(rows), (x[-1], y[-1]), va="center", **note)
    axis.set_xticks(range(len(densities)), [f"{density:.0%}" for density in densities])
    axis.set_xlim(-0.2, len(densities) - 0.5)
    axis.set_ylim(0)
    axis.set_xlabel("blocks kept")
    axis.set_title("TFLOP/s of kept work by tokens, 64x64 blocks", loc="left", fontsize=10)
    axis.grid(axis="y", color=theme.faint, linewidth=0.6)


def _bars(
    axis: Axes, values: list[tuple[str, float]], theme: Theme, title: str, limit: float | None
) -> None:
    names = [name for name, _ in values]
    lengths = [value for _, value in values]
    axis.barh(range(len(values)), lengths, color=theme.ours[0])
    for at, value in enumerate(lengths):
        text = f" {value:.0%}" if limit else f" +{value:.0%}"
        axis.text(value, at, text, va="center", fontsize=9)
    axis.set_yticks(range(len(values)), names, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, limit + 0.15 if limit else 1.2 * max([*lengths, 0.05]))
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.set_title(title, loc="left", fontsize=10)


def _gates(axis: Axes, lines: dict[str, list[tuple[int, float]]], theme: Theme) -> None:
    if not lines:  # a partial record
        axis.axis("off")
        return
    colours = {"ours": theme.ours[0], "attention": theme.ink}
    colours |= dict(zip(report.GATE_TITLES, theme.peers, strict=False))
    names = _GATE_NAMES | {"attention": "the attention (10 % kept)"}
    for name, points in lines.items():
        points = sorted(points)
        style = "--" if name == "attention" else "-"
        label = {"color": colours[name], "label": names[name]}
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linestyle=style, **label)
    ticks = sorted({rows for points in lines.values() for rows, _ in points})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [report.length(rows) for rows in ticks])
    axis.set_xlabel("tokens")
    axis.set_title("from q and k to a block mask, ms", loc="left", fontsize=10)
    axis.grid(axis="y", color=theme.faint, linewidth=0.6)
    axis.legend(frameon=False, fontsize=8, labelcolor="linecolor")


def _tones(theme: Theme, count: int) -> list[str]:
    """Colours for up to three lines of ours."""
    return [theme.ours[1], theme.ours[0], theme.ink][-count:] if count < 4 else [theme.ink] * count
