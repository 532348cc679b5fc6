# SPDX-License-Identifier: Apache-2.0
"""A BlockMask of packed sequences counts each sequence's own blocks."""

from dataclasses import replace

import patterns
import pytest
import torch

from seer_cuda import AttnGate, BlockMask, GateConfig, gate_mask, reference
from seer_cuda.select import Rule

CONTRACT = r"seer::.+: expected .+, got .+"
ROWS = [  # of q and of KV
    (64, 512),
    (256, 256),
    (0, 100),
    (100, 40),
    (33, 33),
    (0, 0),
]


def packed(name="random_50", causal=True, batch=6, device="cpu", seed=0):
    """A mask and its dense form, bits past the sequences included."""
    cu = [
        torch.tensor([0, *rows], device=device).cumsum(0, dtype=torch.int32)
        for rows in zip(*ROWS, strict=True)
    ]
    dense = patterns.pattern(name, batch, 2, 4, 8, seed).to(device)
    mask = BlockMask.from_dense(dense, 64, 64, 256, 512, causal=causal)
    return dense, replace(mask, cu_seqlens_q=cu[0], cu_seqlens_kv=cu[1])


def seen(causal, device):
    """bool [sequences, 4, 8]: each sequence's own visible blocks, False past its end."""
    out = torch.zeros(len(ROWS), 4, 8, dtype=torch.bool, device=device)
    for at, rows in zip(out, ROWS, strict=True):
        own = reference.reachable_blocks(*rows, 64, 64, causal, device)
        at[: own.shape[0], : own.shape[1]] = own
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", [1, len(ROWS)])
def test_visible_blocks_and_density(device, causal, batch, seed):
    dense, mask = packed(causal=causal, batch=batch, device=device, seed=seed)
    want = seen(causal, device)
    assert torch.equal(mask.causal_visible(), want[:, None])
    kept = (dense & want[:, None]).sum((-2, -1)).double()
    density = mask.density()
    assert density.shape == (len(ROWS), 2)
    torch.testing.assert_close(
        density, kept / want.sum((-2, -1)).clamp_min(1)[:, None], rtol=1e-12, atol=0
    )


def test_validate_looks_at_each_sequence(device):
    dense, mask = packed("full", device=device)
    with pytest.raises(ValueError, match="above the causal diagonal"):
        mask.validate()
    own = BlockMask.from_dense(dense & seen(True, device)[:, None], 64, 64, 256, 512)
    lengths = {"cu_seqlens_q": mask.cu_seqlens_q, "cu_seqlens_kv": mask.cu_seqlens_kv}
    assert (replace(own, **lengths).validate().density()[[0, 1, 3, 4]] == 1).all()
    _, none = packed("nothing", device=device)
    rows = int(seen(True, device).any(-1).sum()) * 2
    with pytest.warns(UserWarning, match=f"{rows} query-block rows keep no visible block"):
        none.validate()


def test_bits_past_a_sequence_are_no_mistake(device):
    _, mask = packed("full", causal=False, device=device)
    assert (mask.validate().density()[[0, 1, 3, 4]] == 1).all()


def test_the_gate_notes_the_lengths(device):
    heads = {"heads_q": 2, "heads_kv": 1, "head_dim": 64}
    gate = AttnGate(GateConfig(**heads)).to(device)
    q, k = (torch.randn(400, n, 64, device=device) for n in (2, 1))
    cu = torch.tensor([0, 70, 400], dtype=torch.int32, device=device)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_kv": cu, "max_rows_q": 330, "max_rows_kv": 330}
    mask = gate_mask(q, k, gate, Rule("density", 1.0), **lengths)
    assert mask.cu_seqlens_q is cu and (mask.density() == 1).all()
    assert mask.validate() is mask and "density=1.000" in repr(mask)


def test_moves_and_compares(device):
    _, mask = packed()
    moved = mask.to(device)
    assert moved.cu_seqlens_q.device.type == moved.cu_seqlens_kv.device.type == device
    assert moved.to("cpu") == mask
    assert mask != replace(mask, cu_seqlens_q=mask.cu_seqlens_q + 1)
    assert mask != replace(mask, cu_seqlens_q=None, cu_seqlens_kv=None)


def test_through_a_compiled_function():
    _, mask = packed()
    same = torch.compile(lambda one: one.density(), backend="eager", fullgraph=True)(mask)
    assert torch.equal(same, mask.density())


def test_refuses():
    _, mask = packed()
    with pytest.raises(ValueError, match=CONTRACT):
        replace(mask, cu_seqlens_kv=None)
    with pytest.raises(ValueError, match=CONTRACT):
        mask.to_flex()


def test_plot_draws_a_sequence():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    _, mask = packed()
    figure = mask.plot(batch=1)
    assert "density" in figure.axes[0].get_title()
    matplotlib.pyplot.close(figure)
