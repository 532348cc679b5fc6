# SPDX-License-Identifier: Apache-2.0
"""Reduced test grids: every pair of values of any two axes occurs in at least one case."""

import random
from itertools import combinations, product


def pairwise(axes: dict[str, tuple], *, core: tuple[str, ...] = (), copies: int = 1, seed: int = 0):
    """Cases (dicts) that cover every pair of values of `axes`.

    Every combination of the axes named in `core` occurs `copies` times at least. Greedy: each
    case is the best of a few random ones. The result depends on the arguments alone.
    """
    rng = random.Random(seed)
    names = list(axes)
    open_pairs = {(a, x, b, y) for a, b in combinations(names, 2) for x in axes[a] for y in axes[b]}

    def pairs(case):
        return {(a, case[a], b, case[b]) for a, b in combinations(names, 2)}

    def best(fixed):
        drawn = [{**{n: rng.choice(axes[n]) for n in names}, **fixed} for _ in range(30)]
        chosen = max(drawn, key=lambda case: len(pairs(case) & open_pairs))
        open_pairs.difference_update(pairs(chosen))
        return chosen

    cases = [
        best(dict(zip(core, values, strict=True)))
        for _ in range(copies if core else 0)
        for values in product(*(axes[n] for n in core))
    ]
    while open_pairs:
        a, x, b, y = min(open_pairs, key=repr)
        cases.append(best({a: x, b: y}))
    return cases


def case_id(case: dict) -> str:
    """A short readable test id: bf16-d64-b64x128-causal-..."""
    return "-".join(_word(name, value) for name, value in case.items())


def _word(name, value):
    if name == "dtype":
        return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(value)[6:]]
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    if isinstance(value, tuple):
        return name + "x".join(str(x) for x in value)
    return value if isinstance(value, str) else f"{name}{value}"
