# SPDX-License-Identifier: Apache-2.0
"""Scores without a gate, against their definitions token by token in float64."""

import pytest
import torch

from seer_cuda import heuristics

BATCH, HEADS, HEADS_KV, DIM = 2, 4, 2, 8


def inputs(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, rows, HEADS, DIM, generator=generator) * 2
    return q, torch.randn(BATCH, rows, HEADS_KV, DIM, generator=generator)


def scores(q, k):
    """float64 ``[batch, heads, rows, rows]``, no mask."""
    k = k.repeat_interleave(HEADS // HEADS_KV, 2)
    return torch.einsum("brhd,bchd->bhrc", q.double(), k.double()) * DIM**-0.5


def attention(q, k):
    rows = q.shape[1]
    hidden = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    return scores(q, k).masked_fill(hidden, -torch.inf).softmax(-1)


def visible(values):
    """What counts: the lower triangle of blocks."""
    return values.tril()


def close(got, want):
    torch.testing.assert_close(visible(got.double()), visible(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows, block, last", [(48, 8, 8), (50, 8, 11), (5, 8, 64), (64, 16, 1)])
def test_vertical_slash(rows, block, last):
    q, k = inputs(rows)
    blocks = -(-rows // block)
    prob = attention(q, k)[:, :, max(0, rows - last) :]
    first = max(0, rows - last)
    column = torch.zeros(BATCH, HEADS, blocks, dtype=torch.float64)
    diagonal = torch.zeros(BATCH, HEADS, rows, dtype=torch.float64)
    for r in range(prob.shape[2]):
        for c in range(first + r + 1):
            column[..., c // block] += prob[:, :, r, c]
            diagonal[..., first + r - c] += prob[:, :, r, c]
    want = torch.zeros(BATCH, HEADS, blocks, blocks, dtype=torch.float64)
    for i in range(blocks):
        for j in range(i + 1):
            slash = 0
            for r in range(i * block, (i + 1) * block):
                for c in range(j * block, (j + 1) * block):
                    if 0 <= r - c < rows:
                        slash = slash + diagonal[..., r - c] / block
            want[..., i, j] = torch.maximum(column[..., j], slash)
    close(heuristics.vertical_slash(q, k, block=block, last=last), want)


@pytest.mark.parametrize("rows, block, stride", [(32, 8, 4), (29, 8, 4), (3, 8, 8), (40, 16, 2)])
def test_antidiagonal(rows, block, stride):
    q, k = inputs(rows)
    blocks = -(-rows // block)
    full = torch.zeros(BATCH, HEADS, blocks * block, blocks * block, dtype=torch.float64)
    full[..., :rows, :rows] = scores(q, k)
    tiles = blocks * block // stride
    mean = torch.full((BATCH, HEADS, tiles, tiles), -torch.inf, dtype=torch.float64)
    for a in range(tiles):
        for b in range(a + 1):
            if b * stride < rows:
                terms = [
                    full[..., a * stride + stride - 1 - i, b * stride + i] for i in range(stride)
                ]
                mean[..., a, b] = sum(terms) / stride
    share, per = mean.softmax(-1), block // stride
    want = torch.zeros(BATCH, HEADS, blocks, blocks, dtype=torch.float64)
    for i in range(blocks):
        for j in range(i + 1):
            want[..., i, j] = share[..., i * per : i * per + per, j * per : j * per + per].sum(
                (-1, -2)
            )
    close(heuristics.antidiagonal(q, k, block=block, stride=stride), want)


@pytest.mark.parametrize("rows", [32, 27])
def test_pooled_qk(rows):
    q, k = inputs(rows)
    pooled = scores(
        *(torch.stack([part.double().mean(1) for part in x.split(8, 1)], 1) for x in (q, k))
    )
    close(heuristics.pooled_qk(q, k, block=8), pooled)


def test_sink_local_orders_sink_then_distance():
    order = heuristics.sink_local(40, block=8, sink=2)[0, 0, 4].argsort(descending=True)
    assert order.tolist() == [1, 0, 4, 3, 2]


def test_sinks_come_first_in_long_prompts():
    blocks = 10_100
    last = heuristics.sink_local(blocks, block=1)[0, 0, -1]
    assert last.argsort(descending=True)[:2].tolist() == [0, blocks - 1]


def test_random_follows_from_its_seed():
    one, same, other = (heuristics.random(40, 3, block=8, seed=seed) for seed in (5, 5, 6))
    assert one.shape == (1, 3, 5, 5) and torch.equal(one, same) and not torch.equal(one, other)


def test_a_scale_of_zero_makes_all_blocks_alike():
    q, k = inputs(32)
    for function in (heuristics.pooled_qk, heuristics.antidiagonal):
        row = function(q, k, block=8, scale=0.0)[..., 3, :3]
        assert torch.equal(row, row[..., :1].expand_as(row))


@pytest.mark.parametrize(
    "function", [heuristics.vertical_slash, heuristics.antidiagonal, heuristics.pooled_qk]
)
def test_a_prompt_without_tokens_has_no_scores(function):
    got = function(*inputs(0))
    assert got.shape == (BATCH, HEADS, 0, 0) and got.dtype == torch.float32
    with pytest.raises(ValueError, match=r"block: expected at least 1 token per block, got 0\."):
        function(*inputs(16), block=0)


@pytest.mark.parametrize(
    "name, call",
    [
        ("sink_local: block", lambda: heuristics.sink_local(40, block=0)),
        ("sink_local: sink", lambda: heuristics.sink_local(40, sink=-1)),
        ("sink_local: rows", lambda: heuristics.sink_local(-1)),
        ("random: block", lambda: heuristics.random(40, 2, block=-1)),
        ("random: rows", lambda: heuristics.random(-1, 2)),
        ("random: heads", lambda: heuristics.random(40, -2)),
    ],
)
def test_sizes_are_checked(name, call):
    with pytest.raises(ValueError, match=rf"seer::{name}: expected .+, got .+\. \S.*\."):
        call()


@pytest.mark.parametrize(
    "function", [heuristics.vertical_slash, heuristics.antidiagonal, heuristics.pooled_qk]
)
def test_what_does_not_fit_is_refused(function):
    q, k = inputs(16)
    form = r"seer::\w+: k: expected .+, got .+\. Pass a whole prompt's q and k\."
    for wrong in (k[:, :8], k[..., :4], k[:, :, :0], k[0]):
        with pytest.raises(ValueError, match=form):
            function(q, wrong)
    with pytest.raises(ValueError, match="stride: expected a divisor of block = 64, got 7"):
        heuristics.antidiagonal(q, k, stride=7)
    with pytest.raises(ValueError, match="last: expected at least 1, got 0"):
        heuristics.vertical_slash(q, k, last=0)
