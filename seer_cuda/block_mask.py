# SPDX-License-Identifier: Apache-2.0
"""`BlockMask`: which KV blocks each query block attends to, as packed bits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seer_cuda._block_lists import as_int32, dense_to_indices
from seer_cuda._contracts import ceil_div, check_block, check_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

BITS_PER_WORD = 32


_LEAST = (("block_q", 1), ("block_kv", 1), ("rows_q", 0), ("rows_kv", 0))


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """A block mask and the lengths it is for.

    Attributes:
        block_bits: int32 ``[batch|1, heads_q|heads_kv|1, blocks_q, words]`` with words >=
            ceil(blocks_kv / 32), last dimension contiguous. Bit j % 32 of word j // 32 is set iff
            the query block attends to KV block j. A size of 1 serves the whole batch, or every
            head; heads_kv heads serve each GQA group as a whole.
        block_q: Query tokens per block.
        block_kv: KV tokens per block.
        rows_q: Query tokens (packed sequences: the longest).
        rows_kv: KV tokens (packed sequences: the longest).
        causal: Whether query r sees keys c <= r + rows_kv - rows_q only. Kept blocks are cut
            token-exactly by this rule; blocks that it hides altogether should not be kept.
        cu_seqlens_q, cu_seqlens_kv: int32 ``[sequences + 1]`` each, where the batch is packed: what
            `density`, `validate` and `plot` count each sequence's own blocks with. Attention takes
            its lengths from its own arguments.

    All conversions run on the mask's device without a host synchronisation; `validate`, ``==``
    and ``repr`` read values and therefore wait for the device.

    Raises:
        TypeError: block_bits is not an int32 tensor.
        ValueError: block_bits has not 4 dimensions, a block size is not positive, a length is
            negative, or only one of cu_seqlens_q and cu_seqlens_kv is given.
    """

    block_bits: Tensor
    block_q: int
    block_kv: int
    rows_q: int
    rows_kv: int
    causal: bool = True
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None

    def __post_init__(self) -> None:
        # torch's pytrees rebuild the class around placeholders for tensors and ints.
        if not isinstance(self.block_bits, Tensor):
            return
        if self.block_bits.dtype != torch.int32:
            raise TypeError(
                _text("block_bits", "an int32 tensor", self.block_bits.dtype, _PACK_FIRST)
            )
        if self.block_bits.dim() != 4:
            shape = list(self.block_bits.shape)
            raise ValueError(
                _text("block_bits", "[batch, heads, blocks_q, words]", shape, _PACK_FIRST)
            )
        for name, least in _LEAST:  # every op makes a mask: nothing is called for a right one
            size = getattr(self, name)
            if isinstance(size, int) and size < least:
                check = check_block if least else check_rows
                check("BlockMask", name, size)
        if (self.cu_seqlens_q is None) != (self.cu_seqlens_kv is None):
            missing = "cu_seqlens_q" if self.cu_seqlens_q is None else "cu_seqlens_kv"
            remedy = "Pass both for packed sequences."
            raise ValueError(_text(missing, "both cu_seqlens or neither", None, remedy))

    # ------------------------------------------------------------------------------ shape

    @property
    def batch(self) -> int:
        """Batch size of the bits; 1 may stand for any batch."""
        return self.block_bits.shape[0]

    @property
    def heads(self) -> int:
        """Heads of the bits: heads_q, heads_kv or 1."""
        return self.block_bits.shape[1]

    @property
    def blocks_q(self) -> int:
        """``ceil(rows_q / block_q)``."""
        return ceil_div(self.rows_q, self.block_q)

    @property
    def blocks_kv(self) -> int:
        """``ceil(rows_kv / block_kv)``."""
        return ceil_div(self.rows_kv, self.block_kv)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, blocks_q, blocks_kv)``: the shape of `to_dense`."""
        return self.batch, self.heads, self.blocks_q, self.blocks_kv

    @property
    def device(self) -> torch.device:
        """Where the bits are."""
        return self.block_bits.device

    def causal_visible(self) -> Tensor:
        """bool ``[blocks_q, blocks_kv]``: the block holds a (query, key) pair that is visible.

        With cu_seqlens ``[sequences, 1, blocks_q, blocks_kv]``: of each sequence.
        """
        rows_q, rows_kv = self._lengths()
        i = torch.arange(self.blocks_q, device=self.device)[:, None] * self.block_q
        j = torch.arange(self.blocks_kv, device=self.device) * self.block_kv
        visible = (i < rows_q) & (j < rows_kv)
        if not self.causal:
            return visible
        last_row = (i + self.block_q).clamp_max(rows_q) - 1
        return visible & (j <= last_row + (rows_kv - rows_q))

    def _lengths(self) -> tuple[int, int] | tuple[Tensor, Tensor]:
        """Rows of q and of KV, to be compared with ``[blocks_q, blocks_kv]``."""
        if self.cu_seqlens_q is None or self.cu_seqlens_kv is None:
            return self.rows_q, self.rows_kv
        rows_q, rows_kv = (
            (cu[1:] - cu[:-1]).clamp(0, longest)[:, None, None, None]
            for cu, longest in (
                (self.cu_seqlens_q, self.rows_q),
                (self.cu_seqlens_kv, self.rows_kv),
            )
        )
        return rows_q, rows_kv

    # ----------------------------------------------------------------------- conversions

    @classmethod
    def from_dense(
        cls,
        mask: Tensor,
        block_q: int,
        block_kv: int,
        rows_q: int | None = None,
        rows_kv: int | None = None,
        causal: bool = True,
    ) -> BlockMask:
        """From bool ``[batch|1, heads, blocks_q, blocks_kv]``, True = attend.

        rows_q and rows_kv default to whole blocks; give them where the last block is ragged.

        Raises:
            TypeError: mask is not bool.
            ValueError: mask has not 4 dimensions, or another block count than the lengths give, or
                a block size is not positive.
        """
        check_block("BlockMask", "block_q", block_q)
        check_block("BlockMask", "block_kv", block_kv)
        if mask.dtype != torch.bool:
            raise TypeError(_text("mask", "a bool tensor", mask.dtype, "Compare it: scores > x."))
        if mask.dim() != 4:
            wanted = "[batch, heads, blocks_q, blocks_kv]"
            raise ValueError(_text("mask", wanted, list(mask.shape), "Add the missing dimensions."))
        blocks_q, blocks_kv = mask.shape[2:]
        rows_q = blocks_q * block_q if rows_q is None else rows_q
        rows_kv = blocks_kv * block_kv if rows_kv is None else rows_kv
        wanted = (ceil_div(rows_q, block_q), ceil_div(rows_kv, block_kv))
        if (blocks_q, blocks_kv) != wanted:
            raise ValueError(
                _text(
                    "mask",
                    f"{wanted[0]} x {wanted[1]} blocks for {rows_q} x {rows_kv} rows",
                    f"{blocks_q} x {blocks_kv}",
                    "Match rows_q, rows_kv and the block sizes to it.",
                )
            )
        return cls(torch.ops.seer.pack_block_bits(mask), block_q, block_kv, rows_q, rows_kv, causal)

    def to_dense(self) -> Tensor:
        """bool ``[batch, heads, blocks_q, blocks_kv]``, the bits as they are."""
        return torch.ops.seer.unpack_block_bits(self.block_bits, self.blocks_kv)

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        counts: Tensor,
        block_q: int,
        block_kv: int,
        rows_q: int | None = None,
        rows_kv: int | None = None,
        causal: bool = True,
    ) -> BlockMask:
        """From lists of kept KV blocks, as FlashAttention-4, VSA and FlexAttention use them.

        Args:
            indices: int32 or int64 ``[batch|1, heads, blocks_q, capacity]``, any order. Entries
                outside [0, blocks_kv) are ignored, whatever their size.
            counts: int32 or int64 ``[batch|1, heads, blocks_q]``: how many entries of a row count.
            block_q, block_kv, causal: As the attributes.
            rows_q: Default ``blocks_q * block_q``.
            rows_kv: Default ``capacity * block_kv``, right for lists padded to full width.

        Raises:
            TypeError: indices or counts are not integers of 32 or 64 bits.
            ValueError: indices has not 4 dimensions, or block_kv is not positive.
        """
        check_block("BlockMask", "block_kv", block_kv)
        for name, tensor in (("indices", indices), ("counts", counts)):
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(_text(name, "int32 or int64", tensor.dtype, "Convert it."))
        if indices.dim() != 4:
            wanted = "[batch, heads, blocks_q, capacity]"
            raise ValueError(
                _text("indices", wanted, list(indices.shape), "Add the missing dimensions.")
            )
        rows_q = indices.shape[2] * block_q if rows_q is None else rows_q
        rows_kv = indices.shape[3] * block_kv if rows_kv is None else rows_kv
        blocks_kv = ceil_div(rows_kv, block_kv)
        lists, counts = as_int32(indices, -1, blocks_kv), as_int32(counts, 0, indices.shape[3])
        bits = torch.ops.seer.block_bits_from_indices(lists, counts, blocks_kv)
        return cls(bits, block_q, block_kv, rows_q, rows_kv, causal)

    def to_indices(self) -> tuple[Tensor, Tensor]:
        """(indices, counts): int32 ``[batch, heads, blocks_q, blocks_kv]`` and ``[..., blocks_q]``.

        The kept blocks of a row ascend; the unused tail of the list is 0.
        """
        return dense_to_indices(self.to_dense())

    @classmethod
    def from_flex(cls, flex: FlexBlockMask, causal: bool = True) -> BlockMask:
        """From torch's FlexAttention BlockMask; see `seer_cuda.flex.from_flex`."""
        from seer_cuda.flex import from_flex

        return from_flex(flex, causal)

    def to_flex(self, heads_q: int | None = None) -> FlexBlockMask:
        """As torch's FlexAttention BlockMask; see `seer_cuda.flex.to_flex`."""
        from seer_cuda.flex import to_flex

        return to_flex(self, heads_q)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BlockMask:
        """The same mask on another device."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        return replace(
            self,
            block_bits=self.block_bits.to(device, non_blocking=non_blocking),
            cu_seqlens_q=moved(self.cu_seqlens_q),
            cu_seqlens_kv=moved(self.cu_seqlens_kv),
        )

    def select_heads(self, heads: int | slice | Sequence[int] | Tensor) -> BlockMask:
        """The mask of some heads, still with 4 dimensions.

        A list (or a single int) is copied from the host to the mask's device; a slice, or an index
        tensor on that device, is not.
        """
        if isinstance(heads, int):
            heads = [heads]
        return replace(self, block_bits=self.block_bits[:, heads])

    # --------------------------------------------------------------------------- looking

    def density(self) -> Tensor:
        """float64 ``[batch, heads]``: kept blocks / visible blocks; 0 where nothing is visible.

        With cu_seqlens the batch is that of the sequences.
        """
        visible = self.causal_visible()
        kept = (self.to_dense() & visible).sum((-2, -1))
        return kept.to(torch.float64) / visible.sum((-2, -1)).clamp_min(1)

    def validate(self, heads_q: int | None = None, heads_kv: int | None = None) -> BlockMask:
        """Reads the mask and checks its contents. Waits for the device.

        Args:
            heads_q: Checks the head dimension too: 1, heads_q or heads_kv.
            heads_kv: Default: heads_q.

        Returns:
            The mask itself.

        Raises:
            ValueError: with every mistake: shape of the bits, bits past blocks_kv, kept blocks
                that the causal rule hides altogether, a head dimension that fits no head count.

        Warns:
            UserWarning: rows that see a block but keep none; their output is 0, their lse -inf.
        """
        mistakes = list(self._shape_mistakes(heads_q, heads_kv))
        if not mistakes:
            words = self.block_bits.shape[3]
            every = torch.ops.seer.unpack_block_bits(self.block_bits, words * BITS_PER_WORD)
            dense, past = every[..., : self.blocks_kv], every[..., self.blocks_kv :]
            visible = self.causal_visible()
            empty = visible.any(-1) & ~(dense & visible).any(-1)
            # What lies past a packed sequence is ignored, as in attention.
            exists = replace(self, causal=False).causal_visible()
            counts = [past.sum(), (dense & exists & ~visible).sum(), empty.sum()]
            past_bits, hidden, empty_rows = torch.stack(counts).tolist()
            if past_bits:
                mistakes.append(f"{past_bits} bits are set at or past blocks_kv={self.blocks_kv}")
            if hidden:
                mistakes.append(
                    f"{hidden} kept blocks lie above the causal diagonal, where no key is visible"
                )
            if empty_rows:
                warnings.warn(
                    f"seer::BlockMask: {empty_rows} query-block rows keep no visible block: their "
                    "output will be 0 and their lse -inf. Keep the diagonal (local=1) if that is "
                    "not intended.",
                    stacklevel=2,
                )
        if mistakes:
            raise ValueError(f"seer::BlockMask: {'; '.join(mistakes)}.")
        return self

    def _shape_mistakes(self, heads_q: int | None, heads_kv: int | None) -> list[str]:
        mistakes = []
        if self.block_bits.shape[2] != self.blocks_q:
            mistakes.append(
                f"block_bits: expected {self.blocks_q} rows (ceil({self.rows_q} / {self.block_q}))"
                f", got {self.block_bits.shape[2]}"
            )
        words = ceil_div(self.blocks_kv, BITS_PER_WORD)
        if self.block_bits.shape[3] < words:
            mistakes.append(
                f"block_bits: expected at least {words} words for {self.blocks_kv} KV blocks, got "
                f"{self.block_bits.shape[3]}"
            )
        if heads_q is not None:
            allowed = sorted({1, heads_q, heads_q if heads_kv is None else heads_kv})
            if self.heads not in allowed:
                mistakes.append(f"block_bits: expected heads in {allowed}, got {self.heads}")
        return mistakes

    def plot(self, pooled: Tensor | None = None, **options: Any) -> Figure:
        """A picture of the mask, one panel per head; see `seer_cuda.plot.plot_block_mask`."""
        from seer_cuda.plot import plot_block_mask

        return plot_block_mask(self, pooled, **options)

    def __eq__(self, other: object) -> bool:
        """Same lengths, block sizes, causal rule and kept blocks. Waits for the device."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        names = ("block_q", "block_kv", "rows_q", "rows_kv", "causal", "shape", "device")
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        return (
            same
            and _equal(self.cu_seqlens_q, other.cu_seqlens_q)
            and _equal(self.cu_seqlens_kv, other.cu_seqlens_kv)
            and torch.equal(self.to_dense(), other.to_dense())
        )

    __hash__ = None  # type: ignore[assignment]  # equality reads mutable device memory

    def __repr__(self) -> str:
        size = (
            f"batch={self.batch}, heads={self.heads}, blocks={self.blocks_q}x{self.blocks_kv} of "
            f"{self.block_q}x{self.block_kv}, rows={self.rows_q}x{self.rows_kv}, "
            f"causal={self.causal}"
        )
        # Fake and meta tensors have no values to read.
        if type(self.block_bits) is Tensor and self.device.type != "meta":
            density = self.density()
            if density.numel():
                low, mean, high = (f(density).item() for f in (torch.min, torch.mean, torch.max))
                size += f", density={mean:.3f}"
                if high - low >= 5e-4:
                    size += f" ({low:.3f} to {high:.3f} by head)"
        return f"BlockMask({size}, device={self.device})"


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


_PACK_FIRST = "Build the mask with BlockMask.from_dense or BlockMask.from_indices."


def _text(argument: str, expected: str, got: object, remedy: str) -> str:
    return f"seer::BlockMask: {argument}: expected {expected}, got {got}. {remedy}"


# Makes a BlockMask an input or output of torch.compile, torch.export and torch.func.
torch.export.register_dataclass(BlockMask, serialized_type_name="seer_cuda.BlockMask")
