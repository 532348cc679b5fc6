# SPDX-License-Identifier: Apache-2.0
"""pool_gate, gate_scores and gate_select of packed sequences: against the oracle, and every
sequence against a call of its own."""

from itertools import accumulate, pairwise

import baselines
import inputs
import numerics
import pytest
import selection
import torch
from attention import DTYPES
from grid import case_id
from grid import pairwise as pairs
from test_gate_ops import FORCED, POOL_AXES, RULES, SCORE_AXES, gates, has_kernel, rope

from seer_cuda import reference

ops = torch.ops.seer
LENGTHS = {
    "one": [150],
    "ragged": [1, 200, 64, 130],
    "empty": [0, 70, 0, 0, 65, 0],
    "long": [1100, 5, 300],
    "many": [40 + 31 * n % 90 for n in range(11)],
    "none": [0, 0],
}


def cases(make_axes):
    """One pytest parameter per pairwise case, on both devices."""
    for device in ("cpu", "cuda"):
        served = 0
        for case in pairs(make_axes(device)):
            marks = [pytest.mark.gpu] if device == "cuda" else []
            if device == "cuda" and has_kernel(case):
                served += 1
                if served % 10 == 1 and served < 30:
                    marks.append(pytest.mark.reduced)
            yield pytest.param(device, case, id=f"{device}-{case_id(case)}", marks=marks)


def spans(lengths):
    return [slice(a, b) for a, b in pairwise([0, *accumulate(lengths)])]


def pool_axes(device):
    return {
        "dtype": DTYPES[device],
        "head_dim": (64, 128, 40),
        "pools": tuple(range(1, 8)),
        "heads": ((4, 4), (2, 8), (1, 7), (2, 24)),
        "gate_dim": (128, 64, None, 48),
        "rotary": ("none", "full", "half", "batched"),
        "lengths": tuple(LENGTHS),
        "block": (64, 128, 16, 24),
        "gaps": (False, True),
        "more": (0, 333),
    }


@pytest.mark.parametrize("device, case", list(cases(pool_axes)))
def test_pool_gate(device, case, seed):
    (heads, heads_out), lengths = case["heads"], LENGTHS[case["lengths"]]
    dtype, head_dim, block = case["dtype"], case["head_dim"], case["block"]
    gen = inputs.generator(seed)
    x = torch.randn(sum(lengths), heads, head_dim, generator=gen).to(device, dtype)
    x = inputs.with_gaps(x, 1, 8) if case["gaps"] else x
    channels = head_dim * case["pools"].bit_count()
    width, weight = case["gate_dim"] or channels, None
    if case["gate_dim"]:
        weight = torch.randn(heads_out, channels, width, generator=gen) / channels**0.5
        weight = weight.to(device, dtype)
    most = max(1, *lengths) + case["more"]
    blocks, cos, sin = -(-most // block), None, None
    if case["rotary"] != "none":
        half = width // 4 if case["rotary"] == "half" else width // 2
        batched = len(lengths) if case["rotary"] == "batched" else None
        cos, sin = rope(blocks, half, batch=batched, block=block, device=device)
    cut = {"block": block, "pools": case["pools"]}
    packed = (weight, cos, sin, inputs.packed(lengths).to(device))
    gate = ops.pool_gate(x, *packed, **cut, max_rows=most)
    assert gate.dtype == dtype and gate.is_contiguous()
    ref = reference.pool_gate(x, *packed, **cut, max_rows=most)
    base = torch.zeros_like(ref, dtype=dtype)
    for n, at in enumerate(spans(lengths)):
        own = -(-lengths[n] // block)
        assert (gate[n, own:] == 0).all()
        if not own:
            continue
        angles = [t if t is None else (t if t.dim() == 2 else t[n])[:own] for t in (cos, sin)]
        base[n, :own] = baselines.pool_gate(x[None, at], weight, *angles, **cut)[0]
        # Not a bit differs from a call of the sequence alone.
        alone = ops.pool_gate(x[None, at], weight, *angles, **cut)
        if device == "cpu" or has_kernel(case):
            numerics.assert_bitwise(f"sequence {n}", gate[n, :own], alone[0])
    extra = 0.0
    if gate.numel() and x.numel() and weight is not None:
        size = x.abs().max().double() * weight.abs().double().sum(1).max()
        extra = 2 * numerics.EPS32 * float(size)
    numerics.compare("pool_gate", gate, ref, base, extra=extra, axes=POOL_AXES)


def score_axes(device):
    return {
        "dtype": DTYPES[device],
        "gate_dim": (64, 128, 192),
        "heads": ((4, 4), (4, 2), (7, 1)),
        "lengths": tuple(LENGTHS),
        "past": (0, 64, 640),
        "block": (64, 16),
        "causal": (True, False),
        "more": (0, 3),
    }


def packed_gates(device, case, seed, std=1.0):
    """q_gate, k_gate and the packing: KV sequences longer by `past`, gates wider by `more`."""
    block, lengths = case["block"], LENGTHS[case["lengths"]]
    rows_kv = [n + case["past"] if n else 0 for n in lengths]
    blocks = [-(-max(1, *rows) // block) + case["more"] for rows in (lengths, rows_kv)]
    q, k = gates(
        device,
        case["dtype"],
        batch=len(lengths),
        blocks=blocks,
        heads=case["heads"],
        gate_dim=case["gate_dim"],
        std=std,
        seed=seed,
    )
    own = [(-(-a // block), -(-b // block)) for a, b in zip(lengths, rows_kv, strict=True)]
    for n, (i, j) in enumerate(own):  # what lies past a sequence has no influence
        q[n, i:], k[n, j:] = float("nan"), float("nan")
    lengths = tuple(inputs.packed(rows).to(device) for rows in (lengths, rows_kv))
    return q, k, lengths, {"block_q": block, "block_kv": block}, own


@pytest.mark.parametrize("device, case", list(cases(score_axes)))
def test_gate_scores(device, case, seed):
    q, k, lengths, blocks, own = packed_gates(device, case, seed)
    kw = {"causal": case["causal"], **blocks}
    scores = ops.gate_scores(q, k, *lengths, **kw)
    error = baselines.gate_score_error(q.nan_to_num(), k.nan_to_num())
    ref = reference.gate_scores(q, k, *lengths, **kw)
    numerics.compare("gate_scores", scores, ref, extra=error, axes=SCORE_AXES)
    for n, (i, j) in enumerate(own):
        assert (scores[n, :, i:] == -torch.inf).all() and (scores[n, ..., j:] == -torch.inf).all()


def select_axes(device):
    return score_axes(device) | {"rule": tuple(RULES), "forced": tuple(FORCED), "std": (1.0, 4.0)}


@pytest.mark.parametrize("device, case", list(cases(select_axes)))
def test_gate_select(device, case, seed):
    q, k, lengths, blocks, own = packed_gates(device, case, seed, case["std"])
    rule, causal = RULES[case["rule"]] | FORCED[case["forced"]], case["causal"]
    bits = ops.gate_select(q, k, *lengths, causal=causal, **rule, **blocks)
    mask = reference.unpack_block_bits(bits, bits.shape[-1] * 32)
    delta = baselines.gate_score_error(q.nan_to_num(), k.nan_to_num())
    for n, (i, j) in enumerate(own):
        assert not mask[n, :, i:].any() and not mask[n, ..., j:].any()
        if not i or not j:
            continue
        q_n, k_n = q[n, None, :i], k[n, None, :j]
        mine = reference.pack_block_bits(mask[n, None, :, :i, :j])
        scores = reference.gate_scores(q_n, k_n, causal=causal)
        selection.check(f"sequence {n}", mine, scores, delta, causal=causal, **rule)
        if device == "cpu" or has_kernel(case):
            alone = ops.gate_select(q_n, k_n, causal=causal, **rule)
            numerics.assert_bitwise(f"sequence {n}", mine, alone)


@pytest.mark.parametrize("rule", ["topk_7", "density_50", "density_1"])
def test_ties_of_each_sequence(device, rule, seed):
    """Integer scores: the oracle's bits exactly, the density of each sequence's own blocks."""
    values = torch.randint(0, 3, (40, 90), generator=inputs.generator(seed)).float()
    q = torch.eye(40, 64)[None, :, None].expand(3, -1, 2, -1).contiguous()
    k = torch.zeros(3, 90, 2, 64)
    k[..., :40] = values.T[None, :, None]
    q, k = (x.to(device, torch.bfloat16) for x in (q, k))
    lengths = [inputs.packed(rows).to(device) for rows in ([640, 33, 200], [1440, 64, 201])]
    kw = {"scale": 1.0, "block_q": 16, "block_kv": 16, **RULES[rule]}
    bits = ops.gate_select(q, k, *lengths, **kw)
    numerics.assert_bitwise(rule, bits, reference.gate_select(q, k, *lengths, **kw))


@pytest.mark.parametrize("rule", ["topk_7", "topp_30", "threshold"])
def test_long_rows(device, rule, seed):
    """Rows so long that ranks are found a few at a time; one sequence ends inside a tile."""
    case = {"dtype": torch.bfloat16, "heads": (2, 1), "gate_dim": 64, "block": 64}
    q, k = gates(device, case["dtype"], batch=2, blocks=(40, 5000), heads=(2, 1), seed=seed)
    lengths = [inputs.packed(rows).to(device) for rows in ([2560, 1200], [320000, 250000])]
    bits = ops.gate_select(q, k, *lengths, **RULES[rule])
    for n, (i, j) in enumerate(((40, 5000), (19, 3907))):
        alone = ops.gate_select(q[n, None, :i], k[n, None, :j], **RULES[rule])
        words = -(-j // 32)
        numerics.assert_bitwise(f"sequence {n}", bits[n, None, :, :i, :words], alone)
        assert not bits[n, :, i:].any() and not bits[n, ..., words:].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_torch_operations(rule, causal, seed):
    """What runs where no kernel was compiled makes the decisions of the CPU kernels."""
    case = {"dtype": torch.float32, "heads": (4, 2), "gate_dim": 48, "block": 16}
    case |= {"lengths": "ragged", "past": 64, "more": 1}
    q, k, lengths, blocks, _ = packed_gates("cpu", case, seed)
    kw = {"causal": causal, **blocks}
    made = ops._gate_scores_torch(q, k, *lengths, **kw)
    torch.testing.assert_close(made, ops.gate_scores(q, k, *lengths, **kw), rtol=1e-5, atol=1e-5)
    kw |= RULES[rule] | FORCED["all_forced"]
    bits = [op(q, k, *lengths, **kw) for op in (ops._gate_select_torch, ops.gate_select)]
    masks = [reference.unpack_block_bits(x, 32) for x in bits]
    # Scores of two roundings may fall on two sides of one boundary.
    assert (masks[0] != masks[1]).sum() <= 1


@pytest.mark.parametrize("rule", RULES)
def test_torch_operations_on_chunks(rule, seed):
    """The longest queries and the longest keys belong to two sequences: the batch's own diagonal is
    nobody's."""
    blocks = {"block_q": 16, "block_kv": 16}
    rows_q, rows_kv = [16, 100, 32, 16], [80, 100, 640, 16]
    lengths = [inputs.packed(rows) for rows in (rows_q, rows_kv)]
    q, k = gates(
        "cpu", torch.float32, batch=4, blocks=(7, 40), heads=(4, 2), gate_dim=48, seed=seed
    )
    made = ops._gate_scores_torch(q, k, *lengths, **blocks)
    torch.testing.assert_close(
        made, ops.gate_scores(q, k, *lengths, **blocks), rtol=1e-5, atol=1e-5
    )
    kw = blocks | RULES[rule] | FORCED["all_forced"]
    bits = [op(q, k, *lengths, **kw) for op in (ops._gate_select_torch, ops.gate_select)]
    masks = [reference.unpack_block_bits(x, 40) for x in bits]
    assert (masks[0] != masks[1]).sum() <= 1


@pytest.mark.parametrize("pools", range(1, 8))
@pytest.mark.parametrize("lengths", LENGTHS)
def test_torch_pooling(lengths, pools, seed):
    rows = LENGTHS[lengths]
    gen = inputs.generator(seed)
    x = torch.randn(sum(rows), 2, 40, generator=gen)
    weight = torch.randn(4, 40 * pools.bit_count(), 24, generator=gen)
    most = max(1, *rows) + 5
    tables = rope(-(-most // 16), 12, block=16)
    args = (x, weight, *tables, inputs.packed(rows))
    kw = {"block": 16, "pools": pools, "max_rows": most}
    made = ops._pool_gate_torch(*args, **kw)
    torch.testing.assert_close(made, ops.pool_gate(*args, **kw), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.reduced
@pytest.mark.parametrize("edges", [[3, 90, 170], [0, 300, 100], [-5, 70, 10**6], [9, 9, 9]])
@pytest.mark.parametrize("weighted", [False, True])
def test_wrong_contents_reach_nothing_outside(edges, weighted, seed):
    """CUDA does not read cu_seqlens beforehand: whatever they hold, sequences are cut to x and to
    max_rows, as the oracle cuts them."""
    gen = inputs.generator(seed)
    x = torch.randn(200, 2, 64, generator=gen).to("cuda", torch.bfloat16)
    weight = torch.randn(4, 64, 64, generator=gen).to("cuda", torch.bfloat16) if weighted else None
    cu = torch.tensor(edges, dtype=torch.int32, device="cuda")
    gate = ops.pool_gate(x, weight, None, None, cu, max_rows=100)
    ref = reference.pool_gate(x, weight, None, None, cu, max_rows=100)
    torch.testing.assert_close(gate.double(), ref, rtol=2e-2, atol=2e-2)
    bits = ops.gate_select(gate, gate, cu, cu, method=1, value=1.0, local=1)
    assert bits.shape == (2, gate.shape[2], 2, 1)


def test_refuses_what_no_memory_holds(device):
    """A product of sizes beyond 2^63 is an error and no size."""
    x = torch.zeros(0, 8, 64, device=device)
    cu = torch.zeros(2**20, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=r"seer::pool_gate: max_rows: expected .+, got .+"):
        ops.pool_gate(x, None, None, None, cu, block=1, max_rows=2**31 - 1)


@pytest.mark.parametrize("pools", [1, 4, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_pool_gate(device, pools, weighted, seed):
    lengths, heads = [70, 0, 130, 5], 2
    gen = inputs.generator(seed)
    total = sum(lengths)
    x = torch.rand(total, heads, 16, generator=gen).argsort(0).to(device, torch.float32) / 32
    x = x.requires_grad_()
    channels = 16 * pools.bit_count()
    weight = torch.randn(4, channels, 8, generator=gen).to(device).requires_grad_()
    cos, sin = (t.to(device) for t in rope(5, 4, block=32))
    args = (weight if weighted else None, cos, sin, inputs.packed(lengths).to(device))
    kw = {"block": 32, "pools": pools, "max_rows": 150}
    gate = ops.pool_gate(x, *args, **kw)
    grad = torch.randn(gate.shape, generator=gen).to(device)
    leaves = (x, weight) if weighted else (x,)
    made = torch.autograd.grad(gate, leaves, grad)
    wanted = torch.autograd.grad(reference.pool_gate(x, *args, **kw), leaves, grad.double())
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_gate_scores(device, causal, seed):
    case = {"dtype": torch.float32, "heads": (4, 2), "gate_dim": 16, "block": 16}
    case |= {"lengths": "ragged", "past": 64, "more": 1}
    q, k, lengths, blocks, own = packed_gates(device, case, seed)
    q, k = (x.nan_to_num().requires_grad_() for x in (q, k))
    kw = {"causal": causal, **blocks}
    grad = torch.randn(4, 4, q.shape[1], k.shape[1], generator=inputs.generator(seed)).to(device)
    made = torch.autograd.grad(ops.gate_scores(q, k, *lengths, **kw), (q, k), grad)
    scores = reference.gate_scores(q, k, *lengths, **kw)
    wanted = torch.autograd.grad(scores, (q, k), grad.double())
    for a, b, side in zip(made, wanted, (0, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for n, ends in enumerate(own):
            assert (a[n, ends[side] :] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_what_lies_past_a_sequence_has_no_part_in_gradients(device, causal, seed):
    case = {"dtype": torch.float32, "heads": (4, 2), "gate_dim": 16, "block": 16}
    case |= {"lengths": "ragged", "past": 64, "more": 1}
    q, k, lengths, blocks, _ = packed_gates(device, case, seed)
    grads = []
    for pair in ((q, k), (q.nan_to_num(), k.nan_to_num())):
        leaves = [x.requires_grad_() for x in pair]
        scores = ops.gate_scores(*leaves, *lengths, causal=causal, **blocks)
        grads.append(torch.autograd.grad(scores, leaves, torch.ones_like(scores)))
    for dirty, clean in zip(*grads, strict=True):
        assert clean.any() and torch.equal(dirty, clean)


def test_tokens_of_no_sequence_get_no_gradient(seed):
    """Where max_rows cuts sequences, which CUDA allows; here the formulas alone."""
    from seer_cuda import _gate_packed

    x = torch.randn(12, 1, 3, generator=inputs.generator(seed), dtype=torch.float64)
    x.requires_grad_()
    packing = _gate_packed.Packing.of(torch.tensor([1, 6, 6, 10]), 12, 4, 2)
    gate = _gate_packed.pool_blocks(x, packing, 7)
    cu = torch.tensor([1, 6, 6, 10])
    ref = reference.pool_gate(x, None, None, None, cu, block=2, pools=7, max_rows=4)
    torch.testing.assert_close(gate, ref)
    grad = torch.randn(gate.shape, generator=inputs.generator(seed + 1), dtype=torch.float64)
    made = _gate_packed.pool_blocks_backward(grad, x.detach(), packing, 7)
    (wanted,) = torch.autograd.grad(ref, x, grad)
    torch.testing.assert_close(made, wanted)
    assert (made[[0, 5, 10, 11]] == 0).all() and made[1:5].any()
