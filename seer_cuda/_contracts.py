# SPDX-License-Identifier: Apache-2.0
"""Contracts that several public functions check before they call an op."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from seer_cuda.block_mask import BlockMask


def ceil_div(count: int, size: int) -> int:
    """``ceil(count / size)`` for ints and symbolic ints."""
    return (count + size - 1) // size


def check_block(op: str, name: str, size: int) -> None:
    """ValueError unless a block has tokens."""
    if size < 1:
        raise ValueError(
            f"seer::{op}: {name}: expected at least 1 token per block, got {size}. Use 64 or 128."
        )


def check_counts(op: str, remedy: str, **counts: int) -> None:
    """ValueError if a count is negative."""
    for name, count in counts.items():
        if count < 0:
            raise ValueError(
                f"seer::{op}: {name}: expected a count of at least 0, got {count}. {remedy}"
            )


def check_rows(op: str, name: str, rows: int) -> None:
    """ValueError if a number of tokens is negative."""
    check_counts(op, "Pass the number of tokens.", **{name: rows})


def agree(name: str, given: int | None, mask_has: int) -> int:
    """The mask's value of a setting of `block_sparse_attn`; ValueError if another one is given."""
    if given is not None and given != mask_has:
        raise ValueError(
            f"seer::block_sparse_attn: {name}: expected {mask_has}, as the BlockMask has, got "
            f"{given}. Leave it out, or build the mask for it."
        )
    return mask_has


def check_mask_lengths(
    mask: BlockMask, q: Tensor, k: Tensor, packed_rows: tuple[int, int] | None
) -> None:
    """ValueError unless the mask has as many blocks as q and k.

    packed_rows: (max_rows_q, max_rows_kv) of packed sequences; None: q and k have a batch
    dimension and their lengths are in their shapes.
    """
    if packed_rows is None and (q.dim() == 3 or k.dim() == 3):
        raise ValueError(
            "seer::block_sparse_attn: cu_seqlens_q: expected int32 [batch + 1] with packed q "
            f"{list(q.shape)} and k {list(k.shape)}, got None. Packed q needs cu_seqlens_q and "
            "cu_seqlens_kv; otherwise add the batch dimension."
        )
    rows_q, rows_kv = (q.shape[1], k.shape[1]) if packed_rows is None else packed_rows
    blocks = ceil_div(rows_q, mask.block_q), ceil_div(rows_kv, mask.block_kv)
    if (mask.blocks_q, mask.blocks_kv) != blocks:
        raise ValueError(
            f"seer::block_sparse_attn: mask: expected {blocks[0]} x {blocks[1]} blocks for "
            f"{rows_q} x {rows_kv} rows, got {mask.blocks_q} x {mask.blocks_kv}. Build the mask "
            "for these lengths and block sizes."
        )


def rows_of_blocks(op: str, name: str, rows: int | None, block: int, blocks: int) -> int:
    """Rows of one axis, by default whole blocks; ValueError unless they make `blocks` blocks."""
    if rows is None:
        return blocks * block
    if ceil_div(rows, block) != blocks:
        raise ValueError(
            f"seer::{op}: {name}: expected rows that make {blocks} blocks of {block}, got {rows}. "
            "Pass the token count that these blocks were pooled from."
        )
    return rows


def check_gate_alignment(
    op: str, rows_q: int, rows_kv: int, block_q: int, block_kv: int, names: str
) -> None:
    """ValueError unless the gate's causal rule on blocks is the rule on tokens.

    The gate counts in blocks: i sees j iff ``j <= i + blocks_kv - blocks_q``. That is the rule on
    tokens iff query blocks and KV blocks have one size and query row 0 starts a KV block. names:
    what the caller calls the block sizes.
    """
    if block_q != block_kv:
        raise ValueError(
            f"seer::{op}: {names}: expected equal blocks of q and KV with causal, got {block_q} "
            f"and {block_kv}. Use one block size, or select.from_scores, which counts in tokens."
        )
    if (rows_kv - rows_q) % block_q:
        raise ValueError(
            f"seer::{op}: rows_q: expected queries that start at a multiple of block = {block_q} "
            f"with causal, got rows_kv - rows_q = {rows_kv} - {rows_q} = {rows_kv - rows_q}. "
            "Start chunks at multiples of the block."
        )


def check_forced(op: str, sink: int, local: int, dense_last_rows: int) -> None:
    """ValueError if a count of blocks that are always kept is negative."""
    counts = {"sink": sink, "local": local, "dense_last_rows": dense_last_rows}
    check_counts(op, "Use 0 to force nothing.", **counts)
