# SPDX-License-Identifier: Apache-2.0
"""Gradients: against autograd through the float64 oracle; refused where there is none."""

from itertools import pairwise

import baselines
import inputs
import numerics
import pytest
import torch
from attention import DTYPES, small

from seer_cuda import reference

ops = torch.ops.seer
ALL_DTYPES = [
    pytest.param(device, dtype, marks=[pytest.mark.gpu] if device == "cuda" else [])
    for device, dtypes in DTYPES.items()
    for dtype in dtypes
]


def oracle_grads(function, tensors, grad_out):
    """Gradients of function(*tensors) . grad_out, in float64."""
    args = [x.detach().double().requires_grad_() for x in tensors]
    out = function(*args)
    return torch.autograd.grad(out, args, grad_out.double())


def op_grads(function, tensors, grad_out):
    args = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*args)
    return torch.autograd.grad(out, args, grad_out.to(out.dtype))


@pytest.mark.parametrize("device, dtype", ALL_DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [(130, 130), (70, 200), (200, 70)])
@pytest.mark.parametrize("group", [1, 3])
def test_attn_pool(device, dtype, causal, rows, group, seed):
    q, k, v = small(device, rows=rows, heads=(2 * group, 2), batch=1, dtype=dtype, seed=seed)
    grad_out = torch.randn(q.shape, generator=inputs.generator(seed)).to(device=device, dtype=dtype)

    grads = op_grads(lambda *a: ops.attn_pool(*a, causal=causal)[0], (q, k, v), grad_out)
    wanted = oracle_grads(lambda *a: reference.attn_pool(*a, causal=causal)[0], (q, k, v), grad_out)
    base = baselines.attention_grads(q, k, v, grad_out, causal=causal)
    delta = baselines.attention(q, k, v, causal=causal).delta
    for name, grad, want, plain in zip("qkv", grads, wanted, base, strict=True):
        assert grad.dtype == dtype and grad.isfinite().all()
        numerics.compare(
            f"attn_pool d{name}",
            grad,
            want,
            plain,
            extra=4 * delta * float(want.abs().max()),
            axes=("batch", "row", "head", "d"),
            blocks={"row": 64},
        )


def test_attn_pool_varlen(device, seed):
    lengths = [60, 0, 100]
    case = inputs.varlen(
        "normal",
        lengths,
        lengths,
        slack=inputs.SLACK[device],
        device=device,
        heads_q=4,
        heads_kv=2,
        dtype=torch.bfloat16,
        seed=seed,
    )
    tensors = [case.pop(name) for name in ("q", "k", "v")]
    grad_out = torch.randn(tensors[0].shape, generator=inputs.generator(seed)).to(tensors[0])
    grads = op_grads(lambda *a: ops.attn_pool(*a, **case)[0], tensors, grad_out)
    wanted = oracle_grads(lambda *a: reference.attn_pool(*a, **case)[0], tensors, grad_out)
    edges = case["cu_seqlens_q"].tolist()
    base = [torch.zeros_like(x) for x in tensors]
    for a, b in pairwise(edges):
        if b > a:
            one = baselines.attention_grads(*(x[None, a:b] for x in (*tensors, grad_out)))
            for whole, part in zip(base, one, strict=True):
                whole[a:b] = part[0]
    for name, grad, want, plain in zip("qkv", grads, wanted, base, strict=True):
        numerics.compare(f"attn_pool d{name}", grad, want, plain, axes=("row", "head", "d"))
        assert (grad[: edges[0]] == 0).all() and (grad[edges[-1] :] == 0).all()


@pytest.mark.parametrize("per_token", [False, True])
def test_lse_and_pooled_are_targets(device, per_token, seed):
    q, k, v = (x.requires_grad_() for x in small(device, seed=seed))
    out, lse, pooled = ops.attn_pool(q, k, v, per_token=per_token)
    assert out.requires_grad and not lse.requires_grad and not pooled.requires_grad


def distinct(shape, dtype, device, seed):
    """Random values without ties along dim 1: no two tokens compete for a maximum."""
    order = torch.rand(shape, generator=inputs.generator(seed)).argsort(1)
    return ((order - shape[1] / 2) / 16).to(device=device, dtype=dtype)


@pytest.mark.parametrize("device, dtype", ALL_DTYPES)
@pytest.mark.parametrize("pools", range(1, 8))
@pytest.mark.parametrize("rotary", [False, True])
def test_pool_gate(device, dtype, pools, rotary, seed):
    x = distinct((2, 150, 2, 64), dtype, device, seed)
    gen = inputs.generator(seed)
    channels = 64 * pools.bit_count()
    weight = (torch.randn(4, channels, 64, generator=gen) / channels**0.5).to(device, dtype)
    rope = [torch.rand(3, 8, generator=gen).to(device) for _ in range(2)] if rotary else []
    grad_out = torch.randn(2, 3, 4, 64, generator=gen).to(device, dtype)

    def gate(pool, x, w):
        return pool(x, w, *rope, pools=pools)

    grads = op_grads(lambda x, w: gate(ops.pool_gate, x, w), (x, weight), grad_out)
    wanted = oracle_grads(lambda x, w: gate(reference.pool_gate, x, w), (x, weight), grad_out)
    # Plain torch at the input type: gradients of the fp32 pooling, rounded where values are.
    pooled = reference.pool_gate(x.float(), pools=pools).to(dtype).float()
    wide = pooled.repeat_interleave(2, 2)
    turned = wanted_before_rope(grad_out.float(), rope)
    d_weight = torch.einsum("bnhi,bnho->hio", wide, turned).to(dtype)
    d_pooled = torch.einsum("bnho,hio->bnhi", turned, weight.float()).unflatten(2, (2, 2)).sum(3)
    leaf = x.float().requires_grad_()
    (d_x,) = torch.autograd.grad(
        reference.pool_gate(leaf, pools=pools), leaf, d_pooled.to(dtype).double()
    )
    numerics.compare("pool_gate dx", grads[0], wanted[0], d_x.to(dtype))
    numerics.compare("pool_gate dweight", grads[1], wanted[1], d_weight)


def wanted_before_rope(grad, rope):
    """The gradient turned back: RoPE is a rotation, its transpose the opposite one."""
    if not rope:
        return grad
    cos, sin = (t.unsqueeze(-2) for t in rope)
    half = cos.shape[-1]
    first, second, rest = grad.split([half, half, grad.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], -1)


@pytest.mark.parametrize("pools", [1, 2])
def test_a_tie_gets_one_gradient(device, pools):
    """Equal maxima share one unit of gradient and the first token takes it."""
    x = torch.ones(1, 64, 1, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    ops.pool_gate(x, pools=pools).sum().backward()
    assert (x.grad[:, 0] == 1).all() and (x.grad[:, 1:] == 0).all()


@pytest.mark.parametrize("device, dtype", ALL_DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("blocks", [(9, 9), (3, 20), (20, 3)])
def test_gate_scores(device, dtype, causal, blocks, seed):
    gen = inputs.generator(seed)
    q = torch.randn(2, blocks[0], 4, 64, generator=gen).to(device, dtype)
    k = torch.randn(2, blocks[1], 2, 64, generator=gen).to(device, dtype)
    grad_out = torch.randn(2, 4, *blocks, generator=gen).to(device)
    seen = reference.gate_visible(*blocks, causal, device)
    visible_grad = grad_out.masked_fill(~seen, 0.0)

    grads = op_grads(lambda q, k: ops.gate_scores(q, k, causal=causal), (q, k), grad_out)
    wanted = oracle_grads(lambda q, k: reference.gate_scores(q, k, causal=causal), (q, k), grad_out)
    low = visible_grad.to(dtype).float()
    wide = k.float().repeat_interleave(2, 2)
    d_q = torch.einsum("bhij,bjhd->bihd", low, wide) * 64**-0.5
    d_k = torch.einsum("bhij,bihd->bjhd", low, q.float()).unflatten(2, (2, 2)).sum(3) * 64**-0.5
    for name, grad, want, plain in zip("qk", grads, wanted, (d_q, d_k), strict=True):
        numerics.compare(f"gate_scores d{name}", grad, want, plain.to(dtype))


def test_forward_only_ops_refuse_backward(device, seed):
    q, k, v = (x.requires_grad_() for x in small(device, seed=seed))
    out, _ = ops.block_sparse_attn(q, k, v)
    with pytest.raises(NotImplementedError, match=r"seer::block_sparse_attn: .+"):
        out.sum().backward()


def test_selection_carries_no_gradient(device, seed):
    q, k, _ = small(device, seed=seed)
    q.requires_grad_()
    bits = ops.gate_select(q, k, method=1, value=2)
    assert not bits.requires_grad


@pytest.mark.filterwarnings("ignore:Input #.*double precision")
@pytest.mark.parametrize("pools", [1, 4, 7])
def test_gradcheck(pools, seed):
    """Finite differences on the CPU op itself, in fp32 with steps that fp32 resolves."""
    x = distinct((1, 9, 2, 8), torch.float32, "cpu", seed).requires_grad_()
    weight = torch.randn(2, 8 * pools.bit_count(), 6, generator=inputs.generator(seed))
    weight.requires_grad_()

    def gate(x, weight):
        return ops.pool_gate(x, weight, block=4, pools=pools)

    torch.autograd.gradcheck(gate, (x, weight), eps=2.0**-6, atol=1e-3, rtol=1e-3, nondet_tol=0.0)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_rope_tables_have_no_gradient(device, name, seed):
    """A table that requires a gradient is refused, unless no graph is made."""
    tables = {key: torch.rand(2, 8, device=device) for key in ("cos", "sin")}
    tables[name].requires_grad_()
    x = torch.randn(1, 100, 2, 16, generator=inputs.generator(seed)).to(device)
    if device == "cuda":
        x = x.bfloat16()
    for needs in (False, True):
        with pytest.raises(NotImplementedError, match=f"seer::pool_gate: {name}: expected .+, got"):
            ops.pool_gate(x.detach().requires_grad_(needs), None, *tables.values())
    with torch.no_grad():
        assert not ops.pool_gate(x, None, *tables.values()).requires_grad
