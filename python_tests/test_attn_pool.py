# SPDX-License-Identifier: Apache-2.0
"""torch.ops.seer.attn_pool: out, lse and the block-pooled map against the oracle."""

import math
from functools import partial

import attention
import baselines
import inputs
import numerics
import pytest
import torch
from attention import BLOCKS, DTYPES, HEAD_DIMS, has_kernel, small
from grid import case_id, pairwise

from seer_cuda import reference
from seer_cuda._composite import composite_ops

# compute-sanitizer looks at kernels of ours: a composite on CUDA has none.
COMPILED = "attn_pool" not in composite_ops()

MAP_AXES = {4: ("batch", "head", "i", "j"), 3: ("head", "row", "j")}


def cases(device):
    rows = ((1, 1), (1, 130), (63, 63), (64, 64), (65, 65), (64, 200), (200, 64), (257, 257))
    if device == "cuda":
        rows += ((512, 512), (300, 700))
    axes = {
        "dtype": DTYPES[device],
        "head_dim": HEAD_DIMS[device],
        "block": BLOCKS[device],
        "causal": (True, False),
        "per_token": (False, True),
        "rows": rows,
        "group": (1, 4, 7),
        "family": inputs.FAMILIES,
        "layout": inputs.LAYOUTS,
        "batch": (1, 2),
    }
    return pairwise(axes, core=("dtype", "head_dim", "causal"), copies=1)


def params():
    for case in cases("cpu"):
        yield pytest.param("cpu", case, id="cpu-" + case_id(case))
    sanitized = set()
    for case in filter(partial(has_kernel, "cuda"), cases("cuda")):
        marks = [pytest.mark.gpu]
        kind = (case["head_dim"], case["per_token"])
        if COMPILED and max(case["rows"]) <= 130 and kind not in sanitized:
            sanitized.add(kind)
            marks.append(pytest.mark.reduced)
        yield pytest.param("cuda", case, id="cuda-" + case_id(case), marks=marks)


def run_and_check_pool(q, k, v, **kw):
    """attn_pool on these inputs, all three results compared with the oracle."""
    out, lse, pooled = torch.ops.seer.attn_pool(q, k, v, **kw)
    assert pooled.dtype == torch.float32 and pooled.device == q.device
    sparse_kw = {name: x for name, x in kw.items() if name != "per_token"}
    attention.check_attention("attn_pool", out, lse, q, k, v, None, **sparse_kw)
    _, _, ref = reference.attn_pool(q, k, v, **kw)
    check_map(pooled, ref, baselines.attention(q, k, v, **sparse_kw).delta)
    return out, lse, pooled


def check_map(pooled, ref, delta):
    """p = exp(score - lse): both errors are at most delta, so p is off by a factor e^(2 delta)."""
    numerics.compare(
        "attn_pool pooled",
        pooled,
        ref,
        extra=math.expm1(2 * delta) * ref,
        axes=MAP_AXES[pooled.dim()],
    )


@pytest.mark.parametrize("device, case", list(params()))
def test_agrees_with_the_oracle(device, case, seed):
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
    kw = {"block_q": case["block"][0], "block_kv": case["block"][1]}
    run_and_check_pool(q, k, v, causal=case["causal"], per_token=case["per_token"], **kw)


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


@pytest.mark.parametrize("lengths", [([1, 64, 65, 0, 130], None), ([30, 100], [200, 100])])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_varlen(device, lengths, per_token, causal, seed):
    lengths_q, lengths_kv = lengths[0], lengths[1] or lengths[0]
    case = inputs.varlen(
        "normal",
        lengths_q,
        lengths_kv,
        slack=inputs.SLACK[device],
        device=device,
        heads_q=4,
        heads_kv=2,
        dtype=torch.float16,
        layout="gaps",
        seed=seed,
    )
    _, _, pooled = run_and_check_pool(**case, per_token=per_token, causal=causal)
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
