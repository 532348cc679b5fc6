# SPDX-License-Identifier: Apache-2.0
"""seer_cuda.attention_map: the map as an object."""

import pytest
import torch
from attention import small

import seer_cuda
from seer_cuda import BlockMask, reference


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_visibility(per_token, causal, seed):
    q, k, v = small("cpu", rows=(150, 300), seed=seed)
    found = seer_cuda.attention_map(q, k, v, per_token=per_token, causal=causal)
    want = reference.attn_pool(q, k, v, per_token=per_token, causal=causal, reduce=1)
    torch.testing.assert_close(found.values.double(), want[2], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.out.double(), want[0], rtol=2e-2, atol=2e-2)
    height = 1 if per_token else 64
    reach = reference.reachable_blocks(150, 300, height, 64, causal)
    assert torch.equal(found.visible(), reach)


def test_what_a_mask_keeps(seed):
    q, k, v = small("cpu", rows=(256, 256), seed=seed)
    found = seer_cuda.attention_map(q, k, v)
    dense = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    everything = BlockMask.from_dense(dense, 64, 64)
    torch.testing.assert_close(found.kept_by(everything), torch.ones(2, 4))
    diagonal = BlockMask.from_dense(torch.eye(4, dtype=torch.bool)[None, None], 64, 64)
    want = found.values.diagonal(dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(found.kept_by(diagonal), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected a map of sums, got maxima"):
        seer_cuda.attention_map(q, k, v, reduce="max").kept_by(everything)
    with pytest.raises(
        ValueError, match=r"expected blocks of 64 x 128 tokens .+, got blocks of 64 x 64"
    ):
        seer_cuda.attention_map(q, k, v, block_kv=128).kept_by(everything)


def test_masks_of_other_lengths_batch_or_heads_are_refused(seed):
    """Also where the numbers of blocks agree."""
    q, k, v = small("cpu", rows=(256, 256), seed=seed)
    found = seer_cuda.attention_map(q, k, v)
    dense = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    wrong = (
        BlockMask.from_dense(dense, 128, 128),
        BlockMask.from_dense(dense, 64, 64, 250, 256),
        BlockMask.from_dense(dense.expand(3, 1, -1, -1), 64, 64),
        BlockMask.from_dense(dense.expand(1, 3, -1, -1), 64, 64),
        BlockMask.from_dense(dense.expand(1, 8, -1, -1), 64, 64),
        BlockMask.from_dense(dense[:, :0], 64, 64),
    )
    for mask in wrong:
        with pytest.raises(ValueError, match=r"seer::attention_map: mask: expected .+, got .+"):
            found.kept_by(mask)


def test_a_map_with_nan_is_drawn(seed):
    pytest.importorskip("matplotlib")
    q, k, v = small("cpu", seed=seed)
    found = seer_cuda.attention_map(q, k, v)
    found.values[0, 0, 1, 0] = torch.nan
    assert len([axes for axes in found.plot(max_heads=1).axes if axes.get_title()]) == 1


def test_repr_says_what_it_is(seed):
    q, k, v = small("cpu", seed=seed)
    text = repr(seer_cuda.attention_map(q, k, v))
    assert "2 x 4 heads, 3 x 3 blocks of 64 x 64 tokens, share of the attention" in text
    assert "nothing visible" in repr(seer_cuda.attention_map(q[:, :0], k, v))


def test_packed_sequences_are_refused():
    q, k, v = (x[0] for x in small("cpu"))
    with pytest.raises(ValueError, match=r"seer::attention_map: q: expected \[batch, rows"):
        seer_cuda.attention_map(q, k, v)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_plot(per_token, reduce, seed, tmp_path):
    pytest.importorskip("matplotlib")
    q, k, v = small("cpu", rows=(150, 300), seed=seed)
    found = seer_cuda.attention_map(q, k, v, per_token=per_token, reduce=reduce)
    figure = found.plot(max_heads=3)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["head 0", "head 1", "head 2"]
    shown = panels[1].images[0].get_array()
    assert shown.shape == found.values.shape[-2:]
    assert shown.mask.sum() == int((~found.visible()).sum())
    figure.savefig(tmp_path / "map.png")
