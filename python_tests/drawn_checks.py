# SPDX-License-Identifier: Apache-2.0
"""Builds a case of drawn_cases, runs it, and judges it against the float64 oracle.

Every forward runs twice: the second result must have the bits of the first.
"""

import math

import attention
import baselines
import inputs
import numerics
import patterns
import selection
import torch
from drawn_cases import Case
from pooled import pool_op
from pooled import run_and_check_pool as check_attn_pool
from samples import as_tuple
from test_gate_ops import SCORE_AXES, rope
from test_gate_ops import run_and_check_pool as check_pool_gate
from test_gradients import op_grads, oracle_grads
from torch import Tensor

from seer_cuda import reference

ops = torch.ops.seer
POISON = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def check(case: Case) -> None:
    """Runs a case; AssertionError where the op and the oracle disagree."""
    _CHECK[case["op"]](case)
    if case["device"] == "cuda":
        torch.cuda.synchronize()  # a fault belongs to the case that made it


def twice(op, *args, **kwargs):
    """op's results, which must have the same bits in a second call."""
    first, again = op(*args, **kwargs), op(*args, **kwargs)
    for n, (a, b) in enumerate(zip(as_tuple(first), as_tuple(again), strict=True)):
        numerics.assert_bitwise(f"result {n} of a second call", b, a)
    return first


# -------------------------------------------------------------------------------- attention


def _attention_arguments(case: Case) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
    """(q, k, v) and the keyword arguments that all attention ops share."""
    options = {
        "heads_q": case["heads_kv"] * case["group"],
        "heads_kv": case["heads_kv"],
        "head_dim": case["head_dim"],
        "dtype": getattr(torch, case["dtype"]),
        "device": case["device"],
        "layout": case["layout"],
        "seed": case["seed"],
    }
    kw = {name: case[name] for name in ("block_q", "block_kv", "causal", "scale")}
    if not case["packed"]:
        rows = {"rows_q": case["rows_q"][0], "rows_kv": case["rows_kv"][0]}
        return inputs.qkv(case["family"], batch=len(case["rows_q"]), **rows, **options), kw
    lengths = case["rows_q"], case["rows_kv"]
    kw |= inputs.varlen(case["family"], *lengths, slack=case["slack"], **options)
    kw["max_rows_q"] += case["spare_rows"]
    kw["max_rows_kv"] += case["spare_rows"]
    return tuple(kw.pop(name) for name in "qkv"), kw


def _mask(case: Case, q: Tensor, kw: dict) -> Tensor | None:
    """block_bits of the case. Bits past blocks_kv and spare words are ones or noise."""
    if case["mask"] == "none":
        return None
    batch = len(case["rows_q"]) if case["mask_batch"] == "own" else 1
    heads = {"one": 1, "kv": case["heads_kv"], "q": q.shape[-2]}[case["mask_heads"]]
    rows_q = kw.get("max_rows_q", case["rows_q"][0])
    rows_kv = kw.get("max_rows_kv", case["rows_kv"][0])
    blocks_q = attention.ceil_div(rows_q, case["block_q"])
    blocks_kv = attention.ceil_div(rows_kv, case["block_kv"])
    if case["mask"] == "noise":
        shape = (batch, heads, blocks_q, -(-blocks_kv // 32) + case["spare_words"])
        gen = inputs.generator(case["seed"])
        bits = torch.randint(-(2**31), 2**31, shape, generator=gen).to(torch.int32)
    else:
        keep = patterns.pattern(case["mask"], batch, heads, blocks_q, blocks_kv, case["seed"])
        bits = reference.pack_block_bits(keep)
        bits = patterns.with_stray_bits(bits, blocks_kv, case["spare_words"])
    bits = bits.to(case["device"])
    if case["mask_layout"] == "transposed":
        return bits.transpose(1, 2).contiguous().transpose(1, 2)
    if case["mask_layout"] == "gaps":
        return torch.nn.functional.pad(bits, (0, 3, 0, 2, 0, 1), value=-1)[
            :, :heads, :blocks_q, : bits.shape[3]
        ]
    return bits


def _poison(case: Case, q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None, kw: dict) -> None:
    """NaN or Inf in every KV block that no query block both keeps and sees, in place."""
    if case["poison"] is None:
        return
    names = ("cu_seqlens_q", "cu_seqlens_kv", "max_rows_q", "max_rows_kv")
    lengths = [kw.get(name) for name in names]
    free = torch.ones(k.shape[:-1], dtype=torch.bool, device=k.device)
    for n, at_q, at_kv in reference.sequences(q, k, *lengths):
        one_q, one_k = q[at_q], k[at_kv]
        seen = reference.token_visible(len(one_q), len(one_k), case["causal"], q.device)
        seen = seen.expand(q.shape[-2], -1, -1)
        if bits is not None:
            blocks = case["block_q"], case["block_kv"]
            seen = seen & reference.kept_tokens(bits, n, one_q, one_k, *blocks)
        by_kv_head = seen.any(1).unflatten(0, (case["heads_kv"], case["group"])).any(1)
        block = torch.arange(len(one_k), device=k.device) // case["block_kv"]
        used = torch.zeros_like(by_kv_head, dtype=torch.int32)
        used = used.index_add(1, block, by_kv_head.to(torch.int32)) > 0
        free[at_kv] = ~used[:, block].T
    for x in (k, v):
        x.masked_fill_(free[..., None], POISON[case["poison"]])


def _check_block_sparse_attn(case: Case) -> None:
    (q, k, v), kw = _attention_arguments(case)
    bits = _mask(case, q, kw)
    _poison(case, q, k, v, bits, kw)
    out, lse = twice(attention.sparse_op, q, k, v, bits, arch=case["arch"], **kw)
    attention.check_attention(case["op"], out, lse, q, k, v, bits, **kw)


def _check_attn_pool(case: Case) -> None:
    (q, k, v), kw = _attention_arguments(case)
    _poison(case, q, k, v, None, kw)
    kw |= {"per_token": case["per_token"], "reduce": case["reduce"]}
    twice(pool_op, q, k, v, arch=case["arch"], **kw)
    check_attn_pool(q, k, v, arch=case["arch"], **kw)


def _check_attn_pool_gradient(case: Case) -> None:
    dtype = getattr(torch, case["dtype"])
    tensors = inputs.qkv(
        "normal",
        rows_q=case["rows_q"],
        rows_kv=case["rows_kv"],
        batch=case["batch"],
        heads_q=case["heads_kv"] * case["group"],
        heads_kv=case["heads_kv"],
        head_dim=case["head_dim"],
        dtype=dtype,
        device=case["device"],
        layout=case["layout"],
        seed=case["seed"],
    )
    gen = inputs.generator(case["seed"] + 1)
    grad_out = torch.randn(tensors[0].shape, generator=gen).to(case["device"], dtype)
    kw = {"causal": case["causal"]}
    blocks = {"block_q": case["block_q"], "block_kv": case["block_kv"]}
    # Once: torch's backward kernel does not promise the same bits twice (_flash_backward.py).
    grads = op_grads(lambda *a: pool_op(*a, **kw, **blocks)[0], tensors, grad_out)
    wanted = oracle_grads(lambda *a: reference.attn_pool(*a, **kw)[0], tensors, grad_out)
    plain = baselines.attention_grads(*tensors, grad_out, **kw)
    forward = baselines.attention(*tensors, **kw)
    noise = baselines.attention_grads_error(*tensors, grad_out, forward)
    own = dict(zip("qkv", (*noise, 0.0), strict=True))
    for name, grad, want, base in zip("qkv", grads, wanted, plain, strict=True):
        extra = 4 * forward.delta * float(want.abs().max()) + own[name]
        axes = attention.AXES[4]
        numerics.compare(f"attn_pool d{name}", grad, want, base, extra=extra, axes=axes)


# -------------------------------------------------------------------------------- the gate


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":
        return inputs.with_gaps(x, 1, 8)
    return inputs.with_gaps(x, 2, 3) if layout == "unaligned" else x


def _check_pool_gate(case: Case) -> None:
    device, dtype = case["device"], getattr(torch, case["dtype"])
    gen = inputs.generator(case["seed"])
    shape = (case["batch"], case["rows"], case["heads"], case["head_dim"])
    x = _laid_out(torch.randn(shape, generator=gen).to(device, dtype), case["layout"])
    weight = cos = sin = None
    if case["gate_dim"]:
        channels = case["head_dim"] * case["pools"].bit_count()
        draw = torch.randn(case["heads_out"], channels, case["gate_dim"], generator=gen)
        weight = (draw / channels**0.5).to(device, dtype)
    if case["rotary"] is not None:
        blocks = -(-case["rows"] // case["block"])
        batch = {"none": None, "one": 1, "own": case["batch"]}[case["rotary_batch"]]
        kw = {"batch": batch, "block": case["block"], "device": device}
        cos, sin = rope(blocks, case["rotary"], **kw)
    kw = {"block": case["block"], "pools": case["pools"]}
    twice(ops.pool_gate, x, weight, cos, sin, **kw)
    check_pool_gate(x, weight, cos, sin, **kw)


def _gate_tensors(case: Case) -> tuple[Tensor, Tensor]:
    gen = inputs.generator(case["seed"])
    shape_q = (case["batch"], case["blocks_q"], case["heads_k"] * case["group"], case["gate_dim"])
    shape_k = (case["batch"], case["blocks_kv"], case["heads_k"], case["gate_dim"])
    values = case.get("values", "normal")
    if values == "ties":  # scores are small whole numbers, exact at every precision
        q, k = (torch.randint(-1, 2, s, generator=gen).float() for s in (shape_q, shape_k))
    else:
        q, k = (torch.randn(s, generator=gen) for s in (shape_q, shape_k))
        q *= {"sharp": 4.0, "flat": 0.05}.get(values, 1.0)
    if values == "nan":
        for x in (q, k):
            hurt = torch.rand(x.shape[:3], generator=gen) < 0.1
            x[..., 0].masked_fill_(hurt, math.nan)
    return tuple(
        _laid_out(x.to(case["device"], getattr(torch, case["dtype"])), case["layout"])
        for x in (q, k)
    )


def _check_gate_scores(case: Case) -> None:
    q, k = _gate_tensors(case)
    kw = {"scale": case["scale"], "causal": case["causal"]}
    scores = twice(ops.gate_scores, q, k, **kw)
    assert (scores.dtype, scores.device) == (torch.float32, q.device)
    error = baselines.gate_score_error(q, k, scale=case["scale"])
    ref = reference.gate_scores(q, k, **kw)
    numerics.compare("gate_scores", scores, ref, extra=error, axes=SCORE_AXES)


def _check_gate_select(case: Case) -> None:
    q, k = _gate_tensors(case)
    kw = {"scale": case["scale"], "causal": case["causal"]}
    forced = {name: case[name] for name in ("sink", "local", "dense_last_rows")}
    rule = {"method": case["method"], "value": case["value"], **forced}
    bits = twice(ops.gate_select, q, k, **kw, **rule)
    scores = reference.gate_scores(q, k, **kw)
    ranks = case["method"] in (reference.TOPK, reference.DENSITY)
    # With a scale of its own, gate_dim ** -0.5, a product is rounded: equal scores stay equal, but
    # only a power of two keeps them exact.
    exact = ranks and case["values"] == "ties" and case["scale"] is not None
    delta = 0.0 if exact else baselines.gate_score_error(q, k, scale=case["scale"])
    selection.check("gate_select", bits, scores, delta, causal=case["causal"], **rule)


def _check_gate_scores_gradient(case: Case) -> None:
    q, k = _gate_tensors(case)
    scale = case["gate_dim"] ** -0.5 if case["scale"] is None else case["scale"]
    kw = {"scale": case["scale"], "causal": case["causal"]}
    shape = (case["batch"], q.shape[2], case["blocks_q"], case["blocks_kv"])
    grad_out = torch.randn(shape, generator=inputs.generator(case["seed"] + 1)).to(q.device)
    grads = twice(op_grads, lambda *a: ops.gate_scores(*a, **kw), (q, k), grad_out)
    wanted = oracle_grads(lambda *a: reference.gate_scores(*a, **kw), (q, k), grad_out)
    seen = reference.gate_visible(*shape[2:], case["causal"], q.device)
    low = grad_out.masked_fill(~seen, 0.0).to(q.dtype).float()
    wide = k.float().repeat_interleave(case["group"], 2)
    d_q = torch.einsum("bhij,bjhd->bihd", low, wide) * scale
    d_k = torch.einsum("bhij,bihd->bjhd", low, q.float()) * scale
    d_k = d_k.unflatten(2, (case["heads_k"], case["group"])).sum(3)
    # Sums in fp32, in whatever order: see score_error() on terms that are not related.
    sizes = oracle_grads(lambda *a: reference.gate_scores(*a, **kw), (q.abs(), k.abs()), low.abs())
    terms = shape[3], shape[2] * case["group"]
    for n, (grad, want, plain) in enumerate(zip(grads, wanted, (d_q, d_k), strict=True)):
        extra = 2 * numerics.EPS32 * math.sqrt(terms[n]) * float(sizes[n].abs().max())
        numerics.compare(f"gate_scores d{'qk'[n]}", grad, want, plain.to(q.dtype), extra=extra)


# ------------------------------------------------------------------------------- block bits


def _check_block_bits(case: Case) -> None:
    gen = inputs.generator(case["seed"])
    shape = (*case["leading"], case["blocks_kv"])
    mask = torch.rand(shape, generator=gen) < case["density"]
    if case["layout"] == "every other":
        mask = mask.repeat_interleave(2, -1)[..., ::2]
    elif case["layout"] == "flipped":
        mask = mask.mT.contiguous().mT if mask.dim() > 1 else mask
    elif case["layout"] == "expanded":
        mask = mask[..., :1].expand(shape) if case["blocks_kv"] else mask
    mask = mask.to(case["device"])
    bits = twice(ops.pack_block_bits, mask)
    numerics.assert_bitwise("pack", bits, reference.pack_block_bits(mask))
    wide = torch.nn.functional.pad(bits, (0, case["spare_words"]), value=-1)
    back = twice(ops.unpack_block_bits, wide, case["blocks_kv"])
    numerics.assert_bitwise("unpack", back, mask.contiguous())
    # Lists of anything: repeated, unordered, out of range, counts that lie.
    low, high = -2, case["blocks_kv"] + 3
    lists = torch.randint(low, high, (*case["leading"], case["capacity"]), generator=gen)
    lists = lists.to(case["device"], torch.int32)
    counts = torch.randint(-1, case["capacity"] + 3, tuple(case["leading"]), generator=gen)
    counts = counts.to(case["device"], torch.int32)
    found = twice(ops.block_bits_from_indices, lists, counts, case["blocks_kv"])
    want = reference.block_bits_from_indices(lists, counts, case["blocks_kv"])
    numerics.assert_bitwise("from indices", found, want)


_CHECK = {
    "block_sparse_attn": _check_block_sparse_attn,
    "attn_pool": _check_attn_pool,
    "attn_pool gradient": _check_attn_pool_gradient,
    "pool_gate": _check_pool_gate,
    "gate_scores": _check_gate_scores,
    "gate_scores gradient": _check_gate_scores_gradient,
    "gate_select": _check_gate_select,
    "block_bits": _check_block_bits,
}
