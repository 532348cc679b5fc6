# SPDX-License-Identifier: Apache-2.0
"""Selection from Python: rules on score maps count in tokens; what gate_select refuses."""

import inputs
import pytest
import torch

import seer_cuda
from seer_cuda import BlockMask, reference, select

#: rows, blocks: unequal blocks, chunks that start within a block, more queries than keys.
SHAPES = [
    ((300, 300), (128, 64)),
    ((300, 300), (64, 128)),
    ((100, 300), (64, 64)),
    ((100, 300), (128, 64)),
    ((100, 300), (64, 128)),
    ((300, 100), (64, 64)),
    ((256, 512), (64, 64)),
    ((1, 300), (64, 64)),
]


def lengths(rows, blocks):
    return {"rows_q": rows[0], "rows_kv": rows[1], "block_q": blocks[0], "block_kv": blocks[1]}


def score_map(rows, blocks, device, seed=0, dtype=torch.float32):
    counts = [-(-r // b) for r, b in zip(rows, blocks, strict=True)]
    scores = torch.randn(2, 3, *counts, generator=inputs.generator(seed))
    return scores.to(device, dtype)


@pytest.mark.parametrize("rows, blocks", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_density_one_keeps_all_that_is_visible(device, rows, blocks, causal, seed):
    scores = score_map(rows, blocks, device, seed)
    size = lengths(rows, blocks)
    mask = select.from_scores(scores, "density", 1.0, causal=causal, **size).validate()
    seen = reference.reachable_blocks(*rows, *blocks, causal, device)
    assert torch.equal(mask.to_dense(), seen.expand(2, 3, -1, -1))
    assert (mask.density() == (1.0 if seen.any() else 0.0)).all()


@pytest.mark.parametrize("rows, blocks", SHAPES)
@pytest.mark.parametrize(
    "method, value", [("threshold", 0.2), ("topk", 2), ("density", 0.4), ("topp", 0.6)]
)
def test_selection_by_the_rule_on_tokens(device, rows, blocks, method, value, seed):
    """Row by row against the oracle's rule on the row's visible blocks alone."""
    scores = score_map(rows, blocks, device, seed)
    mask = select.from_scores(scores, method, value, **lengths(rows, blocks)).validate()
    seen = reference.reachable_blocks(*rows, *blocks, True, device)
    hidden = scores.masked_fill(~seen, torch.nan)  # never a candidate of the oracle
    number = select.METHODS[method]
    want = reference.select_blocks(hidden.double(), causal=False, method=number, value=value)
    assert torch.equal(mask.to_dense(), want)


@pytest.mark.parametrize("rows, blocks", SHAPES)
def test_forced_blocks_by_the_rule_on_tokens(device, rows, blocks, seed):
    """sink, local and dense_last_rows on scores that are never selected."""
    size = lengths(rows, blocks)
    nothing = torch.full_like(score_map(rows, blocks, device, seed), torch.nan)
    seen = reference.reachable_blocks(*rows, *blocks, True, device).cpu()
    forced = {"sink": 1, "local": 2, "dense_last_rows": 1}
    want = torch.zeros_like(seen)
    for i, row in enumerate(seen):
        visible = row.nonzero().flatten().tolist()
        last = i == len(seen) - 1
        want[i, visible if last else visible[:1] + visible[-2:]] = True
    mask = select.from_scores(nothing, "topk", 1, **size, **forced)
    assert torch.equal(mask.to_dense().cpu(), want.expand(2, 3, -1, -1))
    assert torch.equal(select.sink_local(**size, **forced).to_dense()[0, 0].cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method, value", [("threshold", 0.2), ("topk", 2), ("topp", 0.6)])
def test_scores_below_fp32_are_cast(device, dtype, method, value, seed):
    scores = score_map((300, 300), (64, 64), device, seed, dtype)
    mask = select.from_scores(scores, method, value)
    assert mask == select.from_scores(scores.float(), method, value)


@pytest.mark.parametrize(
    "name, call",
    [
        ("from_scores: block_q", lambda x: select.from_scores(x, "topk", 1, block_q=0)),
        ("from_scores: block_kv", lambda x: select.from_scores(x, "topk", 1, block_kv=-1)),
        ("from_scores: rows_q", lambda x: select.from_scores(x, "topk", 1, rows_q=-5)),
        ("sink_local: rows_q", lambda x: select.sink_local(-5, 128)),
        ("sink_local: block_kv", lambda x: select.sink_local(128, 128, block_kv=0)),
        ("random_blocks: rows_kv", lambda x: select.random_blocks(128, -5, 0.5)),
        ("random_blocks: block_q", lambda x: select.random_blocks(128, 128, 0.5, block_q=0)),
        ("random_blocks: local", lambda x: select.random_blocks(128, 128, 0.5, local=-1)),
        (
            "gate_select: block_q",
            lambda x: seer_cuda.gate_select(
                torch.ones(1, 2, 2, 16), torch.ones(1, 2, 2, 16), value=0.1, block_q=0
            ),
        ),
    ],
)
def test_sizes_and_counts_are_checked(name, call):
    with pytest.raises(ValueError, match=rf"seer::{name}: expected .+, got .+\. \S.*\."):
        call(torch.zeros(1, 1, 2, 2))


def test_from_scores_refuses():
    scores = torch.zeros(1, 1, 2, 2)
    form = r"seer::from_scores: {}: expected .+, got .+\. \S.*\."
    for name, error, x, wrong in (
        ("scores", TypeError, scores.int(), {}),
        ("scores", ValueError, scores[0], {}),
        ("sink", ValueError, scores, {"sink": -1}),
        ("local", ValueError, scores, {"local": -2}),
        ("dense_last_rows", ValueError, scores, {"dense_last_rows": -1}),
        ("rows_q", ValueError, scores, {"rows_q": 200}),
        ("rows_kv", ValueError, scores, {"rows_kv": 64}),
    ):
        with pytest.raises(error, match=form.format(name)):
            select.from_scores(x, "topk", 1, **wrong)
    with pytest.raises(ValueError, match=r"seer::sink_local: sink: expected .+, got -1"):
        select.sink_local(100, 100, sink=-1)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("rows_q", {"rows_q": 100}),
        ("rows_q", {"rows_q": 100, "rows_kv": 256}),
        ("rows_q", {"rows_kv": 250}),
        ("block_q, block_kv", {"block_q": 128}),
        ("block_q, block_kv", {"block_kv": 128, "rows_kv": 500}),
    ],
)
def test_gate_select_refuses_unaligned_blocks(name, wrong):
    """Its causal rule counts in blocks; without it, any lengths and blocks will do."""
    q_gate, k_gate = torch.randn(1, 2, 2, 16), torch.randn(1, 4, 2, 16)
    form = rf"seer::gate_select: {name}: expected .+, got .+\. \S.*\."
    with pytest.raises(ValueError, match=form):
        seer_cuda.gate_select(q_gate, k_gate, method="topk", value=1, **wrong)
    mask = seer_cuda.gate_select(q_gate, k_gate, method="topk", value=1, causal=False, **wrong)
    assert (mask.to_dense().sum(-1) == 1).all()


@pytest.mark.parametrize("rows", [(100, 228), (128, 256), (36, 100), (100, 100), (1, 65)])
def test_gate_select_of_aligned_chunks_sees_what_tokens_see(rows):
    blocks = [-(-r // 64) for r in rows]
    q_gate, k_gate = (torch.randn(1, n, 2, 16) for n in blocks)
    size = {"rows_q": rows[0], "rows_kv": rows[1]}
    mask = seer_cuda.gate_select(q_gate, k_gate, method="density", value=1.0, **size)
    seen = reference.reachable_blocks(*rows, 64, 64, True)
    assert torch.equal(mask.validate().to_dense(), seen.expand(1, 2, -1, -1))


def test_packed_q_with_a_mask_needs_cu_seqlens():
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64)
    q = torch.randn(128, 2, 64)
    form = r"seer::block_sparse_attn: cu_seqlens_q: expected .+, got None\. Packed q needs cu_seq"
    with pytest.raises(ValueError, match=form):
        seer_cuda.block_sparse_attn(q, q, q, mask)
