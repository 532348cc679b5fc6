# SPDX-License-Identifier: Apache-2.0
"""Tables of a record, as text for the terminal and as Markdown for the README."""

from __future__ import annotations

from bench.cases import ATTENTION, ATTN_POOL, GATE_OPS, case_of

OURS = "seer_cuda"
# Kernel families, the newest first.
FAMILIES = {"sm90": "seer_cuda (Hopper)", "sm80": "seer_cuda (portable)"}
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
    "seer_triton": "SeerAttention (Triton)",
}
# Peers of the gate; those of TITLES have colours in the figure.
GATE_TITLES = {"gate_eager": "eager torch", "gate_compile": "torch.compile"}
# What the README's tables and figure show of a record; other rows differ in one of these.
HEADLINE = {"op": ATTENTION, "heads_q": 32, "heads_kv": 8, "head_dim": 128, "dtype": "bfloat16"}
# What two rows have in common that ask for the same attention but for the mask.
SHAPE = ("op", "batch", "heads_q", "heads_kv", "head_dim", "rows_q", "rows_kv", "dtype", "causal")


def flops_of(row: dict) -> float:
    """The work of a row in FLOP, back from its time and rate."""
    return row["tflops"] * row["ms"] * 1e9


def headline(rows: list[dict], mask: str, **wanted: object) -> list[dict]:
    """Rows of the headline's heads and type with this kind of mask, and `wanted` fields."""
    wanted = HEADLINE | {"mask": mask} | wanted
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def families(rows: list[dict]) -> list[str]:
    """Kernel families that rows belong to, the newest first."""
    present = {row["arch"] for row in rows}
    return [family for family in FAMILIES if family in present]


def peers_in(rows: list[dict]) -> list[str]:
    """Peers that were timed in any of the rows, in the order of TITLES."""
    return [name for name in TITLES if any(name in row["peers"] for row in rows)]


def dense_row(row: dict, rows: list[dict]) -> dict | None:
    """The row of dense attention with peers that has the shape of `row`, if there is one."""
    for other in rows:
        same = all(other[key] == row[key] for key in SHAPE)
        if same and other["mask"] == "dense" and other["peers"]:
            return other
    return None


def dense_speedup(row: dict, rows: list[dict]) -> float | None:
    """How many times faster than the fastest peer without a mask, same shape; None if not timed."""
    dense = dense_row(row, rows)
    best = best_peer(dense) if dense else None
    return best[1] / row["ms"] if best else None


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


def copy_share(row: dict) -> float | None:
    """Our rate over that of a device copy of as many bytes, where one was timed."""
    return row["gbps"] / row["copy_gbps"] if "copy_gbps" in row else None


def row_line(row: dict) -> str:
    """A row in one line: our time and rate, the ratio to the best peer (above 1: we are faster),
    the rates of all. Rows of the gate: GB/s, and the peers' times."""
    best = best_peer(row)
    peers = sorted(row["peers"], key=row["peers"].get)
    if row["op"] == ATTENTION:
        of_peers = [f"{name} {peer_tflops(row, name):.0f}" for name in peers]
    else:
        of_peers = [f"{name} {row['peers'][name]:.3f} ms" for name in peers]
    if "dense_ms" in row:
        of_peers.append(f"{row['ms'] / row['dense_ms']:.3f}x our dense")
    if "extra_mb" in row:
        of_peers.append(f"{row['extra_mb']:.0f} MB beyond the results")
    if share := copy_share(row):
        of_peers.append(f"{share:.0%} of a copy")
    rate = row.get("tflops", row.get("gbps"))
    return (
        f"{case_of(row).name:38} {row['ms']:9.3f} {row['ms_burst']:9.3f}"
        + (f" {rate:8.1f}" if rate else f" {'-':>8}")
        + (f" {best[1] / row['ms']:6.2f}x" if best else f" {'-':>7}")
        + "".join(f"  {text}" for text in of_peers)
        + "".join(f"  host-bound: {name}" for name in host_bound(row))
    )


def head_lines() -> list[str]:
    """The head above lines of `row_line`."""
    head = f"{'case':38} {'ms':>9} {'burst':>9} {'TFLOP/s':>8} {'vs best':>7}  peers, TFLOP/s"
    return [head, "-" * len(head)]


def launch_lines(launch: dict[str, dict]) -> list[str]:
    """One line per problem of `bench.launch`."""
    return [
        f"launch, {name}, us: {cost['call_us']:.1f} from the call to completion = kernel "
        f"{cost['kernel_us']:.1f} + {cost['overhead_us']:.1f}; host {cost['host_us']:.1f} a call; "
        f"back to back {cost['stream_us']:.1f} a call"
        for name, cost in launch.items()
    ]


def _table(header: list[str], lines: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell or "-" for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *map(line, lines)]


def _rates(row: dict, of_family: dict[str, dict], kinds: list[str], peers: list[str]) -> list[str]:
    """Cells with the TFLOP/s of our families and of the peers; a star: host-bound."""
    cells = []
    for kind in kinds:
        mine = of_family.get(kind)
        star = r"\*" if mine and OURS in host_bound(mine) else ""
        cells.append(f"{mine['tflops']:.0f}{star}" if mine else "")
    for name in peers:
        rate = peer_tflops(row, name)
        star = r"\*" if name in host_bound(row) else ""
        cells.append(f"{rate:.0f}{star}" if rate else "")
    return cells


def _ratio(row: dict) -> str:
    """Cell: how many times faster than the best peer."""
    best = best_peer(row)
    if best is None:
        return ""
    star = r"\*" if {OURS, best[0]} & set(host_bound(row)) else ""
    return f"{best[1] / row['ms']:.2f}x{star}"


def sparse_table(rows: list[dict], rows_kv: int, blocks: list[tuple[int, int]]) -> list[str]:
    """TFLOP/s over block size and density at one length, ours by family, and the peers'."""
    chosen = headline(rows, "random", rows_kv=rows_kv, causal=True)
    kinds, peers = families(chosen), peers_in(chosen)
    header = ["blocks", "kept", *(FAMILIES[kind] for kind in kinds)]
    header += [*(TITLES[name] for name in peers), "against the best peer"]
    header += ["against the best dense attention"]
    lines = []
    for block in blocks:
        of_block = [row for row in chosen if tuple(row["block"]) == block]
        for density in sorted({row["density"] for row in of_block}, reverse=True):
            same = {row["arch"]: row for row in of_block if row["density"] == density}
            row = same[next(kind for kind in kinds if kind in same)]
            dense = dense_speedup(row, rows)
            cells = [f"{block[0]}x{block[1]}", f"{density:.0%}", *_rates(row, same, kinds, peers)]
            lines.append([*cells, _ratio(row), f"{dense:.1f}x" if dense else ""])
    return _table(header, lines)


def dense_table(rows: list[dict]) -> list[str]:
    """TFLOP/s of attention without a mask, ours by family, and the peers'."""
    chosen = headline(rows, "dense")
    kinds, peers = families(chosen), peers_in(chosen)
    header = ["dense", *(FAMILIES[kind] for kind in kinds), *(TITLES[name] for name in peers)]
    lines = []
    for causal in (True, False):
        of_kind = [row for row in chosen if row["causal"] == causal]
        for rows_kv in sorted({row["rows_kv"] for row in of_kind}):
            same = {row["arch"]: row for row in of_kind if row["rows_kv"] == rows_kv}
            row = same[next(kind for kind in kinds if kind in same)]
            name = f"{length(rows_kv)}, {'causal' if causal else 'not causal'}"
            lines.append([name, *_rates(row, same, kinds, peers), _ratio(row)])
    return _table([*header, "against the best peer"], lines)


def small_head_table(rows: list[dict], rows_kv: int) -> list[str]:
    """TFLOP/s at head_dim 64 and one length, without a mask and over density; none: no rows."""
    shape = {"head_dim": 64, "rows_kv": rows_kv, "causal": True}
    masks = {"no mask": "dense", "64x64": "random"}
    chosen = {title: headline(rows, mask, **shape) for title, mask in masks.items()}
    every = [row for of_mask in chosen.values() for row in of_mask]
    if not every:
        return []
    kinds, peers = families(every), peers_in(every)
    header = ["head_dim 64", "kept", *(FAMILIES[kind] for kind in kinds)]
    header += [*(TITLES[name] for name in peers), "against the best peer"]
    lines = []
    for title, of_mask in chosen.items():
        for density in sorted({row["density"] for row in of_mask}, reverse=True):
            same = {row["arch"]: row for row in of_mask if row["density"] == density}
            row = same[next(kind for kind in kinds if kind in same)]
            rates = _rates(row, same, kinds, peers)
            lines.append([title, f"{density:.0%}", *rates, _ratio(row)])
    return _table(header, lines)


def gate_table(rows: list[dict]) -> list[str]:
    """Times of the gate and of what is made of it; empty without such rows."""
    chosen = [row for row in rows if row["op"] in GATE_OPS]
    titles = TITLES | GATE_TITLES
    peers = [name for name in titles if any(name in row["peers"] for row in chosen)]
    header = ["gate", "tokens", "how", "ms", "GB/s", "of a copy", *(titles[name] for name in peers)]
    lines = []
    for row in chosen:
        share = copy_share(row)
        kept = f", {row['density']:.0%} kept" if row["density"] != 1 else ""
        cells = [f"`{row['op']}`", length(row["rows_kv"]), row.get("pools", row["mask"]) + kept]
        cells += [f"{row['ms']:.3f}", f"{row['gbps']:.0f}" if "gbps" in row else ""]
        cells.append(f"{share:.0%}" if share else "")
        cells += [f"{row['peers'][name]:.3f}" if name in row["peers"] else "" for name in peers]
        lines.append(cells)
    return _table(header, lines) if lines else []


def pool_table(rows: list[dict]) -> list[str]:
    """Times of attn_pool, what the map costs beyond dense attention; empty without such rows."""
    chosen = [row for row in rows if row["op"] == ATTN_POOL]
    peers = [name for name in TITLES if any(name in row["peers"] for row in chosen)]
    header = ["map", "tokens", "ms", "TFLOP/s", "our dense attention", "extra memory"]
    header += [TITLES[name] + (" (no map)" if name in DENSE_PEERS else "") for name in peers]
    lines = []
    for row in chosen:
        different = [] if row["head_dim"] == 128 else [f"head_dim {row['head_dim']}"]
        different += [] if row["block"] == [64, 64] else ["x".join(map(str, row["block"]))]
        cells = [", ".join([f"`{row['pools']}`", *different]), length(row["rows_kv"])]
        cells += [f"{row['ms']:.2f}", f"{row['tflops']:.0f}"]
        cells.append(f"{row['ms'] / row['dense_ms']:.2f}x" if "dense_ms" in row else "")
        cells.append(f"{row['extra_mb']:.0f} MB" if "extra_mb" in row else "")
        for name in peers:
            if name not in row["peers"]:
                cells.append("")
                continue
            cell = f"{row['peers'][name]:.2f} ms"
            extra = row.get("peers_extra_mb", {}).get(name, 0.0)
            cells.append(cell if name in DENSE_PEERS else f"{cell}, {extra:.0f} MB")
        lines.append(cells)
    return _table(header, lines) if lines else []
