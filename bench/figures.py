# SPDX-License-Identifier: Apache-2.0
"""Everything generated from data: two figures, and the README's tables.

    python -m bench.figures            draw docs/img/{speed,overview}_{light,dark}.svg, README.md
    python -m bench.figures --check    exit status 1 if a figure or a table is stale

The data are the newest record of bench/results and the support matrix csrc/variants.json. A table
stands in README.md between `<!-- generated: NAME -->` and `<!-- end: NAME -->`; a figure carries
the digest of the rows it was drawn from, so the check needs no drawing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import overview, report
from bench.cases import BLOCKS, MIDDLE, VARIANTS
from bench.record import RESULTS
from bench.source import ROOT

README = ROOT / "README.md"
IMAGES = ROOT / "docs" / "img"
DRAWING = "4"  # raised when the drawing itself changes

# Operators in the README's order; those with rows in variants.json have compiled CUDA kernels.
BITS_OPS = ("pack_block_bits", "unpack_block_bits", "block_bits_from_indices")
TENSOR_OPS = ("block_sparse_attn", "attn_pool", "pool_gate", "gate_scores", "gate_select")


@dataclass(frozen=True)
class Theme:
    """Colours of one figure; `ours` and `peers` in the order of report.FAMILIES and TITLES."""

    name: str
    ink: str
    faint: str
    ours: tuple[str, ...]
    peers: tuple[str, ...]

    def colour(self, name: str) -> str:
        """Of a family or a peer."""
        names = (*report.FAMILIES, *report.TITLES)
        return dict(zip(names, self.ours + self.peers, strict=True))[name]


THEMES = (
    Theme(
        "light",
        ink="#1f2328",
        faint="#d1d9e0",
        ours=("#0a66d8", "#6ea8ea"),
        peers=("#8250df", "#9a6700", "#bf3989", "#1a7f37", "#cf5b00", "#57606a", "#a40e26"),
    ),
    Theme(
        "dark",
        ink="#e6edf3",
        faint="#3d444d",
        ours=("#58a6ff", "#2f6cb8"),
        peers=("#bc8cff", "#d29922", "#f778ba", "#56d364", "#ffa657", "#9198a1", "#ff7b72"),
    ),
)


def newest_record(results: Path = RESULTS) -> dict | None:
    """The record with the latest date, None if there is none. Partial ones do not count."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    records = [record for record in records if "tests" in record]
    return max(records, key=lambda record: record["date"], default=None)


def figure_digest(record: dict) -> str:
    """What a figure is drawn from, as a hash."""
    data = {"gpu": record["gpu"], "date": record["date"], "rows": record["rows"]}
    return hashlib.sha256((DRAWING + json.dumps(data, sort_keys=True)).encode()).hexdigest()


def figure_path(name: str, theme: Theme) -> Path:
    """docs/img/NAME_light.svg and NAME_dark.svg."""
    return IMAGES / f"{name}_{theme.name}.svg"


def series(rows: list[dict], block: tuple[int, int]) -> dict[str, list[tuple[float, float]]]:
    """{family or peer: [(density, TFLOP/s)]} of the headline's sparse rows at a block size; peers
    that know no mask have their dense rate at every density."""
    chosen = report.headline(rows, "random", rows_kv=MIDDLE, causal=True, block=list(block))
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in report.families(chosen)}
    for row in chosen:
        lines[row["arch"]].append((row["density"], row["tflops"]))
        for name in row["peers"]:
            lines.setdefault(name, []).append((row["density"], report.peer_tflops(row, name)))
    dense = report.dense_row(chosen[0], rows) if chosen else None
    densities = sorted({row["density"] for row in chosen}, reverse=True)
    for name in report.DENSE_PEERS:
        if dense and name in dense["peers"]:
            rate = report.peer_tflops(dense, name)
            lines[name] = [(density, rate) for density in densities]
    return lines


def _label_heights(values: dict[str, float], gap: float) -> dict[str, float]:
    """Heights for labels beside `values`, moved apart to at least `gap`, as little as possible."""
    clusters: list[tuple[list[str], float]] = []  # names from below, and their centre
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        names, centre = [name], value
        while clusters and centre - clusters[-1][1] < gap * (len(names) + len(clusters[-1][0])) / 2:
            below, at = clusters.pop()
            centre = (at * len(below) + centre * len(names)) / (len(below) + len(names))
            names = below + names
        clusters.append((names, centre))
    return {
        name: centre + gap * (index - (len(names) - 1) / 2)
        for names, centre in clusters
        for index, name in enumerate(names)
    }


def draw(name: str, record: dict, theme: Theme, path: Path) -> None:
    """A figure of FIGURES into a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "svg.hashsalt": "seer_cuda",
        "font.family": "DejaVu Sans",
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
    }
    with plt.rc_context(style):
        figure = FIGURES[name](record, theme, plt)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Description": f"record {figure_digest(record)}"}
        figure.savefig(path, transparent=True, metadata=metadata)
        plt.close(figure)


def _draw_speed(record: dict, theme: Theme, plt):
    """Two panels (64x64 and 128x128 blocks): TFLOP/s of kept work over density, at 32k."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.0), sharey=True)
    panels = [series(record["rows"], block) for block in BLOCKS]
    top = 1.12 * max(rate for lines in panels for points in lines.values() for _, rate in points)
    for axis, block, lines in zip(axes, BLOCKS, panels, strict=True):
        _draw_panel(axis, lines, theme, top)
        axis.set_title(f"{block[0]}x{block[1]} blocks", loc="left", fontsize=11)
    axes[0].set_ylabel("TFLOP/s of kept work")
    _headline(
        figure,
        f"Block-sparse attention forward, {report.length(MIDDLE)} tokens, causal, bf16, "
        f"32/8 heads of 128: {record['gpu']}, {record['date']}",
    )
    return figure


def _draw_overview(record: dict, theme: Theme, plt):
    """Speed by length, shares of limits, costs of map and gate (bench.overview)."""
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.2))
    overview.draw_axes(record, theme, list(axes.flat))
    _headline(figure, f"Causal, bf16, 32/8 heads of 128: {record['gpu']}, {record['date']}")
    return figure


def _headline(figure, text: str) -> None:
    figure.suptitle(text, fontsize=10.5, x=0.01, ha="left")


FIGURES = {"speed": _draw_speed, "overview": _draw_overview}


def _draw_panel(axis, lines: dict, theme: Theme, top: float) -> None:
    densities = sorted(
        {density for points in lines.values() for density, _ in points}, reverse=True
    )
    place = {density: index for index, density in enumerate(densities)}
    heights = _label_heights({name: points[-1][1] for name, points in lines.items()}, 0.055 * top)
    for name, points in lines.items():
        ours, dense = name in report.FAMILIES, name in report.DENSE_PEERS
        newest = name == next(iter(lines))
        title = (report.FAMILIES | report.TITLES)[name] + (" (dense)" if dense else "")
        axis.plot(
            [place[density] for density, _ in points],
            [rate for _, rate in points],
            color=theme.colour(name),
            linewidth=2.6 if newest else 1.4,
            linestyle="--" if dense else "-",
            marker="" if dense else "o",
            markersize=5 if newest else 3.5,
            zorder=3 if newest else 2,
        )
        axis.text(
            len(densities) - 0.88,
            heights[name],
            title,
            color=theme.colour(name),
            fontsize=9,
            fontweight="bold" if ours else "normal",
            va="center",
        )
    axis.set_xticks(range(len(densities)), [f"{density:.0%}" for density in densities])
    axis.set_xlabel("blocks kept")
    axis.set_xlim(-0.2, len(densities) + 0.95)
    axis.set_ylim(0, max(top, *heights.values()))
    axis.grid(axis="y", color=theme.faint, linewidth=0.6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0)


def figure_section(record: dict | None) -> str:
    """README: the figure and what it shows."""
    if record is None or not series(record["rows"], BLOCKS[0]):
        return (
            "No GPU record is in [bench/results](bench/results) yet: `make gpu-check` on a GPU "
            "machine writes it, and `python -m bench.figures` puts it here."
        )
    return "\n".join(
        [
            "<picture>",
            '  <source media="(prefers-color-scheme: dark)" srcset="docs/img/speed_dark.svg">',
            '  <img alt="TFLOP/s over density, against peers" src="docs/img/speed_light.svg">',
            "</picture>",
            "",
            f"TFLOP/s of kept work on an {record['gpu']}, torch {record['torch']}, "
            f"{record['date']}: {report.length(MIDDLE)} tokens, causal, a random mask per head; 32 "
            "query and 8 KV heads of 128, bf16; sustained, peers in the same run."
            + _what_it_saves(record["rows"]),
        ]
    )


def _what_it_saves(rows: list[dict]) -> str:
    """For the caption: a lower line of the figure is still less time."""
    sparse = report.headline(rows, "random", rows_kv=MIDDLE, causal=True, density=0.1)
    row = next((row for row in sparse if tuple(row["block"]) == BLOCKS[0]), None)
    dense = report.dense_row(row, rows) if row else None
    best = report.best_peer(dense) if dense else None
    if best is None:
        return ""
    name, ms = best
    return (
        " The rate counts kept blocks only, so a lower line still takes far less time: with 10% of "
        f"the 64x64 blocks kept attention takes {row['ms']:.2f} ms, where dense "
        f"{report.TITLES[name]}, the fastest of the peers, takes {ms:.2f}."
    )


def speed_section(record: dict | None) -> str:
    """README: the tables of sparse attention at the middle length, of dense attention, of the map
    and of the gate."""
    if record is None or not series(record["rows"], BLOCKS[0]):
        return "No GPU record yet."
    sparse = report.sparse_table(record["rows"], MIDDLE, BLOCKS)
    dense = report.dense_table(record["rows"])
    small = report.small_head_table(record["rows"], MIDDLE)
    if small:
        small = ["", f"With a head_dim of 64, {report.length(MIDDLE)}, causal:", "", *small]
    gate = report.gate_table(record["rows"])
    if gate:
        gate = ["", "The gate, and prefill with it in one CUDA graph, in ms:", "", *gate]
    pool = report.pool_table(record["rows"])
    if pool:
        pool = ["", "`attn_pool`: dense attention that also returns the block map:", "", *pool]
    starred = any(r"\*" in line for line in sparse + dense + small)
    note = ["", "\\* host-bound: the time may be that of the host."] if starred else []
    absent = [
        report.TITLES[name] for name in record.get("unavailable", ()) if name in report.TITLES
    ]
    if absent:
        note += ["", f"Not available in this run, so not compared: {', '.join(absent)}."]
    return "\n".join(
        [
            "Block-sparse attention, TFLOP/s of kept work, as in the figure above:",
            "",
            *sparse,
            "",
            "Without a mask:",
            "",
            *dense,
            *small,
            *pool,
            *gate,
            *note,
        ]
    )


def _span(values: set) -> str:
    return ", ".join(str(value) for value in sorted(values))


def support_section(variants: list[dict]) -> str:
    """README: which operator runs as what, from the rows of csrc/variants.json."""
    lines = [
        "| operator | CUDA | dtypes | head_dim | block_q | block_kv | CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for op in TENSOR_OPS:
        rows = [row for row in variants if row["op"] == op]
        if not rows:
            lines.append(f"| `{op}` | torch operations, no kernel yet | | | | | kernel |")
        for sm in sorted({row["sm"] for row in rows}):
            of_sm = [row for row in rows if row["sm"] == sm]
            spans = [
                _span({row["dtype"] for row in of_sm}),
                _span({row["head_dim"] for row in of_sm}),
            ]
            if all("block_q" in row for row in of_sm):
                spans.append(_span({size for row in of_sm for size in block_q_of(row)}))
                spans.append(_span({size for row in of_sm for size in block_kv_of(row)}))
            else:
                spans += ["any", "any"]
            newer = " and newer" if sm == 80 else ""
            cuda = f"kernel, compute capability {sm // 10}.{sm % 10}{newer}"
            lines.append(f"| `{op}` | {cuda} | {' | '.join(spans)} | kernel |")
    bits = ", ".join(f"`{op}`" for op in BITS_OPS)
    lines.append(f"| {bits} | kernel | | | | | kernel |")
    return "\n".join(lines)


def block_q_of(row: dict) -> list[int]:
    """Query block sizes that a variant serves: attn_pool's kernels also twice their rows."""
    return [row["block_q"]] if row["op"] == "block_sparse_attn" else [64, 128]


def block_kv_of(row: dict) -> list[int]:
    """KV block sizes that a variant serves: 64 and 128 where its KV tile divides them."""
    return [size for size in (64, 128) if size % row["tile_kv"] == 0]


def with_section(text: str, name: str, content: str) -> str:
    """`text` with the part between the markers of `name` replaced; ValueError without markers."""
    start, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"README.md: expected the markers {start} and {end}")
    return f"{before}{start}\n{content}\n{end}{after}"


def generated_readme(text: str, record: dict | None, variants: list[dict]) -> str:
    """README.md as it should be."""
    text = with_section(text, "figure", figure_section(record))
    text = with_section(text, "speed", speed_section(record))
    return with_section(text, "support", support_section(variants))


def stale(record: dict | None, variants: list[dict]) -> list[str]:
    """What does not show the present data, one line each."""
    found = []
    text = README.read_text()
    if generated_readme(text, record, variants) != text:
        found.append("README.md: a generated table is stale")
    for path in (figure_path(name, theme) for name in FIGURES for theme in THEMES):
        drawn = path.read_text() if path.exists() else ""
        if record is not None and figure_digest(record) not in drawn:
            found.append(f"{path.relative_to(ROOT).as_posix()}: drawn from other data")
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    options = parser.parse_args(argv)
    record = newest_record()
    variants = json.loads(VARIANTS.read_text())["kernels"]
    if options.check:
        found = stale(record, variants)
        print("\n".join(found) if found else "README.md and figures show the present data.")
        return 1 if found else 0
    if record is not None:
        for name in FIGURES:
            for theme in THEMES:
                draw(name, record, theme, figure_path(name, theme))
    README.write_text(generated_readme(README.read_text(), record, variants))
    return 0


if __name__ == "__main__":
    sys.exit(main())
