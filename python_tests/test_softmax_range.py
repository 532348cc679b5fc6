# SPDX-License-Identifier: Apache-2.0
"""Scores against a softmax that keeps the reference of the first block it meets and raises it late.

Two channels of q and k carry the scores: channel 0 of k is the level of its block in log2 units,
channel 0 of q says how a row takes it (not at all, as it is, or turned round); with scale ln 2 the
score of row r at column c is q[r, 0] * level(c) plus noise of about one unit.
"""

import math
from dataclasses import replace
from itertools import product

import attention
import baselines
import inputs
import numerics
import pytest
import torch
from attention import FAMILIES, has_kernel, make_bits, run_repeatedly, small
from grid import case_id, pairwise

from seer_cuda import reference

LN2 = math.log(2.0)
TILE = 64
STORIES = (
    *(f"step_{height}" for height in (10, 40, 100, 127, 200, 1024)),
    "pit",
    *(f"ramp_{step}" for step in (1, 7, 9, 30)),
    "saw",
    "hot_key",
)
PLACES = ("first", "middle", "last")


def levels(story: str, place: str, rows_kv: int) -> torch.Tensor:
    """The level of every column, in log2 units. `place` is where the story has its summit."""
    column = torch.arange(rows_kv)
    tile, last = column // TILE, (rows_kv - 1) // TILE
    summit = {"first": 0, "middle": last // 2, "last": last}[place]
    kind, _, height = story.partition("_")
    if kind == "step":  # one tile far above the others
        return (tile == summit) * float(height)
    if kind == "pit":  # one tile far below them
        return (tile == summit) * -1e4
    if kind == "ramp":  # each tile above its neighbour, by less than a lift or by more
        return (tile - summit).abs() * -float(height)
    if kind == "saw":
        return ((tile - summit) % 2) * -200.0
    return (column == min(summit * TILE + 37, rows_kv - 1)) * 200.0  # hot_key


def takers(who: str, rows_q: int) -> torch.Tensor:
    """How each row takes the levels: -1, 0 or 1."""
    r = torch.arange(rows_q)
    return {
        "all": torch.ones(rows_q),
        "odd": (r % 2).float(),
        "one_of_a_warp": (r % 16 == 5).float(),
        "half_of_a_warp": (r // 8 % 2).float(),
        "opposite": 1.0 - 2.0 * (r % 2),
    }[who]


def problem(story, place, who, *, rows, heads=(4, 2), head_dim=64, dtype, device, seed):
    q, k, v = inputs.qkv(
        "normal",
        rows_q=rows[0],
        rows_kv=rows[1],
        heads_q=heads[0],
        heads_kv=heads[1],
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    q, k = q * 0.3, k * 0.3
    q[..., 0] = takers(who, rows[0]).to(device=device, dtype=dtype)[None, :, None]
    k[..., 0] = levels(story, place, rows[1]).to(device=device, dtype=dtype)[None, :, None]
    return q, k, v


def cases(device):
    axes = {
        "story": STORIES,
        "place": PLACES,
        "who": ("all", "odd", "one_of_a_warp", "half_of_a_warp", "opposite"),
        "dtype": attention.DTYPES[device],
        "head_dim": attention.HEAD_DIMS[device][:2],
        "block": attention.BLOCKS[device],
        "causal": (True, False),
        "sign": (1, -1),
        "pattern": ("dense", "random_50"),
        "rows": ((200, 1300), (700, 700)),
    }
    return pairwise(axes)


def params():
    for case in cases("cpu"):
        yield pytest.param("cpu", 0, case, id="cpu-" + case_id(case))
    for arch, case in product(FAMILIES, cases("cuda")):
        if has_kernel("cuda", case, arch):
            name = f"cuda-sm{arch}-" + case_id(case)
            yield pytest.param("cuda", arch, case, id=name, marks=pytest.mark.gpu)


@pytest.mark.parametrize("device, arch, case", list(params()))
def test_levels(device, arch, case, seed):
    rows, block = case["rows"], case["block"]
    q, k, v = problem(
        case["story"],
        case["place"],
        case["who"],
        rows=rows,
        head_dim=case["head_dim"],
        dtype=case["dtype"],
        device=device,
        seed=seed,
    )
    kw = {"block_q": block[0], "block_kv": block[1]}
    bits = None
    if case["pattern"] != "dense":
        shape = {"rows_q": rows[0], "rows_kv": rows[1], **kw}
        bits = make_bits(case["pattern"], **shape, heads=4, seed=seed, device=device)
    kw |= {"causal": case["causal"], "scale": case["sign"] * LN2}
    out, lse = run_repeatedly(q, k, v, bits, arch=arch, **kw)
    attention.check_attention(case["story"], out, lse, q, k, v, bits, **kw)


@pytest.fixture
def device(sparse_device):
    return sparse_device


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@DTYPES
@pytest.mark.parametrize("position", [0, 63, 700, 1299])
@pytest.mark.parametrize("causal", [True, False])
def test_one_hot_key(device, dtype, position, causal, seed):
    """One key 200 units above all others: rows that see it return its v, the others do not."""
    rows = (300, 1300)
    q, k, v = problem("pit", "first", "all", rows=rows, dtype=dtype, device=device, seed=seed)
    k[..., 0] = 0
    k[:, position, :, 0] = 200
    out, lse = run_repeatedly(q, k, v, causal=causal, scale=LN2)
    attention.check_attention("hot key", out, lse, q, k, v, causal=causal, scale=LN2)
    hot = v[:, position].repeat_interleave(2, 1)[:, None]
    first = position - 1000 if causal else 0
    step = 2 * numerics.ulp(dtype)
    assert torch.allclose(out[:, max(0, first) :], hot, atol=step, rtol=step)


@DTYPES
@pytest.mark.parametrize("stairs", [(0, 110, 170), (0, 60, 120, 180), (0, 130, 10, 190)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_stairs(device, dtype, stairs, causal, seed):
    """Jumps that follow each other: a later one must not make the kernel forget an earlier one."""
    rows = (300, 1300)
    q, k, v = problem("pit", "first", "all", rows=rows, dtype=dtype, device=device, seed=seed)
    tile = torch.arange(rows[1]) // TILE
    step = (tile // 4).clamp(max=len(stairs) - 1)
    level = torch.tensor(stairs, dtype=torch.float32)[step]
    k[..., 0] = level.to(device=device, dtype=dtype)[None, :, None]
    out, lse = run_repeatedly(q, k, v, causal=causal, scale=LN2)
    attention.check_attention("stairs", out, lse, q, k, v, causal=causal, scale=LN2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("causal", [True, False])
def test_equal_scores_near_the_end_of_fp32(device, sign, causal, seed):
    """All scores are +-2^100: equal weights exactly, so out carries no error of the scores."""
    q, k, v = inputs.qkv(
        "normal",
        rows_q=200,
        rows_kv=400,
        heads_q=2,
        heads_kv=1,
        head_dim=128,
        dtype=torch.bfloat16,
        device=device,
        seed=seed,
    )
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[..., 0] = 2.0**50, sign * 2.0**50
    kw = {"causal": causal, "scale": 1.0}
    out, lse = run_repeatedly(q, k, v, **kw)
    ref_out, ref_lse = reference.block_sparse_attn(q, k, v, **kw)
    base = baselines.attention(q, k, v, **kw)
    attention.judge_lse("equal scores", lse, ref_lse, base)
    exact = replace(base, delta=numerics.FAST_MATH)
    attention.judge_out("equal scores", out, ref_out, exact)


@DTYPES
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("causal", [True, False])
def test_scores_that_fp32_cannot_tell_apart(device, dtype, sign, causal, seed):
    """All scores are 10^7 within a few percent: an error of the scores is allowed, NaN is not."""
    q, k, v = problem(
        "step_10", "last", "all", rows=(200, 700), dtype=dtype, device=device, seed=seed
    )
    q[..., 0] = 1000.0
    near = torch.randn(k.shape[:-1], generator=inputs.generator(seed)) * 500 + 10000
    k[..., 0] = (sign * near).to(device=device, dtype=dtype)
    kw = {"causal": causal, "scale": LN2}
    out, lse = run_repeatedly(q, k, v, **kw)
    attention.check_attention("10^7", out, lse, q, k, v, **kw)


@pytest.mark.parametrize("scale", [LN2, -LN2, 1e-3])
def test_scores_near_the_end_of_fp16(device, scale, seed):
    """Whole scores around 65024, one unit apart: a kernel that keeps scores in fp16 loses them."""
    q, k, v = small(device, rows=(200, 700), batch=1, dtype=torch.float16, seed=seed)
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[..., 0] = 256.0, 254.0
    q[..., 1] = 1.0
    draw = torch.randint(0, 20, k.shape[:-1], generator=inputs.generator(seed))
    k[..., 1] = draw.to(device=device, dtype=k.dtype)
    out, lse = run_repeatedly(q, k, v, scale=scale)
    attention.check_attention("fp16", out, lse, q, k, v, scale=scale)


@DTYPES
@pytest.mark.parametrize("story", ["step_200", "pit", "ramp_30"])
def test_scale_zero_ignores_levels(device, dtype, story, seed):
    q, k, v = problem(
        story, "last", "opposite", rows=(200, 700), dtype=dtype, device=device, seed=seed
    )
    out, lse = run_repeatedly(q, k, v, scale=0.0)
    attention.check_attention("scale 0", out, lse, q, k, v, scale=0.0)


@DTYPES
@pytest.mark.parametrize("story", ["step_200", "ramp_9"])
def test_nan_in_one_key(device, dtype, story, seed):
    """Rows that see the key are NaN; all others, also those of the same tile, are right."""
    rows, key = (300, 500), 330
    q, k, v = problem(story, "first", "odd", rows=rows, dtype=dtype, device=device, seed=seed)
    dirty = k.clone()
    dirty[:, key] = math.nan
    out, lse = run_repeatedly(q, dirty, v, scale=LN2)
    sees = torch.arange(rows[0], device=device) + rows[1] - rows[0] >= key
    assert out[:, sees].isnan().all() and lse[..., sees].isnan().all()
    clean_out, clean_lse = attention.sparse_op(q, k, v, scale=LN2)
    out[:, sees], lse[..., sees] = clean_out[:, sees], clean_lse[..., sees]
    attention.check_attention("rows beside NaN", out, lse, q, k, v, scale=LN2)
