# SPDX-License-Identifier: Apache-2.0
"""Tables of a record, as text for the terminal and as Markdown for the README."""

from __future__ import annotations

OURS = "seer_cuda"
# From this share of its time between events on, a launch's host time may be what was measured.
HOST_SHARE = 0.9
# Peers that know no block mask: their speed is set against ours as a rate (TFLOP/s) of the same
# length's dense row.
DENSE_PEERS = ("sdpa_flash", "sdpa_cudnn", "fa3")
TITLES = {
    "sdpa_flash": "FlashAttention-2",
    "sdpa_cudnn": "cuDNN",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
    "flex": "FlexAttention",
    "cudnn_frontend": "cuDNN frontend BSA",
}


def flops_of(row: dict) -> float:
    """The work of a row in FLOP, back from its time and rate."""
    return row["tflops"] * row["ms"] * 1e9


def dense_rows(rows: list[dict]) -> dict[int, dict]:
    """The dense row of each length (rows_kv)."""
    return {row["rows_kv"]: row for row in rows if row["mask"] == "dense"}


def flash_speedup(row: dict, rows: list[dict]) -> float | None:
    """How many times faster than dense FlashAttention-2 of the same length, None if not timed."""
    dense = dense_rows(rows).get(row["rows_kv"])
    ms = dense["peers"].get("sdpa_flash") if dense else None
    return ms / row["ms"] if ms else None


def peer_tflops(row: dict, name: str) -> float | None:
    """A peer's TFLOP/s on the work that the row asks for."""
    ms = row["peers"].get(name)
    return flops_of(row) / ms / 1e9 if ms else None


def host_bound(row: dict) -> list[str]:
    """Whose time in a row may be the host's: it enqueues hardly faster than its kernel runs."""
    times = row["peers"] | {OURS: row["ms"]}
    host = row.get("peers_host", {}) | {OURS: row.get("host_ms", 0.0)}
    return [name for name, ms in times.items() if host.get(name, 0.0) > HOST_SHARE * ms]


def best_peer(row: dict) -> tuple[str, float] | None:
    """Name and ms of the fastest peer of a row."""
    return min(row["peers"].items(), key=lambda item: item[1]) if row["peers"] else None


def length(rows: int) -> str:
    """`32k` for 32768."""
    return f"{rows // 1024}k" if rows % 1024 == 0 else str(rows)


def ratio_lines(rows: list[dict]) -> list[str]:
    """One line per row: time, rate, and the ratios that matter (above 1: we are faster)."""
    head = f"{'case':34} {'ms':>9} {'burst':>9} {'TFLOP/s':>8} {'vs FA2':>7}  best peer"
    lines = [head, "-" * len(head)]
    for row in rows:
        block = "x".join(str(size) for size in row["block"])
        name = f"{row['arch']} {length(row['rows_kv'])} {block} {row['mask']} {row['density']:g}"
        flash = flash_speedup(row, rows)
        best = best_peer(row)
        lines.append(
            f"{name:34} {row['ms']:9.3f} {row['ms_burst']:9.3f} {row['tflops']:8.1f} "
            + (f"{flash:6.2f}x" if flash else f"{'-':>7}")
            + (f"  {best[1] / row['ms']:.2f}x {best[0]} ({best[1]:.3f} ms)" if best else "  -")
            + "".join(f"  host-bound: {name}" for name in host_bound(row))
        )
    return lines


def markdown_table(rows: list[dict], rows_kv: int, block: tuple[int, int]) -> list[str]:
    """Density against time and rate at one length and block size, for the README.

    A star marks a host-bound time, and the ratio of a peer whose time is.
    """
    chosen = [
        row
        for row in rows
        if row["rows_kv"] == rows_kv and tuple(row["block"]) == block and row["mask"] == "random"
    ]
    peers = [name for name in TITLES if any(name in row["peers"] for row in chosen)]
    header = ["density", "ms", "TFLOP/s", "against dense FlashAttention-2"]
    header += [f"against {TITLES[name]}" for name in peers]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in chosen:
        flash = flash_speedup(row, rows)
        bound = host_bound(row)
        star = r"\*" if OURS in bound else ""
        cells = [f"{row['density']:.0%}", f"{row['ms']:.2f}{star}", f"{row['tflops']:.0f}{star}"]
        cells.append(f"{flash:.1f}x" if flash else "not timed")
        for name in peers:
            ms = row["peers"].get(name)
            star = r"\*" if name in bound else ""
            cells.append(f"{ms / row['ms']:.2f}x{star}" if ms else "not timed")
        lines.append("| " + " | ".join(cells) + " |")
    return lines
