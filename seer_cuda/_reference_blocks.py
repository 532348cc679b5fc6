# SPDX-License-Identifier: Apache-2.0
"""What the specification (`seer_cuda.reference`) says of block bits, visibility and packing."""

from itertools import pairwise

import torch
from torch import Tensor

WORD = 32


# ------------------------------------------------------------------------------- block bits


def pack_block_bits(mask: Tensor) -> Tensor:
    """bool ``[..., blocks_kv]`` to int32 ``[..., ceil(blocks_kv / 32)]``.

    Bit ``j % 32`` of word ``j // 32`` is ``mask[..., j]``; bits at or past blocks_kv are 0.
    """
    blocks_kv = mask.shape[-1]
    words = -(-blocks_kv // WORD)
    padded = mask.new_zeros(*mask.shape[:-1], words * WORD)
    padded[..., :blocks_kv] = mask
    place = torch.ones(WORD, dtype=torch.int64, device=mask.device) << torch.arange(
        WORD, device=mask.device
    )
    unsigned = (padded.unflatten(-1, (words, WORD)).to(torch.int64) * place).sum(-1)
    # Bit 31 is the sign of an int32: values from 2^31 on stand for negative numbers.
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def unpack_block_bits(block_bits: Tensor, blocks_kv: int) -> Tensor:
    """int32 ``[..., words]`` to bool ``[..., blocks_kv]``, the inverse of `pack_block_bits`."""
    block = torch.arange(blocks_kv, device=block_bits.device)
    word = block_bits.to(torch.int64)[..., block // WORD]
    return ((word >> (block % WORD)) & 1).bool()


def block_bits_from_indices(indices: Tensor, counts: Tensor, blocks_kv: int) -> Tensor:
    """Block lists (``indices [..., capacity]``, ``counts [...]``, int32) to block bits.

    Row ``x`` keeps block j iff j is among the first ``min(counts[x], capacity)`` entries of
    ``indices[x]``. Any order, repeats are harmless, entries outside [0, blocks_kv) are ignored.
    """
    capacity = indices.shape[-1]
    listed = torch.arange(capacity, device=indices.device) < counts[..., None]
    block = torch.arange(blocks_kv, device=indices.device)
    hits = (indices[..., None] == block) & listed[..., None]
    return pack_block_bits(hits.any(dim=-2))


# ------------------------------------------------------------------------------- visibility


def token_visible(rows_q: int, rows_kv: int, causal: bool, device=None) -> Tensor:
    """bool ``[rows_q, rows_kv]``: with causal, r sees c iff ``c <= r + rows_kv - rows_q``."""
    r = torch.arange(rows_q, device=device)[:, None]
    c = torch.arange(rows_kv, device=device)[None, :]
    return (c <= r + rows_kv - rows_q) if causal else torch.ones_like(c <= r)


def gate_visible(blocks_q: int, blocks_kv: int, causal: bool, device=None) -> Tensor:
    """bool ``[blocks_q, blocks_kv]``: with causal, i sees j iff ``j <= i + blocks_kv - blocks_q``.

    The rule of the gate: the bottom-right alignment of `token_visible`, counted in blocks. It says
    what `reachable_blocks` says only if q and KV have blocks of one size that divides rows_kv -
    rows_q; callers with lengths must see to that.
    """
    return token_visible(blocks_q, blocks_kv, causal, device)


def expand_blocks(mask: Tensor, block_q: int, block_kv: int, rows_q: int, rows_kv: int) -> Tensor:
    """bool ``[..., blocks_q, blocks_kv]`` to tokens: the Kronecker product with ones, cut to size.

    ``expanded[r, c] = mask[r // block_q, c // block_kv]``
    """
    i = torch.arange(rows_q, device=mask.device) // block_q
    j = torch.arange(rows_kv, device=mask.device) // block_kv
    return mask[..., i[:, None], j[None, :]]


# ---------------------------------------------------------------------------------- packing


def spans(cu_seqlens, total, longest):
    """The rows of every packed sequence, inside [0, total) and at most `longest`."""
    edge = [min(max(x, 0), total) for x in cu_seqlens.tolist()]
    return [slice(a, a + min(max(b - a, 0), longest)) for a, b in pairwise(edge)]
