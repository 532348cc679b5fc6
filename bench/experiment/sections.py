# SPDX-License-Identifier: Apache-2.0
"""The generated parts of docs/experiment.md, each from a run's result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.experiment.summary import COUNT, MEAN
from seer_cuda.integrations.transformers._study import DENSE, GATE, ORACLE

# (density, largest ratio of perplexity): what the experiment is to show.
GOALS = ((0.5, 1.003), (0.1, 1.05))


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
            f"- Gates: `{settings['gate']}` with {settings['gate_dim']} channels, {len(distil)} "
            f"seeds; each has {settings['cache']} windows of {settings['context']} tokens that "
            f"the model computes once, and {distil[0]['steps']} steps of "
            f"{settings['distil_batch']} of them at a rate of {settings['distil_lr']:g}, in "
            f"{' / '.join(str(round(one['seconds'])) for one in distil)} s.",
            *(
                f"- Another form of gate, `{name}` with {settings['head_dim']} channels: "
                f"{own['steps']} steps in {own['seconds']:.0f} s."
                for name, own in result["variants"].items()
            ),
            f"- Evaluation: {windows} held-out windows of {settings['context']} tokens; adaptive "
            f"rules calibrated on {settings['validation_windows']} validation windows.",
        ]
    )


def accuracy(result: dict[str, Any]) -> str:
    """Perplexity over the dense model's by method and density."""
    rows = [row for row in result["eval"]["rows"] if _counted(row)]
    dense = next(row for row in result["eval"]["rows"] if row["method"] == DENSE)
    densities = sorted({row["value"] for row in rows}, reverse=True)
    at = {(row["method"], row["value"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
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
    """The gate against each baseline on the same tokens, in both ways of keeping equally much."""
    counts, means = (_gains(result["eval"]["paired"][way]) for way in (COUNT, MEAN))
    return "\n".join(
        [
            "What the gate gains over each method on the same tokens, in 1/1000 nats per token +- "
            "standard error over the windows (windows in which it is better), at an equal count "
            "per row:",
            "",
            counts,
            "",
            "At an equal mean density:",
            "",
            means,
        ]
    )


def _gains(pairs: Sequence[dict[str, Any]]) -> str:
    rows = [row for row in pairs if row["method"] != ORACLE]
    densities = sorted({row["density"] for row in rows}, reverse=True)
    at = {(row["method"], row["density"]): row for row in rows}
    lines = [
        [
            method,
            *(
                f"{1e3 * row['gain']:+.2f} +- {1e3 * row['error']:.2f} "
                f"({row['better']}/{row['windows']})"
                for row in (at[method, density] for density in densities)
            ),
        ]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    return _table(["method", *(f"{density:.0%} kept" for density in densities)], lines)


def findings(result: dict[str, Any]) -> str:
    """What the tables say, in words that follow from the numbers."""
    rows = [row | {"target": row["value"]} for row in result["eval"]["rows"] if _counted(row)]
    pairs = result["eval"]["paired"]
    parts = [
        ("At an equal count per row", rows, pairs[COUNT]),
        ("At an equal mean density", result["eval"]["adaptive"], pairs[MEAN]),
    ]
    return "\n\n".join(
        "\n".join([f"{title}:", "", *_findings(own, paired)]) for title, own, paired in parts
    )


def _counted(row: dict[str, Any]) -> bool:
    """Whether a row is one of the count's."""
    return row["rule"] == "density" and row["method"] != DENSE


def _findings(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> list[str]:
    at = {(row["method"], row["target"]): row for row in rows}
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
                f"({row['ratio_low']:.4f} to {row['ratio_high']:.4f}, {row['kept']:.1%} kept)."
            )
    words = {"better": [], "not told apart": [], "worse": []}
    for row in pairs:
        if row["method"] != ORACLE:
            sure = abs(row["gain"]) > 2 * (row["error"] or 0.0)
            kind = ("better" if row["gain"] > 0 else "worse") if sure else "not told apart"
            words[kind].append(f"{row['method']} at {1 - row['density']:.0%}")
    count = sum(map(len, words.values()))
    better = len(words["better"])
    lines.append(
        f"- Goal of beating every training-free method at every sparsity: the gate is better in "
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
    return lines


def adaptive(result: dict[str, Any]) -> str:
    """Perplexity over the dense model's by method and mean density."""
    rows = result["eval"]["adaptive"]
    densities = sorted({row["target"] for row in rows}, reverse=True)
    at = {(row["method"], row["target"]): row for row in rows}
    methods = sorted({row["method"] for row in rows}, key=lambda m: at[m, densities[-1]]["ratio"])
    names = {"threshold": "threshold", "topp": "top-p", "density": "count"}
    ratios = [[m, *(_ratio(at[m, density]) for density in densities)] for m in methods]
    kept = [
        [m, *(f"{at[m, d]['kept']:.1%}, {names[at[m, d]['rule']]}" for d in densities)]
        for m in methods
    ]
    head = ["method", *(f"mean of {density:.0%}" for density in densities)]
    return "\n".join(
        [
            "Perplexity over that of the dense model, +- the standard error over the windows:",
            "",
            _table(head, ratios),
            "",
            "Share of the visible blocks that was kept on these windows, and the rule that the "
            "validation windows chose:",
            "",
            _table(head, kept),
        ]
    )


def rules(result: dict[str, Any]) -> str:
    """The gate's numbers of both rules, of the first seed, and what they give."""
    rows = [row for row in result["eval"]["rows"] if row["method"] == GATE and row["target"]]
    lines = [
        [
            f"{row['target']:.0%}",
            f"threshold {row['values'][0]:.3g}"
            if row["rule"] == "threshold"
            else f"top-p {1 - row['values'][0]:.4g}",
            f"{row['kept']:.1%}",
            _ratio(row),
            f"{row['mass']:.1%}",
        ]
        for row in rows
    ]
    head = ("mean density", "rule of the first seed", "kept", "perplexity ratio", "attention kept")
    return _table(head, lines)


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
    table = _table([*head, "end to end", "attention alone"], lines)
    return f"Measured {result['prefill_date']}:\n\n{table}"


def stages(result: dict[str, Any]) -> str:
    """How long each stage took."""
    seconds = result["seconds"]
    rows = [(name, f"{value:.0f}") for name, value in seconds.items()]
    return _table(("stage", "seconds"), [*rows, ("sum", f"{sum(seconds.values()):.0f}")])


SECTIONS = {
    "setup": setup,
    "findings": findings,
    "accuracy": accuracy,
    "adaptive": adaptive,
    "rules": rules,
    "paired": paired,
    "prefill": prefill,
    "stages": stages,
}
