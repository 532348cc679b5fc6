# SPDX-License-Identifier: Apache-2.0
"""The benchmark cases, as data. One case is one row of the record."""

from __future__ import annotations

from dataclasses import dataclass, fields

DENSITIES = (1.0, 0.5, 0.2, 0.1)
LENGTHS = (8192, 32768)
BLOCKS = ((64, 64), (128, 128))


@dataclass(frozen=True)
class Case:
    """One problem: what is computed, on which shapes, under which mask.

    `mask` is how the block mask is made (bench.masks): "dense" (no mask at all), "random" (every
    query head has its own) or "kv_head" (the heads of a GQA group share one). `arch` is the
    kernel family the row belongs to. Lengths count tokens, `density` is the kept fraction of the
    causally visible blocks.
    """

    op: str = "block_sparse_attn"
    arch: str = "sm80"
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
        """Short unique name, what `--only` matches, e.g. `sm80-8k-64x64-random-d0.5`."""
        length = f"{self.rows_q // 1024}k" if self.rows_q % 1024 == 0 else str(self.rows_q)
        block = f"{self.block[0]}x{self.block[1]}"
        return f"{self.arch}-{length}-{block}-{self.mask}-d{self.density:g}"


def case_of(row: dict) -> Case:
    """The case that a row of a record belongs to; the row does not tell its seed."""
    known = {field.name: row[field.name] for field in fields(Case) if field.name in row}
    return Case(**known | {"block": tuple(row["block"])})


def all_cases() -> list[Case]:
    """Every case of the record, in the order in which they run.

    Per length: dense attention once, where the dense peers stand, then the sparse cases grouped
    by block size, so that a peer that compiles per shape compiles once per group.
    """
    cases = []
    for rows in LENGTHS:
        cases.append(Case(rows_q=rows, rows_kv=rows, mask="dense"))
        cases.extend(
            Case(rows_q=rows, rows_kv=rows, block=block, density=density)
            for block in BLOCKS
            for density in DENSITIES
        )
    return cases
