# SPDX-License-Identifier: Apache-2.0
"""Tests of the tests: attention with one deliberate mistake must not pass compare().

Each mutant is a right fp32 implementation with one line changed. The unchanged one must pass, so a
mutant that is caught is caught for its mistake.
"""

import math

import attention
import baselines
import inputs
import numerics
import pytest
import selection
import torch
from attention import make_bits
from pooled import map_error

from seer_cuda import reference

ROWS_Q, ROWS_KV, HEADS_Q, HEADS_KV = 230, 300, 4, 2
MUTANTS = (
    "drop last block",
    "drop first block",
    "diagonal one up",
    "diagonal one down",
    "top left diagonal",
    "swap heads",
    "wrong group order",
    "skip rescale of out",
    "skip rescale of sum",
    "forget empty rows",
    "lse in log2",
    "lse without maximum",
    "lse of an empty row is +inf",
    "scale forgotten",
    "scale twice",
    "ragged tail counted",
    "mask row of a neighbour",
    "bits in reverse order",
    "one row not written",
    "one column of out",
    "nan in one place",
    "weights in fp8",
)


def online(q, k, v, bits, mutant=None, block_q=64, block_kv=64):
    """Block-sparse causal attention by blocks with an online softmax, and room for one mistake."""
    batch, rows_q, heads_q, head_dim = q.shape
    rows_kv, heads_kv = k.shape[1:3]
    scale = head_dim**-0.5
    scale = {"scale forgotten": 1.0, "scale twice": scale**2}.get(mutant, scale)
    blocks_q, blocks_kv = -(-rows_q // block_q), -(-rows_kv // block_kv)
    keep = reference.unpack_block_bits(bits, blocks_kv)
    if mutant == "bits in reverse order":
        keep = keep.flip(-1)
    if mutant == "mask row of a neighbour":
        keep = keep.roll(1, dims=2)
    out = torch.zeros_like(q)
    lse = torch.full((batch, heads_q, rows_q), -math.inf)
    shift = rows_kv - rows_q
    shift = {
        "diagonal one up": shift + 1,
        "diagonal one down": shift - 1,
        "top left diagonal": 0,
    }.get(mutant, shift)
    for b in range(batch):
        for h in range(heads_q):
            u = h % heads_kv if mutant == "wrong group order" else h * heads_kv // heads_q
            u = heads_kv - 1 - u if mutant == "swap heads" else u
            for i in range(blocks_q):
                r = torch.arange(i * block_q, min((i + 1) * block_q, rows_q))
                kept = keep[b, h, i].nonzero()[:, 0].tolist()
                kept = [j for j in kept if j * block_kv <= int(r[-1]) + rows_kv - rows_q]
                kept = kept[:-1] if mutant == "drop last block" else kept
                kept = kept[1:] if mutant == "drop first block" else kept
                o, m, s = walk(
                    q[b, r, h], k[b, :, u], v[b, :, u], r, kept, block_kv, scale, shift, mutant
                )
                o = o / (s if mutant == "forget empty rows" else s.masked_fill(s == 0, 1))[:, None]
                out[b, r, h] = o.to(q.dtype)
                row_lse = s.log() if mutant == "lse without maximum" else m + s.log()
                if mutant == "lse of an empty row is +inf":
                    row_lse = row_lse.masked_fill(s == 0, math.inf)
                lse[b, h, r] = row_lse * (math.log2(math.e) if mutant == "lse in log2" else 1)
    if mutant == "one row not written":
        out[0, -1, 0] = 0
    if mutant == "one column of out":
        out[..., 3] = out[..., 2]
    if mutant == "nan in one place":
        out[0, 7, 1, 5] = math.nan
    return out, lse


def walk(q, k, v, r, kept, block_kv, scale, shift, mutant):
    """One query block over its kept KV blocks: (sum of weighted v, maximum, sum of weights)."""
    rows_kv = k.shape[0]
    o = torch.zeros(len(r), v.shape[1])
    m = torch.full((len(r),), -math.inf)
    total = torch.zeros(len(r))
    for j in kept:
        c = torch.arange(j * block_kv, (j + 1) * block_kv)
        inside = c < rows_kv
        kb, vb = (
            torch.where(inside[:, None], x[c.clamp(max=rows_kv - 1)].float(), 0.0) for x in (k, v)
        )
        if mutant == "ragged tail counted":
            inside = torch.ones_like(inside)
        seen = (c[None] <= r[:, None] + shift) & inside
        if mutant == "ragged tail counted":
            seen = seen | (c >= rows_kv)
        score = (q.float() @ kb.T * scale).masked_fill(~seen, -math.inf)
        top = torch.maximum(m, score.amax(1))
        base = top.masked_fill(top == -math.inf, 0.0)
        p = (score - base[:, None]).exp()
        correct = (m - base).exp()
        total = total * (1 if mutant == "skip rescale of sum" else correct) + p.sum(1)
        p = p.to(torch.float8_e5m2 if mutant == "weights in fp8" else q.dtype).float()
        o = o * (1 if mutant == "skip rescale of out" else correct[:, None]) + p @ vb
        if mutant == "out accumulated at the input type":
            o = o.to(q.dtype).float()
        m = top
    return o, m, total


def problem(seed, dtype=torch.bfloat16):
    """A ragged causal GQA problem with empty rows, in which every mistake above has a victim."""
    q, k, v = inputs.qkv(
        "normal",
        rows_q=ROWS_Q,
        rows_kv=ROWS_KV,
        heads_q=HEADS_Q,
        heads_kv=HEADS_KV,
        dtype=dtype,
        seed=seed,
    )
    bits = make_bits("random_50", rows_q=ROWS_Q, rows_kv=ROWS_KV, heads=HEADS_Q, seed=seed)
    mask = reference.unpack_block_bits(bits, 5)
    mask[0, 1, 2] = False  # an empty row
    mask[0, 3, 3, 1:] = True  # the ragged tail and the diagonal
    return q, k, v, reference.pack_block_bits(mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_right_implementation_passes(dtype, seed):
    args = problem(seed, dtype)
    assert attention.agrees(*online(*args), *args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_fails(mutant, dtype, seed):
    args = problem(seed, dtype)
    assert not attention.agrees(*online(*args, mutant), *args), f"{mutant} went unnoticed"


@pytest.mark.parametrize("mutant", [None, "out accumulated at the input type"])
def test_rounding_that_adds_up(mutant, seed):
    """Rounding the accumulator after every block costs little per block; 512 blocks show it."""
    q, k, v = inputs.qkv("normal", rows_q=32, rows_kv=512 * 64, dtype=torch.bfloat16, seed=seed)
    bits = make_bits("full", rows_q=32, rows_kv=512 * 64)
    assert attention.agrees(*online(q, k, v, bits, mutant), q, k, v, bits) == (mutant is None)


@pytest.mark.parametrize("family", inputs.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_right_implementation_passes_on_every_family(family, dtype, seed):
    q, k, v = inputs.qkv(family, rows_q=200, rows_kv=260, heads_q=2, dtype=dtype, seed=seed)
    bits = make_bits("random_50", rows_q=200, rows_kv=260, heads=2, seed=seed)
    assert attention.agrees(*online(q, k, v, bits), q, k, v, bits)


@pytest.mark.parametrize("error", [1.5, 3.0])
def test_a_small_bias_is_noticed(error, seed):
    """Out of proportion by a few ulp everywhere: beyond the budget, far below any fixed 1e-2."""
    q, k, v, bits = problem(seed)
    out, lse = online(q, k, v, bits)
    step = numerics.ulp(out.dtype)
    assert not attention.agrees(out * (1 + error * 2 * step), lse, q, k, v, bits)
    assert not attention.agrees(out, lse + error * 1e-3, q, k, v, bits)


MAP_MUTANTS = {
    "sum instead of maximum": lambda p, r: p.unflatten(3, (-1, 64)).sum(4).amax(2, keepdim=True),
    "scores instead of probabilities": lambda p, r: r * math.e,
    "normalised": lambda p, r: r / r.sum(-1, keepdim=True),
    "rounded to bf16": lambda p, r: r.bfloat16().double(),
    "off by 1e-4": lambda p, r: r * (1 + 1e-4),
    "transposed": lambda p, r: r.transpose(2, 3),
    "above the diagonal": lambda p, r: r + 1e-30,
}


@pytest.mark.parametrize("mutant", MAP_MUTANTS)
def test_a_wrong_map_fails(mutant, seed):
    q, k, v = inputs.qkv("normal", rows_q=256, rows_kv=256, seed=seed)
    _, _, ref = reference.attn_pool(q, k, v)
    delta = baselines.attention(q, k, v).delta
    prob = torch.rand(1, 1, 256, 256, dtype=torch.float64)
    wrong = MAP_MUTANTS[mutant](prob, ref).expand_as(ref).float()
    limit = map_error(ref, delta)
    assert numerics.check("map", ref.float(), ref, extra=limit).ok
    exact_zero = ((wrong == 0) == (ref == 0)).all()
    assert not (numerics.check("map", wrong, ref, extra=limit).ok and exact_zero)


SELECT_MUTANTS = {
    "one block missing": lambda m, s: m & ~first_true(m),
    "one block too many": lambda m, s: m | first_true(reference_free(m)),
    "not causal": lambda m, s: m | (s == -math.inf),
    "nothing": lambda m, s: m & False,
}


def first_true(mask):
    flat = torch.zeros(mask.numel(), dtype=torch.bool)
    flat[mask.flatten().nonzero()[0]] = True
    return flat.view(mask.shape)


def reference_free(mask):
    """Visible blocks that are not selected."""
    return ~mask & reference.gate_visible(*mask.shape[-2:], True)


@pytest.mark.parametrize("mutant", SELECT_MUTANTS)
@pytest.mark.parametrize("method, value", [(0, 0.05), (1, 5), (2, 0.3), (3, 0.7)])
def test_a_wrong_selection_fails(mutant, method, value, seed):
    scores = torch.randn(1, 2, 20, 20, generator=inputs.generator(seed), dtype=torch.float64)
    scores = scores.masked_fill(~reference.gate_visible(20, 20, True), -math.inf)
    rule = {"method": method, "value": value}
    mask = reference.select_blocks(scores, **rule)
    selection.check("right", reference.pack_block_bits(mask), scores, 1e-6, **rule)
    wrong = reference.pack_block_bits(SELECT_MUTANTS[mutant](mask, scores))
    with pytest.raises(AssertionError):
        selection.check("wrong", wrong, scores, 1e-6, **rule)


def test_the_report_names_the_place(seed):
    """The worst coordinates with their names and blocks."""
    q, k, v, bits = problem(seed)
    out, _ = online(q, k, v, bits)
    ref, _ = reference.block_sparse_attn(q, k, v, bits)
    out[0, 200, 3, 17] += 1
    report = attention.judge_out("x", out, ref, baselines.attention(q, k, v, bits), strict=False)
    assert not report.ok
    assert "[batch=0 row=200 head=3 d=17] (row block 3)" in report.text()
