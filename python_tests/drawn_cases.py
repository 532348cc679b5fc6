# SPDX-License-Identifier: Apache-2.0
"""Random problems for every op: what the property tests and tools/fuzz.py draw.

`draw(source, op, device)` gives a case: a dict of plain values, from which drawn_checks builds the
tensors. A source only answers `pick` and `between`, so that one description serves hypothesis,
which shrinks a failing case, and a seeded generator, which repeats case N without the N before it.
"""

import random
from collections.abc import Sequence
from typing import Any, Protocol

import attention
import inputs
import patterns

Case = dict[str, Any]


class Source(Protocol):
    """Where the choices come from."""

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options."""

    def between(self, low: int, high: int) -> int:
        """low <= result <= high."""


class RandomSource:
    """The choices of case `number` of `seed`."""

    def __init__(self, seed: int, number: int):
        self._rng = random.Random(f"{seed}:{number}")

    def pick(self, options):
        return options[self._rng.randrange(len(options))]

    def between(self, low, high):
        return self._rng.randint(low, high)


class HypothesisSource:
    """Choices that hypothesis makes and shrinks; `draw` is that of a composite strategy."""

    def __init__(self, draw):
        self._draw = draw

    def pick(self, options):
        from hypothesis import strategies

        return self._draw(strategies.sampled_from(options))

    def between(self, low, high):
        from hypothesis import strategies

        return self._draw(strategies.integers(low, high))


# The simplest first: hypothesis shrinks towards it.
DTYPES = {
    "cpu": ("float32", "bfloat16", "float16"),
    "cuda": ("bfloat16", "float16"),
}
POISON = (None, None, "nan", "inf", "-inf")
GATE_LAYOUTS = ("plain", "transposed", "gaps", "unaligned")


def draw(source: Source, op: str, device: str, most: int = 300) -> Case:
    """A case of `op` for `device` ("cpu" or "cuda") with about `most` rows at most."""
    return {"op": op, "device": device, **_DRAW[op](source, device, most)}


def _rows(source: Source, most: int, none: bool = True) -> int:
    """A length: few, none among them, around a multiple of 64, or any."""
    kind = source.pick(("few", "edge", "any"))
    if kind == "few":
        return source.between(0 if none else 1, 3)
    if kind == "edge":
        return 64 * source.between(1, max(1, most // 64)) + source.between(-1, 1)
    return source.between(1, most)


def _two_lengths(source: Source, most: int) -> tuple[int, int]:
    """(rows_q, rows_kv): self-attention, a chunk behind a prefix, or any."""
    kind = source.pick(("self", "chunk", "any"))
    rows_q = _rows(source, most)
    if kind == "self":
        return rows_q, rows_q
    rows_kv = _rows(source, most)
    return (min(rows_q, rows_kv), max(rows_q, rows_kv)) if kind == "chunk" else (rows_q, rows_kv)


def _kernel(source: Source, device: str) -> Case:
    """dtype, head_dim, block_q, block_kv that block_sparse_attn serves on the device, and the
    kernel family asked for (0: the op's own choice)."""
    if device == "cpu":
        return {
            "arch": 0,
            "dtype": source.pick(DTYPES["cpu"]),
            "head_dim": source.pick((64, 128, 8 * source.between(1, 32))),
            "block_q": source.pick((64, 128, 32, 16)),
            "block_kv": source.pick((64, 128, 32, 16)),
        }
    family, dtype, head_dim, block_q, block_kv = source.pick(attention.KERNELS)
    shape = {"head_dim": head_dim, "block_q": block_q, "block_kv": block_kv}
    return {"arch": source.pick((0, family)), "dtype": dtype, **shape}


def _attention(source: Source, device: str, most: int) -> Case:
    case = _kernel(source, device)
    case |= {
        "heads_kv": source.between(1, 3),
        "group": source.pick((1, 2, 4, 7)),
        "causal": source.pick((True, False)),
        "scale": source.pick((None, None, 0.0, 1.0, -0.25, 1e-3)),
        "family": source.pick(inputs.FAMILIES),
        "layout": source.pick(inputs.LAYOUTS),
        "poison": source.pick(POISON),
        "seed": source.between(0, 2**31 - 1),
    }
    if source.pick((False, False, True)):
        count = source.between(1, 4)
        lengths = [_two_lengths(source, most // 2) for _ in range(count)]
        # Bounds above the longest sequence are allowed.
        case["spare_rows"] = source.pick((0, 0, 100))
        # Tokens of no sequence at both ends; the CPU refuses them.
        case["slack"] = source.pick((0, inputs.SLACK[device]))
    else:
        lengths = [_two_lengths(source, most)] * source.between(1, 3)
    case["packed"] = "slack" in case
    case["rows_q"], case["rows_kv"] = ([pair[n] for pair in lengths] for n in (0, 1))
    slack = case.get("slack", 0)
    if any(sum(case[rows]) + slack == 0 for rows in ("rows_q", "rows_kv")):
        case["arch"] = 0  # a family asked for by name may refuse empty tensors
    return case


def _block_sparse_attn(source: Source, device: str, most: int) -> Case:
    case = _attention(source, device, most)
    case["mask"] = source.pick(("none", "noise", *patterns.PATTERNS))
    case["mask_heads"] = source.pick(("one", "kv", "q"))
    case["mask_batch"] = source.pick(("one", "own"))
    case["mask_layout"] = source.pick(("plain", "transposed", "gaps"))
    case["spare_words"] = source.pick((0, 1, 3))
    return case


def _attn_pool(source: Source, device: str, most: int) -> Case:
    case = _attention(source, device, most)
    if device == "cuda" and source.pick((False, False, False, True)):
        case |= {"arch": 0, "head_dim": 8 * source.between(1, 32)}  # runs as torch operations
    return case | {"per_token": source.pick((False, True)), "reduce": source.pick((0, 1))}


def _attn_pool_gradient(source: Source, device: str, most: int) -> Case:
    case = _kernel(source, device)
    rows_q, rows_kv = (max(1, rows) for rows in _two_lengths(source, most // 2))
    return case | {
        "heads_kv": source.between(1, 2),
        "group": source.pick((1, 2, 3)),
        "causal": source.pick((True, False)),
        "layout": source.pick(inputs.LAYOUTS),
        "batch": source.between(1, 2),
        "rows_q": rows_q,
        "rows_kv": rows_kv,
        "seed": source.between(0, 2**31 - 1),
    }


def _gate_dtype(source: Source, device: str) -> str:
    """float32 on CUDA runs as torch operations."""
    return source.pick((*DTYPES[device], "float32"))


def _pool_gate(source: Source, device: str, most: int) -> Case:
    pools = source.between(1, 7)
    head_dim = source.pick((64, 128, source.between(1, 80)))
    gate_dim = source.pick((None, 64, 128, source.between(1, 80)))
    heads = source.between(1, 4)
    width = gate_dim or head_dim * pools.bit_count()
    return {
        "dtype": _gate_dtype(source, device),
        "pools": pools,
        "head_dim": head_dim,
        "gate_dim": gate_dim,
        "heads": heads,
        "heads_out": heads * source.pick((1, 2, 4, 7)) if gate_dim else heads,
        "rotary": source.pick((None, width // 2, source.between(0, width // 2))),
        "rotary_batch": source.pick(("none", "one", "own")),
        "batch": source.between(1, 3),
        "rows": _rows(source, 4 * most),
        "block": source.pick((64, 128, source.between(1, 200))),
        "layout": source.pick(GATE_LAYOUTS),
        "seed": source.between(0, 2**31 - 1),
    }


def _gates(source: Source, device: str, most: int) -> Case:
    case = {
        "dtype": _gate_dtype(source, device),
        "gate_dim": source.pick((64, 128, source.between(1, 200))),
        "heads_k": source.between(1, 3),
        "group": source.pick((1, 2, 4, 7)),
        "batch": source.between(1, 2),
        "causal": source.pick((True, False)),
        "scale": source.pick((None, None, 1.0, -0.5, 0.0)),
        "layout": source.pick(GATE_LAYOUTS),
        "seed": source.between(0, 2**31 - 1),
    }
    blocks_q = source.between(0, max(1, most // 6))
    case["blocks_q"] = blocks_q
    case["blocks_kv"] = source.pick((blocks_q, source.between(0, max(1, most // 2))))
    return case


def _gate_scores(source: Source, device: str, most: int) -> Case:
    return _gates(source, device, most) | {"values": source.pick(("normal", "nan"))}


def _gate_select(source: Source, device: str, most: int) -> Case:
    case = _gates(source, device, most)
    method = source.between(0, 3)
    blocks = max(1, case["blocks_kv"])
    value = source.pick(
        (
            (0.0, 1e-3, 0.02, 1 / blocks, 0.5, 1.0),
            (1.0, 2.0, 7.0, float(source.between(1, blocks)), 1000.0),
            (0.1, 0.5, 1.0, source.between(1, 1000) / 1000),
            (0.3, 0.9, 1.0, source.between(1, 1000) / 1000),
        )[method]
    )
    return case | {
        "values": source.pick(("normal", "sharp", "flat", "nan", "ties")),
        "method": method,
        "value": value,
        "sink": source.pick((0, 0, 1, 3)),
        "local": source.pick((0, 0, 1, 2, 40)),
        "dense_last_rows": source.pick((0, 0, 1, 2)),
    }


def _gate_scores_gradient(source: Source, device: str, most: int) -> Case:
    case = _gates(source, device, most)
    return case | {"blocks_q": case["blocks_q"] + 1, "blocks_kv": case["blocks_kv"] + 1}


def _block_bits(source: Source, device: str, most: int) -> Case:
    return {
        "leading": [source.between(0, 5) for _ in range(source.between(0, 3))],
        "blocks_kv": source.pick((source.between(0, 70), source.between(0, 40 * most))),
        "density": source.pick((0.4, 0.0, 1.0, 0.02)),
        "layout": source.pick(("plain", "every other", "flipped", "expanded")),
        "spare_words": source.between(0, 2),
        "capacity": source.between(0, 80),
        "seed": source.between(0, 2**31 - 1),
    }


_DRAW = {
    "block_sparse_attn": _block_sparse_attn,
    "attn_pool": _attn_pool,
    "attn_pool gradient": _attn_pool_gradient,
    "pool_gate": _pool_gate,
    "gate_scores": _gate_scores,
    "gate_scores gradient": _gate_scores_gradient,
    "gate_select": _gate_select,
    "block_bits": _block_bits,
}
OPS = tuple(_DRAW)
