# SPDX-License-Identifier: Apache-2.0
"""Named block patterns: bool ``[batch, heads, blocks_q, blocks_kv]`` on the CPU."""

import torch
from inputs import generator
from torch import Tensor

from seer_cuda import reference

PATTERNS = (
    "full",
    "nothing",
    "empty_rows",
    "single",
    "diagonal",
    "sink_local",
    "random_10",
    "random_50",
    "checkerboard",
    "above_diagonal",
    "last_column",
)


def pattern(name: str, batch: int, heads: int, blocks_q: int, blocks_kv: int, seed=0) -> Tensor:
    """The pattern `name`. Diagonals are aligned to the bottom right, as causality is."""
    gen = generator(seed)
    shape = (batch, heads, blocks_q, blocks_kv)
    i = torch.arange(blocks_q)[:, None]
    j = torch.arange(blocks_kv)[None, :]
    last = i + blocks_kv - blocks_q
    draw = torch.rand(shape, generator=gen)
    if name == "full":
        return torch.ones(shape, dtype=torch.bool)
    if name == "nothing":
        return torch.zeros(shape, dtype=torch.bool)
    if name == "empty_rows":  # every other row of a random mask keeps nothing
        return (draw < 0.5) & (i % 2 == 1)
    if name == "single":  # exactly one block per row, anywhere
        if blocks_kv == 0:
            return torch.zeros(shape, dtype=torch.bool)
        pick = draw.argmax(-1, keepdim=True)
        return torch.zeros(shape, dtype=torch.bool).scatter(-1, pick, True)
    if name == "diagonal":
        return (j == last).expand(shape).clone()
    if name == "sink_local":
        return ((j < 1) | ((j > last - 2) & (j <= last))).expand(shape).clone()
    if name.startswith("random_"):
        return draw < int(name.removeprefix("random_")) / 100
    if name == "checkerboard":
        parity = torch.arange(heads)[:, None, None]
        return ((i + j + parity) % 2 == 0).expand(shape).clone()
    if name == "above_diagonal":  # a mask that keeps, when causal, nothing that is visible
        return (j > last).expand(shape).clone()
    if name == "last_column":  # the ragged tail alone
        return (j == blocks_kv - 1).expand(shape).clone()
    raise ValueError(name)


def with_stray_bits(block_bits: Tensor, blocks_kv: int, spare_words: int = 1) -> Tensor:
    """The same mask with every bit at or past blocks_kv set, and spare words of ones behind."""
    beyond = torch.full((*block_bits.shape[:-1], spare_words), -1, dtype=torch.int32)
    bits = torch.cat([block_bits, beyond.to(block_bits.device)], dim=-1)
    mask = reference.unpack_block_bits(bits, bits.shape[-1] * reference.WORD)
    mask[..., blocks_kv:] = True
    return reference.pack_block_bits(mask)
