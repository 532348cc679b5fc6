# SPDX-License-Identifier: Apache-2.0
"""torch.ops.seer.attn_pool: out, lse and the block-pooled map against the oracle."""

import math
import subprocess
import sys
from pathlib import Path

import attention
import baselines
import inputs
import numerics
import pytest
import torch
from attention import FAMILIES, small
from pooled import MAX, SUM, check_map, params, pool_op, run_and_check_pool

import seer_cuda
from seer_cuda import _attn_math, reference

LIBRARY = Path(seer_cuda.__file__).parent / "libseer_ops.so"


@pytest.mark.parametrize("device, arch, case", list(params()))
def test_agrees_with_the_oracle(device, arch, case, seed):
    heads_kv = 2 if case["group"] < 7 else 1
    q, k, v = inputs.qkv(
        case["family"],
        rows_q=case["rows"][0],
        rows_kv=case["rows"][1],
        batch=case["batch"],
        heads_q=heads_kv * case["group"],
        heads_kv=heads_kv,
        head_dim=case["head_dim"],
        dtype=case["dtype"],
        device=device,
        layout=case["layout"],
        seed=seed,
    )
    kw = {"block_q": case["block"][0], "block_kv": case["block"][1], "reduce": case["reduce"]}
    kw |= {"causal": case["causal"], "per_token": case["per_token"]}
    run_and_check_pool(q, k, v, arch=arch, **kw)


@pytest.mark.parametrize("rows", [(200, 200), (100, 300), (300, 100)])
def test_exactly_zero_where_nothing_is_visible(device, rows, seed):
    q, k, v = small(device, rows=rows, seed=seed)
    pooled = torch.ops.seer.attn_pool(q, k, v)[2]
    reach = reference.reachable_blocks(*rows, 64, 64, True, device)
    assert (pooled[:, :, ~reach] == 0).all()
    assert (pooled[:, :, reach] > 0).all()
    tokens = torch.ops.seer.attn_pool(q, k, v, per_token=True)[2]
    reach = reference.reachable_blocks(*rows, 1, 64, True, device)
    assert (tokens[:, :, ~reach] == 0).all()


def test_map_of_the_map(device, seed):
    """The 2-D map is the maximum over rows of the per-token map."""
    q, k, v = small(device, rows=(192, 192), seed=seed)
    pooled = torch.ops.seer.attn_pool(q, k, v)[2]
    tokens = torch.ops.seer.attn_pool(q, k, v, per_token=True)[2]
    want = tokens.unflatten(2, (3, 64)).amax(3)
    delta = baselines.attention(q, k, v).delta
    check_map(pooled, want.double(), 2 * delta)


def test_probabilities_never_exceed_one(device, seed):
    q, k, v = small(device, family="large_logit", seed=seed)
    delta = baselines.attention(q, k, v).delta
    pooled = torch.ops.seer.attn_pool(q, k, v)[2]
    assert float(pooled.max()) <= math.exp(2 * delta) and float(pooled.min()) >= 0
    assert pooled.amax(-1).min() > 0


@pytest.mark.parametrize("reduce", [MAX, SUM])
@pytest.mark.parametrize(
    "lengths",
    [([1, 64, 65, 0, 130], None), ([30, 100], [200, 100]), ([70, 30, 100], [0, 90, 0])],
)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_varlen(sparse_device, lengths, per_token, causal, reduce, seed):
    lengths_q, lengths_kv = lengths[0], lengths[1] or lengths[0]
    case = inputs.varlen(
        "normal",
        lengths_q,
        lengths_kv,
        slack=inputs.SLACK[sparse_device],
        device=sparse_device,
        heads_q=4,
        heads_kv=2,
        dtype=torch.float16,
        layout="gaps",
        seed=seed,
    )
    kw = {"per_token": per_token, "causal": causal, "reduce": reduce}
    _, _, pooled = run_and_check_pool(**case, **kw)
    blocks_kv = attention.ceil_div(case["max_rows_kv"], 64)
    blocks_q = attention.ceil_div(case["max_rows_q"], 64)
    rows = case["q"].shape[0]
    expected = (4, rows, blocks_kv) if per_token else (len(lengths_q), 4, blocks_q, blocks_kv)
    assert pooled.shape == expected


@pytest.mark.parametrize("rows", [(0, 64), (64, 0)])
@pytest.mark.parametrize("per_token", [False, True])
def test_zero_rows(device, rows, per_token):
    q, k, v = small(device, rows=rows)
    out, lse, pooled = torch.ops.seer.attn_pool(q, k, v, per_token=per_token)
    height = rows[0] if per_token else attention.ceil_div(rows[0], 64)
    assert out.shape == q.shape and pooled.shape == (2, 4, height, attention.ceil_div(rows[1], 64))
    assert (out == 0).all() and (lse == -math.inf).all() and (pooled == 0).all()


def test_zero_batch(device):
    out, lse, pooled = torch.ops.seer.attn_pool(*(x[:0] for x in small(device)))
    assert out.shape == (0, 150, 4, 64) and lse.shape == (0, 4, 150)
    assert pooled.shape == (0, 4, 3, 3)


@pytest.mark.parametrize("rows", [(150, 150), (200, 100)])
def test_a_row_of_shares_adds_up_to_one(device, rows, seed):
    """Over the rows of a block that exist; those that see nothing count as zeros."""
    q, k, v = small(device, rows=rows, seed=seed)
    shares = seer_cuda.attn_pool(q, k, v, reduce="sum")[2].double().sum(-1)
    seeing = [range(max(0, rows[0] - rows[1]), rows[0])]
    blocks = [range(first, min(first + 64, rows[0])) for first in range(0, rows[0], 64)]
    want = [sum(r in seeing[0] for r in block) / len(block) for block in blocks]
    want = torch.tensor(want, dtype=torch.float64, device=device).expand_as(shares)
    torch.testing.assert_close(shares, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("reduce", [MAX, SUM])
@pytest.mark.parametrize("per_token", [False, True])
def test_scores_up_to_ten_thousand(sparse_device, per_token, reduce, seed):
    """Rising scores, so that a row's reference is outgrown again and again."""
    q, k, v = small(sparse_device, rows=(300, 700), heads=(2, 1), batch=1, seed=seed)
    q[..., 0] = 64.0
    rising = torch.arange(700, device=sparse_device) - 350.0
    k[..., 0] = (rising * 3.5)[None, :, None].to(k.dtype)
    kw = {"per_token": per_token, "reduce": reduce}
    _, _, pooled = pool_op(q, k, v, **kw)
    want = reference.attn_pool(q, k, v, **kw)[2]
    scores = torch.einsum("brhd,bcud->bhrc", q.double(), k.double()) / 8
    assert 9e3 < float(scores.abs().max()) < 1e4
    assert ((pooled - want).abs() <= 1e-5 + 2.0**-8 * want).all()


@pytest.mark.parametrize("reduce", [MAX, SUM])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_some_rows_of_a_block_outgrow_their_reference(
    sparse_device, causal, per_token, reduce, seed
):
    """Rising scores in the first 16 rows of each 64 alone: on Hopper their warp's part of the tile
    is done again, and the map gets the block's rows in two passes."""
    q, k, v = small(sparse_device, rows=(300, 900), heads=(4, 2), seed=seed)
    rising = torch.arange(900, device=sparse_device) - 450.0
    q[..., 0] = torch.where(torch.arange(300, device=sparse_device) % 64 < 16, 64.0, 0.0)[:, None]
    k[..., 0] = rising[None, :, None].to(k.dtype)
    kw = {"per_token": per_token, "reduce": reduce, "causal": causal}
    _, _, pooled = pool_op(q, k, v, **kw)
    want = reference.attn_pool(q, k, v, **kw)[2]
    assert ((pooled - want).abs() <= 1e-5 + 2.0**-8 * want).all()


@pytest.mark.parametrize("reduce", [MAX, SUM])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("scale", [-0.125, 0.0, 1e-30])
def test_scales(sparse_device, scale, per_token, reduce, seed):
    q, k, v = small(sparse_device, rows=(150, 330), seed=seed)
    run_and_check_pool(q, k, v, scale=scale, per_token=per_token, reduce=reduce)


@pytest.mark.parametrize("reduce", [MAX, SUM])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("block", [(64, 64), (128, 64), (64, 128), (128, 128)])
def test_units_of_all_lengths(sparse_device, block, per_token, reduce, seed):
    """Long rows after short ones and short after long, so that strips are used again and again."""
    lengths_q = [1, 300, 65, 700, 64, 500, 130]
    lengths_kv = [700, 300, 600, 700, 1, 500, 700]
    case = inputs.varlen(
        "normal",
        lengths_q,
        lengths_kv,
        slack=inputs.SLACK[sparse_device],
        device=sparse_device,
        heads_q=2,
        heads_kv=1,
        dtype=torch.bfloat16,
        seed=seed,
    )
    kw = {"block_q": block[0], "block_kv": block[1], "per_token": per_token, "reduce": reduce}
    run_and_check_pool(**case, **kw)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("per_token", [False, True])
def test_many_long_tiles_per_thread_block(arch, per_token, seed):
    """Strips of 128 KV tiles, used again and again."""
    q, k, v = small("cuda", rows=(4096, 8192), heads=(24, 8), head_dim=128, batch=1, seed=seed)
    kw = {"per_token": per_token, "causal": False}
    pooled = pool_op(q, k, v, arch=arch, **kw)[2]
    for head in (0, 11, 23):
        part = (q[:, :, head : head + 1], *(x[:, :, head // 3 : head // 3 + 1] for x in (k, v)))
        want = reference.attn_pool(*part, **kw)[2]
        delta = baselines.attention(*part, causal=False).delta
        check_map(pooled[:, head : head + 1], want, delta, **kw)


@pytest.mark.parametrize("reduce", [MAX, SUM])
@pytest.mark.parametrize("per_token", [False, True])
def test_nan_stays_in_the_rows_that_see_it(sparse_device, per_token, reduce, seed):
    """In q: one row of one head. In k: the rows from its column on. Their visible blocks are NaN;
    what other rows give has the bits that it has without."""
    kw = {"per_token": per_token, "reduce": reduce}
    q, k, v = small(sparse_device, rows=(200, 200), seed=seed)
    clean = pool_op(q, k, v, **kw)[2]
    rows = torch.arange(200, device=sparse_device)
    for name in ("q", "k"):
        hurt_q, hurt_k = q.clone(), k.clone()
        if name == "q":
            hurt_q[0, 70, 1, 3] = math.nan
            heads, hurt = slice(1, 2), rows == 70
        else:
            hurt_k[0, 130, 1, 3] = math.nan
            heads, hurt = slice(2, 4), rows >= 130
        pooled = pool_op(hurt_q, hurt_k, v, **kw)[2]
        first = rows if per_token else torch.arange(0, 200, 64, device=sparse_device)
        high = 1 if per_token else 64
        bad = torch.stack([hurt[r : r + high].any() for r in first.tolist()])
        where = torch.zeros_like(clean, dtype=torch.bool)
        where[0, heads] = bad[:, None]
        numerics.assert_bitwise(name, pooled[~where], clean[~where])
        seen = reference.reachable_blocks(200, 200, high, 64, True, sparse_device)
        assert pooled[where & seen].isnan().all(), name


@pytest.mark.parametrize("reduce", [MAX, SUM])
@pytest.mark.parametrize("per_token", [False, True])
def test_same_bits_every_time(sparse_device, per_token, reduce, seed):
    q, k, v = small(sparse_device, rows=(1000, 1300), heads=(8, 2), head_dim=128, seed=seed)
    kw = {"per_token": per_token, "reduce": reduce, "block_q": 128, "block_kv": 128}
    first = pool_op(q, k, v, **kw)
    for _ in range(3):
        for name, a, b in zip(("out", "lse", "pooled"), pool_op(q, k, v, **kw), first, strict=True):
            numerics.assert_bitwise(name, a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", FAMILIES)
def test_attention_is_that_of_the_sparse_kernel(arch, seed):
    """One kernel, with and without a map: out and lse have the same bits."""
    q, k, v = small("cuda", rows=(700, 900), heads=(8, 2), head_dim=128, seed=seed)
    out, lse, _ = pool_op(q, k, v, arch=arch)
    dense = attention.sparse_op(q, k, v, arch=arch)
    numerics.assert_bitwise("out", out, dense[0])
    numerics.assert_bitwise("lse", lse, dense[1])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_composite_sums(per_token, packed, seed):
    """The torch operators behind attn_pool where no kernel serves."""
    if packed:
        lengths = [1, 64, 65, 0, 130]
        case = inputs.varlen("normal", lengths, lengths, slack=inputs.SLACK["cpu"], seed=seed)
    else:
        q, k, v = small("cpu", rows=(150, 300), dtype=torch.float32, seed=seed)
        case = {"q": q, "k": k, "v": v}
    got = _attn_math.attn_pool(**case, per_token=per_token, reduce=SUM, chunk_rows=64)[2]
    want = reference.attn_pool(**case, per_token=per_token, reduce=SUM)[2]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_unknown_reduction():
    q, k, v = small("cpu")
    with pytest.raises(ValueError, match="seer::attn_pool: reduce: expected one of max, sum"):
        seer_cuda.attn_pool(q, k, v, reduce="mean")
    with pytest.raises(RuntimeError, match=r"seer::attn_pool: reduce: expected 0 \(max\)"):
        torch.ops.seer.attn_pool(q, k, v, reduce=2)


@pytest.mark.gpu
def test_shapes_without_a_kernel_run_as_torch_operations(seed):
    q, k, v = small("cuda", head_dim=40, dtype=torch.bfloat16, seed=seed)
    run_and_check_pool(q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("per_token", [False, True])
def test_two_streams_at_once(per_token, seed):
    """Each launch has its own strips."""
    inputs_of = [
        small("cuda", rows=(1500, 2000), heads=(8, 2), head_dim=128, seed=seed + i)
        for i in range(2)
    ]
    want = [torch.ops.seer.attn_pool(*x, per_token=per_token) for x in inputs_of]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs_of]
    got = []
    for _ in range(5):
        for x, stream in zip(inputs_of, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(torch.ops.seer.attn_pool(*x, per_token=per_token))
    torch.cuda.synchronize()
    for i, results in enumerate(got):
        for a, b in zip(results, want[i % 2], strict=True):
            numerics.assert_bitwise("two streams", a, b)


@pytest.mark.gpu
def test_without_python_a_missing_kernel_is_an_error_and_keeps_nothing(tmp_path):
    """The library alone has no torch operations to fall back on."""
    code = f"""
import gc, torch
torch.ops.load_library({str(LIBRARY)!r})
def call():
    q = torch.randn(1, 4096, 4, 40, device="cuda", dtype=torch.bfloat16)
    try:
        torch.ops.seer.attn_pool(q, q, q)
    except RuntimeError:
        return True
torch.zeros(1, device="cuda")
before = torch.cuda.memory_allocated()
assert call()
gc.collect()
assert torch.cuda.memory_allocated() == before, torch.cuda.memory_allocated() - before
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_extra_memory():
    """At 32k columns less than 60 MB beside the outputs, whatever the heads (sm_90)."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("stated for compute capability 9.0")
    q = torch.randn(1, 32768, 8, 128, device="cuda", dtype=torch.bfloat16)
    torch.ops.seer.attn_pool(q[:, :, :1], q[:, :, :1], q[:, :, :1])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = torch.ops.seer.attn_pool(q, q, q)
    held = sum(x.numel() * x.element_size() for x in results)
    assert torch.cuda.max_memory_allocated() - before - held < 60e6


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_probabilities_just_above_the_smallest_normal_number(device, dtype, first, seed):
    """A key 2^125.6 below the row's best is no zero, wherever the best lifted the reference to."""
    q, k, v = small(device, rows=(128, 3 * 64 + 1), batch=1, dtype=dtype, seed=seed)
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0] = 1.0
    # Scores in log2 units: one key far up, a block far down, 0 elsewhere.
    high, low = (37.5625, -88.0625) if dtype == torch.float16 else (37.5, -88.0)
    k[:, 70, :, 0] = high
    k[:, :64, :, 0] = low if first else 0.0
    k[:, 192, :, 0] = 0.0 if first else low
    _, _, pooled = run_and_check_pool(q, k, v, causal=False, scale=math.log(2.0))
    least = 2.0 ** (low - high)
    torch.testing.assert_close(
        pooled.amin(-1), torch.full_like(pooled.amin(-1), least), rtol=1e-4, atol=0
    )
