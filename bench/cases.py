# SPDX-License-Identifier: Apache-2.0
"""The benchmark cases, as data. One case is one row of the record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from bench.source import ROOT

VARIANTS = ROOT / "csrc" / "variants.json"
PORTABLE = "sm80"
DENSITIES = (1.0, 0.5, 0.2, 0.1)
BLOCKS = ((64, 64), (128, 128))
SHORT, MIDDLE, LONG = 8192, 32768, 131072
ATTENTION = "block_sparse_attn"
ATTN_POOL = "attn_pool"  # its cases: bench.pool
# Attention of published models: query heads, KV heads, head_dim.
MODELS = {
    "llama-3.1-8b": (32, 8, 128),
    "llama-3.1-70b": (64, 8, 128),
    "llama-3.2-1b": (32, 8, 64),
    "qwen2.5-7b": (28, 4, 128),
    "qwen2.5-32b": (40, 8, 128),
    "qwen3-0.6b": (16, 8, 128),
    "qwen3-8b": (32, 8, 128),
    "qwen3-14b": (40, 8, 128),
    "qwen3-32b": (64, 8, 128),
    "qwen3-30b-a3b": (32, 4, 128),
}
MODEL_LENGTHS = tuple(1024 * 2**power for power in range(2, 9))  # 4k to 256k
# Operators of the gate and what is made of them (bench.gate).
GATE_OPS = ("pool_gate", "gate_select", "gate_mask", "sparse_prefill")


@dataclass(frozen=True)
class Case:
    """One problem: what is computed, on which shapes, under which mask.

    `mask` is how the block mask is made (bench.masks): "dense" (no mask at all), "random" (every
    query head has its own), "kv_head" (random, the heads of a GQA group share one) or "structured"
    (sink, local window, stripes); in cases of the gate it is the rule by which the gate selects,
    and `pools` is what pool_gate pools, or what attn_pool's map holds. `arch` is the kernel family
    that runs (of the attention, for the gate). Lengths count tokens, `density` is the kept fraction
    of the causally visible blocks.
    """

    op: str = ATTENTION
    arch: str = PORTABLE
    batch: int = 1
    heads_q: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    rows_q: int = 8192
    rows_kv: int = 8192
    dtype: str = "bfloat16"
    causal: bool = True
    block: tuple[int, int] = (64, 64)
    density: float = 1.0
    mask: str = "random"
    pools: str = ""
    seed: int = 0

    @property
    def blocks_q(self) -> int:
        """Number of query blocks."""
        return -(-self.rows_q // self.block[0])

    @property
    def blocks_kv(self) -> int:
        """Number of KV blocks."""
        return -(-self.rows_kv // self.block[1])

    @property
    def name(self) -> str:
        """Short unique name, what `--only` matches, e.g. `sm90-8k-64x64-random-d0.5` or
        `sm90-32k-hd64-noncausal-64x64-dense-d1`: what is not the default stands before the block.
        Cases of other operators name it, and how it pools or selects, e.g.
        `sm90-gate_mask-32k-threshold`, `sm90-attn_pool-32k-max`.
        """
        parts = [self.arch] if self.op == ATTENTION else [self.arch, self.op]
        parts.append(f"{self.rows_q // 1024}k" if self.rows_q % 1024 == 0 else str(self.rows_q))
        if (self.heads_q, self.heads_kv) != (32, 8):
            parts.append(f"h{self.heads_q}-{self.heads_kv}")
        if self.head_dim != 128:
            parts.append(f"hd{self.head_dim}")
        if self.dtype != "bfloat16":
            parts.append(self.dtype)
        if not self.causal:
            parts.append("noncausal")
        if self.op == ATTN_POOL and self.block != (64, 64):
            parts.append("x".join(map(str, self.block)))
        if self.op != ATTENTION:
            kept = [f"d{self.density:g}"] if self.density != 1 else []
            return "-".join([*parts, self.pools or self.mask, *kept])
        return "-".join([*parts, "x".join(map(str, self.block)), self.mask, f"d{self.density:g}"])


def case_of(row: dict) -> Case:
    """The case that a row of a record belongs to; the row does not tell its seed."""
    known = {field.name: row[field.name] for field in fields(Case) if field.name in row}
    return Case(**known | {"block": tuple(row["block"])})


def newest_family(capability: tuple[int, int]) -> str:
    """The kernel family that calls run by default on a GPU of this compute capability: its own
    where csrc/variants.json has one, else the portable one."""
    own = 10 * capability[0] + capability[1]
    kernels = json.loads(VARIANTS.read_text())["kernels"]
    return f"sm{own}" if own in {row["sm"] for row in kernels} else PORTABLE


def _dense(rows: int, **different: object) -> Case:
    return Case(rows_q=rows, rows_kv=rows, mask="dense", **different)


def _sparse(rows: int, density: float, **different: object) -> Case:
    return Case(rows_q=rows, rows_kv=rows, density=density, **different)


def _by_density(rows: int, **different: object) -> list[Case]:
    return [_sparse(rows, density, **different) for density in DENSITIES]


def _gate_cases() -> list[Case]:
    """The gate at the sizes of an 8B model. What is not timed at every length costs the same per
    token at all of them, or is timed within gate_mask."""

    def case(op: str, rows: int, mask: str = "threshold", **different: object) -> Case:
        return Case(op=op, rows_q=rows, rows_kv=rows, mask=mask, **different)

    cases = [case("pool_gate", MIDDLE, "none", pools=pools) for pools in ("avg", "maxminavg")]
    cases += [case("gate_mask", rows) for rows in (SHORT, MIDDLE, LONG)]
    cases += [case("gate_select", LONG), case("gate_select", LONG, "density", density=0.1)]
    return [*cases, case("sparse_prefill", MIDDLE, "density", density=0.1)]


def _pool_cases() -> list[Case]:
    """Dense attention with its block map."""

    def case(rows: int, pools: str = "max", **different: object) -> Case:
        return _dense(rows, op=ATTN_POOL, pools=pools, **different)

    cases = [case(rows) for rows in (SHORT, MIDDLE, LONG)]
    cases += [case(MIDDLE, "sum"), case(MIDDLE, "per_token")]
    return [*cases, case(MIDDLE, block=(128, 128)), case(MIDDLE, head_dim=64)]


def all_cases(family: str) -> list[Case]:
    """Every case of the record of a GPU whose default family is `family`, in the order in which
    they run; where that is not the portable family, some are repeated with it at the end.

    The headline comes first. Sparse cases stand together by block size, so that a peer that
    compiles per shape compiles once per group.
    """
    cases = []
    for rows in (MIDDLE, SHORT):
        cases += [_dense(rows), _dense(rows, causal=False)]
        for block in BLOCKS:
            cases += _by_density(rows, block=block)
    cases.append(_dense(LONG))
    cases += [_sparse(LONG, 0.1, block=block) for block in BLOCKS]
    for mask in ("kv_head", "structured"):
        cases += [_sparse(MIDDLE, density, mask=mask) for density in (0.2, 0.1)]
    cases += [_dense(MIDDLE, head_dim=64), *_by_density(MIDDLE, head_dim=64)]
    cases += [_dense(MIDDLE, dtype="float16"), _sparse(MIDDLE, 0.2, dtype="float16")]
    cases += [*_pool_cases(), *_gate_cases()]

    cases = [replace(case, arch=family) for case in cases]
    if family != PORTABLE:
        cases.append(_dense(MIDDLE))
        for block in BLOCKS:
            cases += _by_density(MIDDLE, block=block)
    return cases


def model_cases(family: str, models: Sequence[str] = tuple(MODELS)) -> list[Case]:
    """Causal attention of models at 4k to 256k tokens: without a mask, and random masks that keep
    50, 20 and 10 %. Models of one shape share their cases.

    Raises:
        ValueError: a model that MODELS does not have.
    """
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        raise ValueError(
            f"--models: expected some of {', '.join(MODELS)}, got {', '.join(unknown)}. Leave the "
            "names out for all of them."
        )
    shapes = dict.fromkeys(MODELS[name] for name in models)
    return [
        case
        for heads_q, heads_kv, head_dim in shapes
        for rows in MODEL_LENGTHS
        for shape in [
            {"arch": family, "heads_q": heads_q, "heads_kv": heads_kv, "head_dim": head_dim}
        ]
        for case in [
            _dense(rows, **shape),
            *(_sparse(rows, density, **shape) for density in DENSITIES[1:]),
        ]
    ]
