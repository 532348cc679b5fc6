# SPDX-License-Identifier: Apache-2.0
"""torch.ops.seer.block_sparse_attn against the float64 oracle, the same cases on CPU and CUDA."""

import math
from itertools import product

import attention
import inputs
import numerics
import patterns
import pytest
import torch
from attention import (
    BLOCKS,
    DTYPES,
    FAMILIES,
    HEAD_DIMS,
    has_kernel,
    make_bits,
    run_and_check,
    small,
    sparse_op,
)
from grid import case_id, pairwise

ROWS = {
    "cpu": ((1, 1), (1, 130), (63, 63), (64, 64), (65, 65), (64, 200), (200, 64), (257, 257)),
    "cuda": (
        (1, 1),
        (1, 300),
        (63, 63),
        (64, 64),
        (65, 65),
        (127, 127),
        (129, 129),
        (64, 500),
        (300, 100),
        (333, 333),
        (512, 512),
        (200, 1111),
        (1024, 1024),
    ),
}


def cases(device):
    """Every combination of what selects a kernel, the other axes pairwise."""
    core = ("dtype", "head_dim", "block", "causal")
    axes = {
        "dtype": DTYPES[device],
        "head_dim": HEAD_DIMS[device],
        "block": BLOCKS[device],
        "causal": (True, False),
        "mask_heads": ("all", "kv_heads", "q_heads"),
        "rows": ROWS[device],
        "group": (1, 4, 7),
        "pattern": patterns.PATTERNS,
        "family": inputs.FAMILIES,
        "layout": inputs.LAYOUTS,
        "batch": (1, 2, 3),
        "mask_batch": ("own", "shared"),
    }
    if device == "cpu":
        return pairwise(axes)
    return pairwise(axes, core=core, copies=5)


@pytest.fixture
def device(sparse_device):
    return sparse_device


def params():
    for case in cases("cpu"):
        yield pytest.param("cpu", 0, case, id="cpu-" + case_id(case))
    sanitized = set()  # one small case per compiled kernel is enough for compute-sanitizer
    for arch, case in product(FAMILIES, cases("cuda")):
        if not has_kernel("cuda", case, arch):
            continue
        marks = [pytest.mark.gpu]
        kernel = (arch, case["dtype"], case["head_dim"], case["block"])
        if max(case["rows"]) <= 300 and kernel not in sanitized:
            sanitized.add(kernel)
            marks.append(pytest.mark.reduced)
        yield pytest.param("cuda", arch, case, id=f"cuda-sm{arch}-" + case_id(case), marks=marks)


def build(device, case, seed):
    """The arguments of one case: (q, k, v, block_bits), keyword arguments."""
    heads_kv = 2 if case["group"] < 7 else 1
    heads_q = heads_kv * case["group"]
    rows_q, rows_kv = case["rows"]
    block_q, block_kv = case["block"]
    q, k, v = inputs.qkv(
        case["family"],
        rows_q=rows_q,
        rows_kv=rows_kv,
        batch=case["batch"],
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=case["head_dim"],
        dtype=case["dtype"],
        device=device,
        layout=case["layout"],
        seed=seed,
    )
    bits = make_bits(
        case["pattern"],
        rows_q=rows_q,
        rows_kv=rows_kv,
        block_q=block_q,
        block_kv=block_kv,
        batch=case["batch"] if case["mask_batch"] == "own" else 1,
        heads={"all": 1, "kv_heads": heads_kv, "q_heads": heads_q}[case["mask_heads"]],
        seed=seed,
        device=device,
    )
    return (q, k, v, bits), {"block_q": block_q, "block_kv": block_kv, "causal": case["causal"]}


@pytest.mark.parametrize("device, arch, case", list(params()))
def test_agrees_with_the_oracle(device, arch, case, seed):
    args, kw = build(device, case, seed)
    run_and_check(*args, arch=arch, **kw)


@pytest.mark.parametrize("causal", [True, False])
def test_no_mask_is_dense_attention(device, causal, seed):
    q, k, v = small(device, seed=seed)
    out, lse = run_and_check(q, k, v, causal=causal)
    bits = make_bits("full", rows_q=150, rows_kv=150, device=device)
    kept, kept_lse = run_and_check(q, k, v, bits, causal=causal)
    base = attention.baselines.attention(q, k, v, causal=causal)
    torch.testing.assert_close(lse, kept_lse, atol=2 * base.delta, rtol=0)
    step = numerics.ulp(q.dtype)
    torch.testing.assert_close(out, kept, atol=2 * step, rtol=2 * step)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.25, 1e-3])
def test_scale(device, scale, seed):
    q, k, v = small(device, seed=seed)
    bits = make_bits("random_50", rows_q=150, rows_kv=150, heads=4, seed=seed, device=device)
    run_and_check(q, k, v, bits, scale=scale)


@pytest.mark.parametrize("rows", [(0, 64), (64, 0), (0, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_zero_rows(device, rows, causal):
    q, k, v = small(device, rows=rows)
    bits = make_bits("full", rows_q=rows[0], rows_kv=rows[1], device=device)
    for mask in (None, bits):
        # The op's own choice: TMA takes no empty tensor, so that family 90 refuses these.
        out, lse = sparse_op(q, k, v, mask, causal=causal, arch=0)
        assert out.shape == q.shape and lse.shape == (2, 4, rows[0])
        assert (out == 0).all() and (lse == -math.inf).all()


def test_zero_batch(device):
    q, k, v = (x[:0] for x in small(device))
    out, lse = sparse_op(q, k, v)
    assert out.shape == q.shape and lse.shape == (0, 4, 150)


@pytest.mark.parametrize("pattern", ["nothing", "above_diagonal"])
def test_rows_that_see_nothing(device, pattern, seed):
    q, k, v = small(device, rows=(200, 200), seed=seed)
    bits = make_bits(pattern, rows_q=200, rows_kv=200, device=device)
    out, lse = sparse_op(q, k, v, bits)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_bits_past_the_end_are_ignored(device, seed):
    q, k, v = small(device, rows=(130, 1100), seed=seed)
    kw = {"rows_q": 130, "rows_kv": 1100, "heads": 4, "seed": seed, "device": device}
    clean = sparse_op(q, k, v, make_bits("random_10", **kw, stray=False))
    stray = sparse_op(q, k, v, make_bits("random_10", **kw))
    for name, a, b in zip(("out", "lse"), clean, stray, strict=True):
        numerics.assert_bitwise(name, a, b)


def test_mask_views_need_no_copy(device, seed):
    """block_bits may have any strides with a contiguous last dim."""
    q, k, v = small(device, rows=(300, 300), seed=seed)
    bits = make_bits("random_50", rows_q=300, rows_kv=300, batch=2, heads=4, seed=seed)
    views = {
        "transposed": bits.transpose(1, 2).contiguous().transpose(1, 2),
        "gaps": torch.nn.functional.pad(bits, (0, 3, 0, 2, 0, 1), value=-1)[:, :4, :5],
        "expanded": bits[:1, :1].expand(2, 4, -1, -1),
    }
    for name, view in views.items():
        view = view.to(device) if name == "expanded" else _keep_strides(view, device)
        direct = sparse_op(q, k, v, view.contiguous())
        numerics.assert_bitwise(name, sparse_op(q, k, v, view)[0], direct[0])


def _keep_strides(view, device):
    moved = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=device)
    return moved.copy_(view)


@pytest.mark.parametrize("offset", [1, 3])
def test_strides_without_alignment(device, offset, seed):
    """Strides that are no multiple of 16 bytes: the answer on the CPU, a refusal on CUDA, whose
    kernels move 16 bytes at a time."""
    q, k, v = small(device, seed=seed)
    odd = [torch.nn.functional.pad(x, (0, offset))[..., : x.shape[-1]] for x in (q, k, v)]
    if device == "cuda":
        form = r"seer::block_sparse_attn: q: expected strides that are multiples of 8 elements"
        with pytest.raises(RuntimeError, match=form):
            sparse_op(*odd)
        return
    out, lse = sparse_op(*odd)
    attention.check_attention("odd strides", out, lse, q, k, v)


LENGTHS = {
    "self": ([1, 64, 65, 200, 0, 31], [1, 64, 65, 200, 0, 31]),
    "chunked": ([17, 64, 100], [300, 64, 129]),
    "short_kv": ([100, 70], [33, 0]),
    "single": ([190], [190]),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [(64, 64), (128, 64), (64, 128), (128, 128)])
def test_varlen(device, lengths, causal, block, seed):
    lengths_q, lengths_kv = LENGTHS[lengths]
    slack = inputs.SLACK[device] if lengths != "self" else 0
    case = inputs.varlen(
        "normal",
        lengths_q,
        lengths_kv,
        slack=slack,
        device=device,
        heads_q=4,
        heads_kv=2,
        dtype=torch.bfloat16,
        layout="gaps" if causal else "bshd",
        seed=seed,
    )
    bits = make_bits(
        "random_50",
        rows_q=case["max_rows_q"],
        rows_kv=case["max_rows_kv"],
        block_q=block[0],
        block_kv=block[1],
        batch=len(lengths_q),
        heads=2,
        seed=seed,
        device=device,
    )
    for mask in (bits, bits[:1, :1], None):
        out, _ = run_and_check(
            **case, block_bits=mask, block_q=block[0], block_kv=block[1], causal=causal
        )
        if slack:
            assert (out[:slack] == 0).all() and (out[-slack:] == 0).all()


def test_varlen_equals_batch(device, seed):
    """Sequences of one length, packed: the same bits as the batched call."""
    q, k, v = small(device, rows=(130, 130), seed=seed)
    bits = make_bits(
        "random_50", rows_q=130, rows_kv=130, batch=2, heads=4, seed=seed, device=device
    )
    out, lse = sparse_op(q, k, v, bits)
    cu = inputs.packed([130, 130]).to(device)
    flat = sparse_op(
        *(x.flatten(0, 1) for x in (q, k, v)),
        bits,
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        max_rows_q=130,
        max_rows_kv=130,
    )
    numerics.assert_bitwise("out", flat[0].view_as(out), out)
    numerics.assert_bitwise("lse", flat[1].view(4, 2, 130).transpose(0, 1).contiguous(), lse)


def test_larger_bounds_than_needed(device, seed):
    """max_rows_* above the longest sequence: the mask is larger, the result the same."""
    case = inputs.varlen(
        "normal", [70, 40], [70, 40], device=device, dtype=torch.float16, seed=seed
    )
    case |= {"max_rows_q": 400, "max_rows_kv": 500}
    bits = make_bits("random_50", rows_q=400, rows_kv=500, batch=2, seed=seed, device=device)
    run_and_check(**case, block_bits=bits)


def test_heads_of_a_group_with_one_mask_row(device, seed):
    """A kv_heads mask gives the bits of the same mask written out per query head."""
    q, k, v = small(device, heads=(8, 2), seed=seed)
    bits = make_bits(
        "random_50", rows_q=150, rows_kv=150, batch=2, heads=2, seed=seed, device=device
    )
    shared = run_and_check(q, k, v, bits)
    own = run_and_check(q, k, v, bits.repeat_interleave(4, dim=1))
    base = attention.baselines.attention(q, k, v, bits)
    torch.testing.assert_close(shared[1], own[1], atol=2 * base.delta, rtol=0)


@pytest.mark.parametrize("rows", [4096])
def test_long_sparse(device, rows, seed):
    """More than one word of bits per row and a few hundred kept blocks."""
    if device == "cpu":
        rows = 2200
    q, k, v = inputs.qkv(
        "normal",
        rows_q=rows,
        rows_kv=rows,
        heads_q=2,
        heads_kv=1,
        dtype=torch.bfloat16,
        device=device,
        seed=seed,
    )
    bits = make_bits("random_10", rows_q=rows, rows_kv=rows, heads=2, seed=seed, device=device)
    run_and_check(q, k, v, bits)
