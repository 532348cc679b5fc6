# SPDX-License-Identifier: Apache-2.0
"""`BlockMask` to and from torch's FlexAttention (``torch.nn.attention.flex_attention``).

FlexAttention splits the kept blocks of a row into full ones, computed as they are, and partial
ones, to which it applies a `mask_mod`. Here a block is full iff every token pair in it exists and
is visible: the causal diagonal and the ragged tails are partial.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seer_cuda._block_lists import dense_to_indices
from seer_cuda.block_mask import BITS_PER_WORD, BlockMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


def to_flex(mask: BlockMask, heads_q: int | None = None) -> FlexBlockMask:
    """A FlexAttention BlockMask that computes the same attention.

    Args:
        mask: Any BlockMask. FlexAttention itself wants block sizes that its kernels can tile.
        heads_q: Query heads. Needed where the mask has one row per GQA group (heads_kv heads):
            FlexAttention knows masks of 1 or heads_q heads only, so the rows are repeated.

    Returns:
        A BlockMask on the mask's device, built without a host synchronisation. Its `mask_mod`
        looks the block up in the bits as well: FlexAttention's eager (dense) path evaluates the
        mask_mod only.

    Raises:
        ValueError: heads_q is not a multiple of the mask's heads, or the mask is of packed
            sequences.
    """
    if mask.cu_seqlens_q is not None:
        raise ValueError(
            "seer::to_flex: mask: expected a mask of a batch, got one of packed sequences. "
            "FlexAttention has one length for all; pad the sequences."
        )
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    bits, visible = mask.block_bits, mask.causal_visible()
    dense = mask.to_dense() & visible
    if heads_q is not None and mask.heads not in (1, heads_q):
        if heads_q % mask.heads:
            raise ValueError(
                f"seer::to_flex: heads_q: expected a multiple of the mask's {mask.heads} heads, "
                f"got {heads_q}. Pass the number of query heads of the attention call."
            )
        bits, dense = (x.repeat_interleave(heads_q // mask.heads, 1) for x in (bits, dense))
    whole = _whole_blocks(mask)
    indices, counts = dense_to_indices(dense & ~whole)
    full_indices, full_counts = dense_to_indices(dense & whole)
    return FlexBlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=(mask.block_q, mask.block_kv),
        mask_mod=_mask_mod(mask, bits),
        seq_lengths=(mask.rows_q, mask.rows_kv),
    )


def from_flex(flex: FlexBlockMask, causal: bool = True) -> BlockMask:
    """The kept blocks of a FlexAttention BlockMask: its partial and its full ones together.

    Args:
        flex: The mask. What its `mask_mod` does inside partial blocks cannot be read back.
        causal: Whether the attention is causal inside the kept blocks (bottom-right aligned); with
            False every kept block is attended in full.

    Returns:
        A BlockMask on the same device, with the block sizes and lengths of `flex`.
    """
    rows_q, rows_kv = flex.seq_lengths
    block_q, block_kv = flex.BLOCK_SIZE
    blocks_kv = -(-rows_kv // block_kv)
    from_indices = torch.ops.seer.block_bits_from_indices
    bits = from_indices(_int32(flex.kv_indices), _int32(flex.kv_num_blocks), blocks_kv)
    if flex.full_kv_indices is not None:
        full = _int32(flex.full_kv_indices), _int32(flex.full_kv_num_blocks)
        bits = bits | from_indices(*full, blocks_kv)
    while bits.dim() < 4:
        bits = bits.unsqueeze(0)
    return BlockMask(bits, block_q, block_kv, rows_q, rows_kv, causal)


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32)


def _whole_blocks(mask: BlockMask) -> Tensor:
    """bool ``[blocks_q, blocks_kv]``: every token pair of the block exists and is visible."""
    i = torch.arange(mask.blocks_q, device=mask.device)[:, None]
    j = torch.arange(mask.blocks_kv, device=mask.device)[None, :]
    last_column = (j + 1) * mask.block_kv - 1
    whole = ((i + 1) * mask.block_q <= mask.rows_q) & (last_column < mask.rows_kv)
    if mask.causal:
        whole &= last_column <= i * mask.block_q + (mask.rows_kv - mask.rows_q)
    return whole


def _mask_mod(mask: BlockMask, bits: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    block_q, block_kv, causal = mask.block_q, mask.block_kv, mask.causal
    offset = mask.rows_kv - mask.rows_q
    one_batch, one_head = bits.shape[0] == 1, bits.shape[1] == 1

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        b = b * 0 if one_batch else b
        h = h * 0 if one_head else h
        j = column // block_kv
        word = bits[b, h, row // block_q, j // BITS_PER_WORD]
        kept = ((word >> (j % BITS_PER_WORD)) & 1) == 1
        return kept & (column <= row + offset) if causal else kept

    return mask_mod
