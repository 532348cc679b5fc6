# SPDX-License-Identifier: Apache-2.0
"""docs/experiment.md: its tables and figures from the newest result of bench/results/experiment.

What stands between the markers `<!-- generated: NAME -->` and `<!-- end: NAME -->` is written here,
everything else by hand. A digest in the page says which result the figures were drawn from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.experiment.results import EXAMPLE, RESULTS
from bench.figures import with_section
from bench.source import ROOT
from seer_cuda.integrations.transformers._study import GATE, ORACLE

PAGE = ROOT / "docs" / "experiment.md"
IMAGES = ROOT / "docs" / "img"
# (density, largest ratio of perplexity): what the experiment is to show.
GOALS = ((0.5, 1.003), (0.1, 1.05))
FIGURES = ("accuracy", "time", "mask", "training")


def newest(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The result with the latest date."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return max(found, key=lambda result: result["date"], default=None)


def figure(name: str) -> Path:
    """Of the page."""
    return IMAGES / f"experiment_{name}.png"


def digest(result: dict[str, Any]) -> str:
    """Of what the figures are drawn from."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _millions(count: float) -> str:
    return f"{count / 1e6:.1f} M"


def setup(result: dict[str, Any]) -> str:
    """What was trained on what."""
    settings, train = result["settings"], result["train"]
    splits = result["corpus"]["splits"]
    rows = [
        (
            name,
            str(len(own)),
            str(sum(one["files"] for one in own)),
            _millions(sum(one["characters"] for one in own)),
            _millions(sum(one["tokens"] for one in own)),
        )
        for name, own in splits.items()
    ]
    heads_q, heads_kv = settings["heads"]
    phases = ", ".join(f"{share:.0%} at {context}" for context, share in settings["phases"])
    distil = list(result["distil"].values())
    names = ", ".join(f"`{one['package']}`" for one in splits["test"])
    chosen = ", ".join(f"`{one['package']}`" for one in splits["validation"])
    windows = next(row["windows"] for row in result["eval"]["rows"])
    return "\n".join(
        [
            _table(("part", "packages", "files", "characters", "tokens"), rows),
            "",
            f"Held out for evaluation: {names}. For choosing: {chosen}.",
            "",
            f"- Model: {_millions(train['parameters'])} parameters, {settings['layers']} layers, "
            f"{heads_q} query and {heads_kv} KV heads of {settings['head_dim']}, a vocabulary of "
            f"{result['corpus']['vocabulary']}.",
            f"- Training: {train['steps']} steps, {_millions(train['tokens'])} tokens in "
            f"{train['seconds'] / 60:.1f} minutes on one {result['gpu']} (torch "
            f"{result['torch']}, {result['date']}); of the time {phases} tokens a window.",
            f"- Gates: {len(distil)} seeds, each {distil[0]['steps']} steps of "
            f"{settings['distil_batch']} windows of {settings['context']} tokens "
            f"({_millions(distil[0]['tokens'])} tokens) in "
            f"{' / '.join(str(round(one['seconds'])) for one in distil)} s.",
            f"- Evaluation: {windows} held-out windows of {settings['context']} tokens.",
        ]
    )


def accuracy(result: dict[str, Any]) -> str:
    """Perplexity over the dense model's by method and density."""
    rows = [row for row in result["eval"]["rows"] if row["rule"] == "density"]
    dense = next(row for row in rows if row["method"] == "dense")
    densities = sorted({row["value"] for row in rows if row is not dense}, reverse=True)
    at = {(row["method"], row["value"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows if row is not dense))
    methods.sort(key=lambda method: at[method, densities[-1]]["ratio"])
    head = ["method", *(f"{density:.0%} kept" for density in densities)]
    ratios, seen = [], []
    for method in methods:
        own = [at[method, density] for density in densities]
        ratios.append([method, *(_ratio(row) for row in own)])
        seen.append([method, *(f"{row['recall']:.1%} / {row['mass']:.1%}" for row in own)])
    return "\n".join(
        [
            f"Perplexity over that of the dense model ({dense['perplexity']:.4f} per token), +- "
            "the standard error over the windows; the gate: mean of the seeds, and the lowest and "
            "highest of them:",
            "",
            _table(head, ratios),
            "",
            "Share of the oracle's blocks that a method keeps (without the diagonal) / share of "
            "the true attention on the kept blocks:",
            "",
            _table(head, seen),
        ]
    )


def _ratio(row: dict[str, Any]) -> str:
    text = f"{row['ratio']:.4f} +- {row['ratio_error']:.4f}"
    if "seeds" in row:
        text = f"**{text}** ({row['ratio_low']:.4f} to {row['ratio_high']:.4f})"
    return text


def paired(result: dict[str, Any]) -> str:
    """The gate against each baseline on the same tokens."""
    rows = [row for row in result["eval"]["paired"] if row["method"] != "oracle"]
    densities = sorted({row["density"] for row in rows}, reverse=True)
    at = {(row["method"], row["density"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for method in methods:
        cells = [at[method, density] for density in densities]
        lines.append(
            [
                method,
                *(
                    f"{1e3 * row['gain']:+.2f} +- {1e3 * row['error']:.2f} "
                    f"({row['better']}/{row['windows']})"
                    for row in cells
                ),
            ]
        )
    return "\n".join(
        [
            "What the gate gains over each method on the same tokens, in 1/1000 nats per token +- "
            "standard error over the windows (windows in which it is better):",
            "",
            _table(["method", *(f"{density:.0%} kept" for density in densities)], lines),
        ]
    )


def findings(result: dict[str, Any]) -> str:
    """What the tables say, in words that follow from the numbers."""
    at = {
        (row["method"], row["value"]): row
        for row in result["eval"]["rows"]
        if row["rule"] == "density"
    }
    lines = []
    for density, most in GOALS:
        row = at.get((GATE, density))
        if row is not None:
            met = "met by" if row["ratio_high"] <= most else "missed by"
            every = sum(ratio <= most for ratio in row["seeds"])
            of = len(row["seeds"])
            seeds = f"all {of} seeds" if every in (0, of) else f"{of - every} of {of} seeds"
            lines.append(
                f"- Goal at {1 - density:.0%} sparsity, a ratio of at most {most:g}: {met} {seeds} "
                f"({row['ratio_low']:.4f} to {row['ratio_high']:.4f})."
            )
    words = {"better": [], "not told apart": [], "worse": []}
    for row in result["eval"]["paired"]:
        if row["method"] != ORACLE:
            sure = abs(row["gain"]) > 2 * (row["error"] or 0.0)
            kind = ("better" if row["gain"] > 0 else "worse") if sure else "not told apart"
            words[kind].append(f"{row['method']} at {1 - row['density']:.0%}")
    count = sum(map(len, words.values()))
    better = len(words["better"])
    lines.append(
        f"- Goal of beating every choice without training at every sparsity: the gate is better in "
        f"{better} of {count} comparisons by more than two standard errors."
    )
    for kind, text in (("not told apart", "Within two standard errors"), ("worse", "Worse than")):
        if words[kind]:
            lines.append(f"- {text}: {', '.join(words[kind])} sparsity.")
    gaps = [
        f"{100 * (row['ratio'] - at[ORACLE, density]['ratio']):+.2f} at {1 - density:.0%}"
        for (method, density), row in at.items()
        if method == GATE
    ]
    lines.append(f"- Distance from the oracle in percent of perplexity: {', '.join(gaps)}.")
    return "\n".join(lines)


def threshold(result: dict[str, Any]) -> str:
    """The threshold rule on the held-out windows."""
    rows = [row for row in result["eval"]["rows"] if row["rule"] == "threshold"]
    chosen = result["eval"]["threshold"]
    lines = [
        [
            f"{row['value']:g}" + (" (chosen)" if row["value"] == chosen else ""),
            f"{row['kept']:.1%}",
            _ratio(row),
            f"{row['mass']:.1%}",
        ]
        for row in rows
    ]
    return _table(["threshold", "kept", "perplexity ratio", "attention kept"], lines)


def prefill(result: dict[str, Any]) -> str:
    """Time of whole prefills."""
    rows = result["prefill"]
    dense = [row for row in rows if row["attention"] != "gates"]
    lines = []
    for row in rows:
        rivals = [r for r in dense if (r["model"], r["tokens"]) == (row["model"], row["tokens"])]
        best = min(rivals, key=lambda rival: rival["ms"])
        gain, inner = best["ms"] / row["ms"], best["attention_ms"] / row["attention_ms"]
        lines.append(
            [
                row["model"],
                f"{row['tokens'] // 1024}k",
                f"gates, {row['kept']:.1%} kept" if "kept" in row else row["attention"],
                f"{row['ms']:.0f}",
                f"{row['attention_ms']:.0f}",
                f"{row['share']:.0%}",
                f"{gain:.2f}x" if row is not best else "",
                f"{inner:.2f}x" if row is not best else "",
            ]
        )
    head = ["model", "tokens", "attention", "ms", "of that attention", "share"]
    return _table([*head, "end to end", "attention alone"], lines)


def stages(result: dict[str, Any]) -> str:
    """How long each stage took."""
    seconds = result["seconds"]
    rows = [(name, f"{value:.0f}") for name, value in seconds.items()]
    return _table(("stage", "seconds"), [*rows, ("sum", f"{sum(seconds.values()):.0f}")])


SECTIONS = {
    "setup": setup,
    "findings": findings,
    "accuracy": accuracy,
    "paired": paired,
    "threshold": threshold,
    "prefill": prefill,
    "stages": stages,
}


def generated(text: str, result: dict[str, Any]) -> str:
    """The page as it should be."""
    for name, section in SECTIONS.items():
        text = with_section(text, name, section(result))
    return with_section(text, "digest", f"<!-- figures of {digest(result)} -->")


def draw(result: dict[str, Any], example: Path) -> None:
    """All figures (matplotlib); the mask only where the run's example still is."""
    from bench.experiment.evaluate import load_example
    from seer_cuda.integrations.transformers import _report

    _report.draw_accuracy(result["eval"]["rows"], figure("accuracy"))
    _report.draw_time(result["times"], figure("time"))
    if example.is_file():
        _report.draw_example(load_example(example), figure("mask"))
    _draw_training(result, figure("training"))


def _draw_training(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    image = Figure(figsize=(10, 3.4), layout="constrained")
    model, gates = image.subplots(1, 2)
    curve = result["train"]["curve"]
    # The first rows would set the scale.
    shown = [row for row in curve if row[0] > 0.02 * curve[-1][0]]
    for context in dict.fromkeys(row[1] for row in shown):
        own = [row for row in shown if row[1] == context]
        model.plot([row[0] for row in own], [row[2] for row in own], label=f"{context:.0f} tokens")
    model.set_xlabel("seconds")
    model.set_title("model: nats per token, training batches", fontsize=10)
    model.legend(frameon=False)
    for seed, own in result["distil"].items():
        gates.plot(*zip(*own["curve"], strict=True), label=f"seed {seed}")
    gates.set_xlabel("step")
    gates.set_yscale("log")
    gates.set_title("gates: loss", fontsize=10)
    gates.legend(frameon=False)
    for axis in (model, gates):
        axis.grid(alpha=0.3)
    image.savefig(path, dpi=120)


def main(out: Path, check: bool) -> int:
    """Rewrites the page and its figures, or says whether they are stale; the exit status.

    out: where `collect` wrote the example, which is too large to be kept with the results.
    """
    result = newest()
    if result is None:
        print(f"{RESULTS.relative_to(ROOT)}: no result")
        return 1
    text = PAGE.read_text()
    wanted = generated(text, result)
    if check:
        fresh = text == wanted and all(figure(name).is_file() for name in FIGURES)
        print(f"{PAGE.relative_to(ROOT)}: {'shows the present result' if fresh else 'stale'}")
        return 0 if fresh else 1
    draw(result, out / EXAMPLE)
    PAGE.write_text(wanted)
    return 0
