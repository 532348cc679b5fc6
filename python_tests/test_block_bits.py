# SPDX-License-Identifier: Apache-2.0
"""pack_block_bits, unpack_block_bits and block_bits_from_indices."""

import inputs
import numerics
import pytest
import torch

from seer_cuda import reference

WIDTHS = [1, 2, 31, 32, 33, 63, 64, 65, 100, 1000]
LEADING = [(1, 1, 1), (2, 3, 5), (1, 1, 513)]
ops = torch.ops.seer


def random_mask(shape, seed, p=0.4):
    return torch.rand(shape, generator=inputs.generator(seed)) < p


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("width", WIDTHS)
def test_pack_and_unpack(device, leading, width, seed):
    mask = random_mask((*leading, width), seed).to(device)
    bits = ops.pack_block_bits(mask)
    numerics.assert_bitwise("pack", bits, reference.pack_block_bits(mask))
    assert bits.is_contiguous() and bits.device == mask.device
    back = ops.unpack_block_bits(bits, width)
    numerics.assert_bitwise("unpack", back, mask)
    assert back.is_contiguous()


@pytest.mark.reduced
@pytest.mark.parametrize("width", [31, 33])
def test_all_ones(device, width):
    mask = torch.ones(1, 1, 2, width, dtype=torch.bool, device=device)
    bits = ops.pack_block_bits(mask)
    numerics.assert_bitwise("ones", bits, reference.pack_block_bits(mask))
    assert ops.unpack_block_bits(bits, width).all()


def test_unpack_ignores_what_lies_behind(device):
    bits = torch.full((1, 1, 3, 4), -1, dtype=torch.int32, device=device)
    assert ops.unpack_block_bits(bits, 40).shape == (1, 1, 3, 40)
    assert ops.unpack_block_bits(bits, 40).all()
    assert ops.unpack_block_bits(bits, 0).shape == (1, 1, 3, 0)


def test_pack_takes_any_strides(device, seed):
    mask = random_mask((2, 3, 4, 50), seed).to(device)
    for view in (
        mask.transpose(1, 2),
        mask.transpose(2, 3),
        mask[:, :, ::2],
        mask[..., ::2],
        mask[:1].expand(4, -1, -1, -1),
    ):
        numerics.assert_bitwise("pack", ops.pack_block_bits(view), reference.pack_block_bits(view))


@pytest.mark.parametrize("shape", [(0, 1, 2, 3), (1, 2, 0, 40), (1, 1, 4, 0)])
def test_nothing_to_pack(device, shape):
    bits = ops.pack_block_bits(torch.zeros(shape, dtype=torch.bool, device=device))
    assert bits.shape == (*shape[:-1], -(-shape[-1] // 32))
    assert ops.unpack_block_bits(bits, shape[-1]).shape == shape


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_from_indices(device, width, order, seed):
    mask = random_mask((2, 3, 7, width), seed)
    gen = inputs.generator(seed)
    key = torch.rand(mask.shape, generator=gen)
    if order != "shuffled":
        key = torch.arange(width).expand(mask.shape) / width
    key = -key if order == "descending" else key
    indices = (key + 10.0 * ~mask).argsort(-1).to(torch.int32).to(device)
    counts = mask.sum(-1).to(torch.int32).to(device)
    bits = ops.block_bits_from_indices(indices, counts, width)
    numerics.assert_bitwise("bits", bits, reference.pack_block_bits(mask).to(device))


@pytest.mark.reduced
def test_from_indices_ignores_strange_entries(device):
    """Outside [0, blocks_kv), repeated, behind the count, counts beyond capacity or negative."""
    indices = torch.tensor(
        [[40, -1, 2, 2, 3], [39, 2**31 - 1, 0, 0, 0], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]],
        dtype=torch.int32,
        device=device,
    )
    counts = torch.tensor([4, 1, 99, -5], dtype=torch.int32, device=device)
    bits = ops.block_bits_from_indices(indices, counts, 40)
    kept = [row.nonzero()[:, 0].tolist() for row in reference.unpack_block_bits(bits, 40)]
    assert kept == [[2], [39], [1, 2, 3, 4, 5], []]
    numerics.assert_bitwise("bits", bits, reference.block_bits_from_indices(indices, counts, 40))


@pytest.mark.parametrize("capacity", [0, 1])
def test_from_few_indices(device, capacity):
    indices = torch.zeros(1, 2, 3, capacity, dtype=torch.int32, device=device)
    counts = torch.full((1, 2, 3), capacity, dtype=torch.int32, device=device)
    bits = ops.block_bits_from_indices(indices, counts, 33)
    assert bits.shape == (1, 2, 3, 2) and (bits[..., 0] == capacity).all()
    assert (bits[..., 1] == 0).all()
