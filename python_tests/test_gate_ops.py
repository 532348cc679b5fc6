# SPDX-License-Identifier: Apache-2.0
"""torch.ops.seer.pool_gate, gate_scores and gate_select against the oracle."""

import itertools
import math

import baselines
import inputs
import numerics
import pytest
import selection
import torch
from attention import DTYPES, VARIANTS
from grid import case_id, pairwise

from seer_cuda import reference

# What compute-sanitizer looks at: kernels of ours, not the torch operations behind them.
DIMS = {row["head_dim"] for row in VARIANTS["kernels"] if row["op"] == "pool_gate"}
GATE_DIMS = {row["head_dim"] for row in VARIANTS["kernels"] if row["op"] == "gate_select"}

POOL_AXES = ("batch", "block", "head", "channel")
SCORE_AXES = ("batch", "head", "i", "j")


def has_kernel(case):
    """Whether a compiled kernel serves this case on CUDA."""
    if "head_dim" in case:
        return case["head_dim"] in DIMS and case["gate_dim"] in {*GATE_DIMS, None}
    return case["gate_dim"] in GATE_DIMS


def on_devices(make_axes):
    """One pytest parameter per case of make_axes(device), on both devices."""
    for device in ("cpu", "cuda"):
        served = 0
        for case in pairwise(make_axes(device)):
            marks = [pytest.mark.gpu] if device == "cuda" else []
            if device == "cuda" and has_kernel(case):
                served += 1
                if served % 10 == 1 and served < 40:
                    marks.append(pytest.mark.reduced)
            yield pytest.param(device, case, id=f"{device}-{case_id(case)}", marks=marks)


def rope(blocks, width, *, batch=None, block=64, device="cpu"):
    """cos and sin at each block's first token, as a model computes them."""
    first = torch.arange(0, blocks * block, block)[:, None]
    angle = first * 10000.0 ** -torch.linspace(0, 1, width)
    angle = angle if batch is None else angle + torch.arange(batch)[:, None, None]
    return angle.cos().float().to(device), angle.sin().float().to(device)


def fp32_sums_error(x, weight, block, pools):
    """Bound of what the roundings of two sums in fp32 do to a gate embedding: that of an average
    over tokens, and that of the projection over channels."""
    error = torch.zeros_like(reference.pool_gate(x, block=block, pools=pools))
    if pools & 4:  # the last channels
        mean = reference.pool_gate(x.abs(), block=block, pools=4)
        error[..., -x.shape[3] :] = numerics.EPS32 * math.sqrt(min(block, x.shape[1])) * mean
    if weight is None:
        return error
    size = reference.pool_gate(x, block=block, pools=pools).abs()
    error = error + 2 * numerics.EPS32 * math.sqrt(weight.shape[1]) * size
    return reference.pool_gate(error, weight.abs(), block=1)


def run_and_check_pool(x, weight=None, cos=None, sin=None, *, block=64, pools=4):
    gate = torch.ops.seer.pool_gate(x, weight, cos, sin, block=block, pools=pools)
    assert (gate.dtype, gate.device, gate.is_contiguous()) == (x.dtype, x.device, True)
    ref = reference.pool_gate(x, weight, cos, sin, block=block, pools=pools)
    base = baselines.pool_gate(x, weight, cos, sin, block=block, pools=pools)
    extra = float(fp32_sums_error(x, weight, block, pools).max()) if gate.numel() else 0.0
    numerics.compare("pool_gate", gate, ref, base, extra=extra, axes=POOL_AXES)
    return gate


def pool_axes(device):
    return {
        "dtype": DTYPES[device],
        "head_dim": (64, 128, 40),
        "pools": tuple(range(1, 8)),
        "heads": ((4, 4), (2, 8), (1, 7), (2, 24)),
        "gate_dim": (128, 64, None, 48),
        "rotary": ("none", "full", "half", "batched"),
        "rows": (1, 63, 64, 65, 200, 448, 2500),
        "block": (64, 128, 32, 16, 24),
        "layout": inputs.LAYOUTS,
        "batch": (1, 2),
    }


@pytest.mark.parametrize("device, case", list(on_devices(pool_axes)))
def test_pool_gate(device, case, seed):
    heads, heads_out = case["heads"]
    dtype, batch, head_dim = case["dtype"], case["batch"], case["head_dim"]
    x = inputs.qkv(
        "normal",
        rows_q=1,
        rows_kv=case["rows"],
        batch=batch,
        heads_q=heads,
        heads_kv=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        layout=case["layout"],
        seed=seed,
    )[1]
    channels = head_dim * case["pools"].bit_count()
    weight, width = None, channels
    if case["gate_dim"]:
        width = case["gate_dim"]
        draw = torch.randn(heads_out, channels, width, generator=inputs.generator(seed + 1))
        weight = (draw / channels**0.5).to(device=device, dtype=dtype)
    cos = sin = None
    if case["rotary"] != "none":
        blocks = -(-case["rows"] // case["block"])
        half = width // 4 if case["rotary"] == "half" else width // 2
        batched = batch if case["rotary"] == "batched" else None
        cos, sin = rope(blocks, half, batch=batched, block=case["block"], device=device)
    run_and_check_pool(x, weight, cos, sin, block=case["block"], pools=case["pools"])


@pytest.mark.parametrize("pools", [1, 2, 3])
def test_max_and_min_are_exact(device, pools, seed):
    """Maxima and minima are elements of x: without weight and RoPE nothing is rounded."""
    x = inputs.qkv(
        "normal", rows_q=300, rows_kv=1, heads_q=3, dtype=torch.bfloat16, device=device, seed=seed
    )[0]
    gate = torch.ops.seer.pool_gate(x, pools=pools)
    numerics.assert_bitwise("pool", gate, reference.pool_gate(x, pools=pools).to(x.dtype))


def test_average_of_the_last_block_counts_its_tokens(device):
    x = torch.ones(1, 70, 1, 64, dtype=torch.float16, device=device) * 3
    assert (torch.ops.seer.pool_gate(x) == 3).all()


def test_pool_gate_of_no_rows(device):
    x = torch.ones(2, 0, 3, 64, dtype=torch.bfloat16, device=device)
    assert torch.ops.seer.pool_gate(x, pools=5).shape == (2, 0, 3, 128)
    x = torch.ones(0, 10, 3, 64, dtype=torch.bfloat16, device=device)
    assert torch.ops.seer.pool_gate(x).shape == (0, 1, 3, 64)


def test_pool_gate_of_no_output_heads(device):
    x = torch.ones(2, 100, 3, 64, dtype=torch.bfloat16, device=device)
    assert torch.ops.seer.pool_gate(x, x.new_ones(0, 64, 32)).shape == (2, 2, 0, 32)


def gates(device, dtype, *, batch=1, blocks=(5, 5), heads=(4, 2), gate_dim=64, seed=0, std=1.0):
    gen = inputs.generator(seed)
    q = torch.randn(batch, blocks[0], heads[0], gate_dim, generator=gen) * std
    k = torch.randn(batch, blocks[1], heads[1], gate_dim, generator=gen)
    return q.to(device=device, dtype=dtype), k.to(device=device, dtype=dtype)


def score_axes(device):
    return {
        "dtype": DTYPES[device],
        "gate_dim": (64, 128, 192),
        "heads": ((4, 4), (4, 2), (7, 1)),
        "blocks": ((1, 1), (5, 5), (33, 33), (7, 70), (70, 7), (130, 130)),
        "causal": (True, False),
        "scale": (None, 1.0),
        "batch": (1, 2),
    }


@pytest.mark.parametrize("device, case", list(on_devices(score_axes)))
def test_gate_scores(device, case, seed):
    q, k = gates(
        device,
        case["dtype"],
        batch=case["batch"],
        blocks=case["blocks"],
        heads=case["heads"],
        gate_dim=case["gate_dim"],
        seed=seed,
    )
    kw = {"scale": case["scale"], "causal": case["causal"]}
    scores = torch.ops.seer.gate_scores(q, k, **kw)
    assert scores.dtype == torch.float32
    ref = reference.gate_scores(q, k, **kw)
    error = baselines.gate_score_error(q, k, scale=case["scale"])
    numerics.compare("gate_scores", scores, ref, extra=error, axes=SCORE_AXES)


RULES = {
    "threshold": {"method": 0, "value": 0.02},
    "threshold_zero": {"method": 0, "value": 0.0},
    "topk_1": {"method": 1, "value": 1},
    "topk_7": {"method": 1, "value": 7},
    "topk_all": {"method": 1, "value": 1000},
    "density_10": {"method": 2, "value": 0.1},
    "density_50": {"method": 2, "value": 0.5},
    "density_1": {"method": 2, "value": 1.0},
    "topp_90": {"method": 3, "value": 0.9},
    "topp_30": {"method": 3, "value": 0.3},
}
FORCED = {
    "free": {},
    "sink": {"sink": 2},
    "local": {"local": 1},
    "wide_local": {"local": 40},
    "last_rows": {"dense_last_rows": 2},
    "all_forced": {"sink": 1, "local": 2, "dense_last_rows": 1},
}


def select_axes(device):
    return score_axes(device) | {
        "rule": tuple(RULES),
        "forced": tuple(FORCED),
        "std": (1.0, 4.0, 0.05),
    }


@pytest.mark.parametrize("device, case", list(on_devices(select_axes)))
def test_gate_select(device, case, seed):
    q, k = gates(
        device,
        case["dtype"],
        batch=case["batch"],
        blocks=case["blocks"],
        heads=case["heads"],
        gate_dim=case["gate_dim"],
        std=case["std"],
        seed=seed,
    )
    rule = RULES[case["rule"]] | FORCED[case["forced"]]
    kw = {"scale": case["scale"], "causal": case["causal"]}
    bits = torch.ops.seer.gate_select(q, k, **kw, **rule)
    scores = reference.gate_scores(q, k, **kw)
    delta = baselines.gate_score_error(q, k, scale=case["scale"])
    selection.check("gate_select", bits, scores, delta, causal=case["causal"], **rule)
    if case["forced"] == "free" and rule["method"] in (1, 2):
        blocks_kv = case["blocks"][1]
        k = int(rule["value"])
        if rule["method"] == 2:
            k = max(1, math.floor((1 - math.sqrt(1 - rule["value"])) * blocks_kv))
        selection.check_counts(bits, blocks_kv, case["causal"], k)


def exact_gates(device, values, heads=1):
    """Gates whose fp32 scores are exactly `values` [blocks_q, blocks_kv], integers: no rounding."""
    blocks_q, blocks_kv = values.shape
    width = 64
    assert blocks_q <= width
    q = torch.eye(blocks_q, width)[None, :, None].expand(1, -1, heads, -1)
    k = torch.zeros(1, blocks_kv, heads, width)
    k[0, :, :, :blocks_q] = values.T[:, None]
    return (x.to(device=device, dtype=torch.bfloat16) for x in (q.contiguous(), k))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", [x for x in RULES if "topk" in x or "density" in x])
def test_ties_go_to_the_lower_index(device, rule, causal, seed):
    values = torch.randint(0, 3, (40, 90), generator=inputs.generator(seed)).float()
    q, k = exact_gates(device, values)
    bits = torch.ops.seer.gate_select(q, k, scale=1.0, causal=causal, **RULES[rule])
    want = reference.gate_select(q, k, scale=1.0, causal=causal, **RULES[rule])
    numerics.assert_bitwise(rule, bits, want)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100])
def test_constant_scores(device, count):
    """All scores equal: topk keeps the first blocks, threshold all or nothing, topp a prefix."""
    q, k = exact_gates(device, torch.zeros(2, count))
    kw = {"scale": 1.0, "causal": False}

    def kept(**rule):
        bits = torch.ops.seer.gate_select(q, k, **kw, **rule)
        return reference.unpack_block_bits(bits, count)[0, 0, 0].tolist()

    assert kept(method=1, value=3) == [j < 3 for j in range(count)]
    assert kept(method=0, value=1.01 / count) == [False] * count
    assert kept(method=0, value=0.99 / count) == [True] * count
    half = math.ceil((count - 0.5) / 2)
    assert kept(method=3, value=(count - 0.5) / 2 / count) == [j < half for j in range(count)]


@pytest.mark.parametrize("rule", ["topk_7", "density_50"])
def test_nan_scores_rank_nowhere(device, rule, seed):
    q, k = gates(device, torch.bfloat16, blocks=(20, 40), heads=(2, 1), seed=seed)
    k[:, 3:9] = math.nan
    bits = torch.ops.seer.gate_select(q, k, **RULES[rule])
    mask = reference.unpack_block_bits(bits, 40)
    assert not mask[..., 3:9].any()
    scores = reference.gate_scores(q, k)
    delta = baselines.gate_score_error(q, k.nan_to_num(0.0))
    selection.check("gate_select", bits, scores, delta, **RULES[rule])


@pytest.mark.parametrize("rule", ["threshold_zero", "topp_90"])
def test_nan_scores_are_never_selected(device, rule, seed):
    q, k = gates(device, torch.bfloat16, blocks=(20, 40), heads=(2, 1), seed=seed)
    k[:, 3:9] = math.nan
    bits = torch.ops.seer.gate_select(q, k, **RULES[rule])
    assert not reference.unpack_block_bits(bits, 40)[..., 3:9].any()
    forced = torch.ops.seer.gate_select(q, k, **RULES[rule], sink=4)
    mask = reference.unpack_block_bits(forced, 40)
    assert mask[..., :4].all() and not mask[..., 4:9].any()


def test_rows_of_nan(device, seed):
    """A query block of NaN selects nothing but what is forced."""
    q, k = gates(device, torch.bfloat16, blocks=(20, 20), seed=seed)
    q[:, 5] = math.nan
    for rule in RULES.values():
        bits = torch.ops.seer.gate_select(q, k, **rule)
        assert (bits[:, :, 5] == 0).all()
        bits = torch.ops.seer.gate_select(q, k, **rule, local=1)
        assert (bits[:, :, 5] == 1 << 5).all()


def test_nothing_visible(device, seed):
    """More query blocks than KV blocks: the first rows see nothing and keep nothing."""
    q, k = gates(device, torch.bfloat16, blocks=(9, 4), seed=seed)
    for rule, forced in itertools.product(RULES.values(), FORCED.values()):
        bits = torch.ops.seer.gate_select(q, k, **rule, **forced)
        assert (bits[:, :, :5] == 0).all()


@pytest.mark.parametrize("blocks", [(0, 5), (5, 0)])
def test_no_blocks(device, blocks):
    q, k = gates(device, torch.bfloat16, blocks=blocks)
    assert torch.ops.seer.gate_scores(q, k).shape == (1, 4, *blocks)
    bits = torch.ops.seer.gate_select(q, k, method=1, value=3)
    assert bits.shape == (1, 4, blocks[0], -(-blocks[1] // 32))


@pytest.mark.parametrize("rule", ["topk_7", "topp_90", "threshold"])
def test_many_blocks(device, rule, seed):
    """A long row: 2050 KV blocks of 131 k tokens."""
    q, k = gates(device, torch.bfloat16, blocks=(3, 2050), heads=(2, 2), std=2.0, seed=seed)
    bits = torch.ops.seer.gate_select(q, k, **RULES[rule])
    selection.check(
        "gate_select",
        bits,
        reference.gate_scores(q, k),
        baselines.gate_score_error(q, k),
        **RULES[rule],
    )
