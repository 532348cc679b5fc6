# SPDX-License-Identifier: Apache-2.0
"""seer_cuda.BlockMask: conversions both ways, what it says about itself, what it refuses."""

import itertools
import warnings

import attention
import inputs
import patterns
import pytest
import torch
from torch.nn.attention import flex_attention

import seer_cuda
from seer_cuda import BlockMask, reference

CONTRACT = r"seer::.+: expected .+, got .+"


def make(
    name="random_50",
    rows=(300, 500),
    blocks=(64, 128),
    batch=2,
    heads=3,
    causal=True,
    device="cpu",
    seed=0,
):
    counts = [attention.ceil_div(r, b) for r, b in zip(rows, blocks, strict=True)]
    dense = patterns.pattern(name, batch, heads, *counts, seed).to(device)
    return dense, BlockMask.from_dense(dense, *blocks, *rows, causal=causal)


@pytest.mark.parametrize("name", patterns.PATTERNS)
@pytest.mark.parametrize("rows", [(300, 500), (64, 64), (1, 5000), (65, 63)])
def test_dense_round_trip(device, name, rows, seed):
    dense, mask = make(name, rows, device=device, seed=seed)
    assert mask.block_bits.dtype == torch.int32 and mask.block_bits.device == dense.device
    assert torch.equal(mask.block_bits, reference.pack_block_bits(dense))
    assert torch.equal(mask.to_dense(), dense)


def test_shape_properties(device):
    _, mask = make(device=device)
    assert (mask.batch, mask.heads, mask.blocks_q, mask.blocks_kv) == (2, 3, 5, 4)
    assert (mask.block_q, mask.block_kv, mask.rows_q, mask.rows_kv) == (64, 128, 300, 500)


def test_lengths_default_to_whole_blocks():
    dense, _ = make()
    mask = BlockMask.from_dense(dense, 64, 128)
    assert (mask.rows_q, mask.rows_kv, mask.causal) == (320, 512, True)


@pytest.mark.parametrize("name", patterns.PATTERNS)
def test_indices_both_ways(device, name, seed):
    dense, mask = make(name, (300, 5000), device=device, seed=seed)
    indices, counts = mask.to_indices()
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.shape == (2, 3, 5, mask.blocks_kv) and counts.shape == (2, 3, 5)
    for at in ((0, 0, 0), (1, 2, 4), (0, 1, 2)):
        row, count = indices[at].tolist(), int(counts[at])
        assert row[:count] == dense[at].nonzero()[:, 0].tolist()
        assert not any(row[count:])
    assert torch.equal(counts.cpu(), dense.sum(-1).to(torch.int32).cpu())
    back = BlockMask.from_indices(indices, counts, 64, 128, rows_q=300, rows_kv=5000)
    assert torch.equal(back.to_dense(), dense) and back.rows_kv == 5000


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [(300, 300), (200, 500), (300, 100), (65, 63)])
@pytest.mark.parametrize("blocks", [(64, 64), (64, 128), (128, 64)])
def test_causal_visible(device, rows, blocks, causal):
    _, mask = make("full", rows, blocks, causal=causal, device=device)
    want = reference.reachable_blocks(*rows, *blocks, causal, device)
    assert torch.equal(mask.causal_visible(), want)


@pytest.mark.parametrize("name", patterns.PATTERNS)
@pytest.mark.parametrize("causal", [True, False])
def test_density_counts_visible_blocks(device, name, causal, seed):
    dense, mask = make(name, (300, 450), causal=causal, device=device, seed=seed)
    seen = reference.reachable_blocks(300, 450, 64, 128, causal, device)
    want = (dense & seen).sum((2, 3)).double() / int(seen.sum())
    density = mask.density()
    assert density.dtype == torch.float64 and density.shape == (2, 3)
    torch.testing.assert_close(density, want, rtol=1e-12, atol=0)


def test_density_ignores_stray_bits(device):
    _, mask = make(device=device)
    stray = patterns.with_stray_bits(mask.block_bits, mask.blocks_kv)
    dirty = BlockMask(stray, 64, 128, 300, 500)
    assert torch.equal(dirty.density(), mask.density())
    assert torch.equal(dirty.to_dense(), mask.to_dense())


def token_mask(mask, heads_q):
    """What a BlockMask means, token by token: bool [batch, heads_q, rows_q, rows_kv]."""
    dense = mask.to_dense().repeat_interleave(heads_q // mask.heads, dim=1)
    size = (mask.block_q, mask.block_kv, mask.rows_q, mask.rows_kv)
    seen = reference.token_visible(mask.rows_q, mask.rows_kv, mask.causal, dense.device)
    return reference.expand_blocks(dense, *size) & seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [(256, 256), (300, 300), (130, 400), (300, 100)])
def test_to_flex_means_the_same(device, rows, causal, seed):
    """Blocks of the flex mask cover the kept ones, and its mask_mod is the token mask."""
    dense, mask = make(
        "random_50", rows, (64, 64), heads=2, causal=causal, device=device, seed=seed
    )
    flex = mask.to_flex()
    assert tuple(flex.BLOCK_SIZE) == (64, 64) and tuple(flex.seq_lengths) == rows
    seen = reference.reachable_blocks(*rows, 64, 64, causal, device)
    assert torch.equal(flex.to_dense().bool().to(device), dense & seen)
    args = [
        torch.arange(n, device=device).view([-1 if d == dim else 1 for d in range(4)])
        for dim, n in enumerate((2, 2, *rows))
    ]
    assert torch.equal(flex.mask_mod(*args).expand(2, 2, *rows), token_mask(mask, 2))
    full = torch.zeros_like(dense)
    for b, h, i in itertools.product(range(2), range(2), range(dense.shape[2])):
        count = int(flex.full_kv_num_blocks[b, h, i])
        full[b, h, i, flex.full_kv_indices[b, h, i, :count].long()] = True
    tokens = reference.expand_blocks(full, 64, 64, *rows)
    assert (token_mask(mask, 2) | ~tokens).all(), "a full block holds a hidden token"


@pytest.mark.parametrize("rows", [(256, 256), (130, 400)])
def test_flex_attention_gives_the_same_result(rows, seed):
    _, mask = make("sink_local", rows, (64, 64), batch=1, heads=2, seed=seed)
    q, k, v = inputs.qkv(
        "normal", rows_q=rows[0], rows_kv=rows[1], heads_q=2, heads_kv=2, seed=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eager flex_attention advises to compile
        out = flex_attention.flex_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask.to_flex()
        )
    ref, _ = reference.block_sparse_attn(q, k, v, mask.block_bits)
    torch.testing.assert_close(out.transpose(1, 2).double(), ref, rtol=1e-5, atol=1e-5)


def test_to_flex_repeats_a_groups_row(device, seed):
    _, mask = make("random_50", (300, 300), (64, 64), heads=2, device=device, seed=seed)
    flex = mask.to_flex(heads_q=6)
    want = mask.to_dense().repeat_interleave(3, 1) & mask.causal_visible()
    assert torch.equal(flex.to_dense().bool().to(device), want)
    with pytest.raises(ValueError, match=CONTRACT):
        mask.to_flex(heads_q=5)


@pytest.mark.parametrize("causal", [True, False])
def test_from_flex(device, causal):
    """A mask made by FlexAttention itself: sliding window of 200 tokens over 300 x 300."""

    def window(b, h, r, c):
        return ((c <= r) | (not causal)) & (r - c < 200)

    flex = flex_attention.create_block_mask(window, 2, 3, 300, 300, device=device, BLOCK_SIZE=64)
    mask = BlockMask.from_flex(flex, causal=causal)
    assert (mask.rows_q, mask.rows_kv, mask.block_q, mask.block_kv) == (300, 300, 64, 64)
    assert torch.equal(mask.to_dense(), flex.to_dense().bool().to(device)[:, :, :5, :5])


@pytest.mark.parametrize("name", ["random_50", "nothing", "full", "single"])
def test_flex_round_trip(device, name, seed):
    _, mask = make(name, (300, 500), (64, 64), causal=False, device=device, seed=seed)
    back = BlockMask.from_flex(mask.to_flex(), causal=False)
    assert torch.equal(back.to_dense(), mask.to_dense())
    assert (back.rows_q, back.rows_kv) == (300, 500)


def test_repr_shows_the_density(device):
    _, mask = make("full", device=device)
    text = repr(mask)
    assert text.startswith("BlockMask(") and "density=1.000" in text and "64x128" in text
    _, mask = make("nothing", device=device)
    assert "density=0.000" in repr(mask)


def test_to_moves_the_bits(device):
    _, mask = make()
    moved = mask.to(device)
    assert moved.block_bits.device.type == device and moved.rows_q == mask.rows_q
    assert torch.equal(moved.to("cpu").to_dense(), mask.to_dense())


def test_validate_accepts_a_right_mask(device):
    dense, _ = make("full", (320, 512), device=device)
    seen = reference.reachable_blocks(320, 512, 64, 128, True, device)
    BlockMask.from_dense(dense & seen, 64, 128).validate()
    _, mask = make("full", causal=False, device=device)
    mask.validate(heads_q=3)


def test_validate_names_every_mistake(device):
    dense, mask = make("full", (300, 300), (64, 64), device=device)
    with pytest.raises(ValueError, match=r"seer::.*causal"):
        mask.validate()
    seen = reference.reachable_blocks(300, 300, 64, 64, True, device)
    bits = reference.pack_block_bits(dense & seen)
    stray = patterns.with_stray_bits(bits, 5)
    with pytest.raises(ValueError, match=r"seer::.*blocks_kv=5"):
        BlockMask(stray, 64, 64, 300, 300).validate()
    with pytest.raises(ValueError, match=r"seer::.*block_bits"):
        BlockMask(bits, 64, 64, 400, 300).validate()
    with pytest.raises(ValueError, match=r"seer::.*block_bits"):
        BlockMask(bits, 64, 64, 300, 5000).validate()
    with pytest.raises(ValueError, match=r"seer::.*heads"):
        BlockMask(bits, 64, 64, 300, 300).validate(heads_q=8, heads_kv=4)


def test_validate_warns_of_empty_rows(device):
    _, mask = make("nothing", device=device)
    with pytest.warns(UserWarning, match="-inf"):
        mask.validate()


def test_numbers_past_32_bits_are_outside(device):
    """2**32 + 3 is not block 3, and 2**32 + 1 entries are all of them."""
    indices = torch.tensor([[[[2**32 + 3, 1, -(2**32) + 2, 2**62]]]], device=device)
    for count, want in ((2**32 + 1, [1]), (4, [1]), (1, []), (-(2**32) + 4, [])):
        counts = torch.tensor([[[count]]], device=device)
        mask = BlockMask.from_indices(indices, counts, 64, 64)
        assert mask.to_dense()[0, 0, 0].nonzero().flatten().tolist() == want


HOSTILE = {
    "bits of int64": lambda: BlockMask(torch.zeros(1, 1, 2, 1).long(), 64, 64, 128, 128),
    "bits of 3 dims": lambda: BlockMask(torch.zeros(1, 2, 1).int(), 64, 64, 128, 128),
    "block of 0 rows": lambda: BlockMask(torch.zeros(1, 1, 2, 1).int(), 0, 64, 128, 128),
    "negative rows": lambda: BlockMask(torch.zeros(1, 1, 2, 1).int(), 64, 64, -1, 128),
    "dense, block of 0": lambda: BlockMask.from_dense(torch.zeros(1, 1, 2, 2).bool(), 0, 64),
    "lists, block of 0": lambda: BlockMask.from_indices(
        torch.zeros(1, 1, 2, 2).int(), torch.zeros(1, 1, 2).int(), 64, 0, rows_kv=128
    ),
    "float mask": lambda: BlockMask.from_dense(torch.zeros(1, 1, 2, 2), 64, 64),
    "mask of 2 dims": lambda: BlockMask.from_dense(torch.zeros(2, 2).bool(), 64, 64),
    "wrong rows": lambda: BlockMask.from_dense(torch.zeros(1, 1, 2, 2).bool(), 64, 64, 200, 128),
    "float indices": lambda: BlockMask.from_indices(
        torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2).int(), 64, 64
    ),
    "indices of 2 dims": lambda: BlockMask.from_indices(
        torch.zeros(2, 2).int(), torch.zeros(2).int(), 64, 64
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses(name):
    with pytest.raises((TypeError, ValueError), match=CONTRACT):
        HOSTILE[name]()


def test_attention_takes_sizes_from_the_mask(device, seed):
    q, k, v = attention.small(device, rows=(300, 500), seed=seed)
    _, mask = make(heads=2, device=device, seed=seed)
    out, lse = seer_cuda.block_sparse_attn(q, k, v, mask, return_lse=True)
    attention.check_attention("mask", out, lse, q, k, v, mask.block_bits, block_kv=128)
    alone = seer_cuda.block_sparse_attn(q, k, v, mask.block_bits, block_q=64, block_kv=128)
    assert torch.equal(alone, out)
    with pytest.raises(ValueError, match=CONTRACT):
        seer_cuda.block_sparse_attn(q, k, v, mask, block_q=128)
    with pytest.raises(ValueError, match=CONTRACT):
        seer_cuda.block_sparse_attn(q[:, :100], k, v, mask)
    with pytest.raises(TypeError, match=CONTRACT):
        seer_cuda.block_sparse_attn(q, k, v, "full")


def test_plot_of_no_heads():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    _, mask = make(heads=3)
    for figure in (mask.plot(max_heads=0), mask.select_heads(slice(0)).plot()):
        assert not [axes for axes in figure.axes if axes.images]
        matplotlib.pyplot.close(figure)


def test_plot_draws_one_panel_per_head(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    _, mask = make(heads=3)
    figure = mask.plot()
    figure.savefig(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 1000
    assert len([axes for axes in figure.axes if axes.images]) >= 3
    matplotlib.pyplot.close(figure)
