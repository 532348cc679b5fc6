# SPDX-License-Identifier: Apache-2.0
"""Hostile input: everything outside the contract is refused before any work, and says why.

Every text reads ``seer::<op>: <argument>: expected <contract>, got <actual>. <what to do>``.
"""

import math
import re

import pytest
import torch

ops = torch.ops.seer


def attention_args(**changes):
    """A valid call: 2 sequences, 4 / 2 heads, rows 100 / 150."""
    args = {
        "q": torch.randn(2, 100, 4, 64),
        "k": torch.randn(2, 150, 2, 64),
        "v": torch.randn(2, 150, 2, 64),
        "block_bits": torch.full((2, 4, 2, 1), -1, dtype=torch.int32),
    }
    return args | changes


def varlen_args(**changes):
    """A valid packed call: query lengths 40, 60, KV lengths 70, 80."""
    args = {
        "q": torch.randn(100, 4, 64),
        "k": torch.randn(150, 2, 64),
        "v": torch.randn(150, 2, 64),
        "cu_seqlens_q": ints(0, 40, 100),
        "cu_seqlens_kv": ints(0, 70, 150),
        "max_rows_q": 60,
        "max_rows_kv": 80,
    }
    return args | changes


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def bits(*shape, dtype=torch.int32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def f32(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


def last_dim_strided(*shape):
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


# argument that the text must name (or a choice) -> what is changed in the valid call
BOTH_ATTENTION = [
    ("q", {"q": f32(2, 100, 4, 64).double()}),
    ("q", {"q": torch.ones(2, 100, 4, 64, dtype=torch.int32)}),
    ("q", {"q": f32(2, 100, 4 * 64)}),
    ("q", {"q": f32(1, 2, 100, 4, 64)}),
    ("q", {"q": last_dim_strided(2, 100, 4, 64)}),
    ("q", {"q": f32(2, 100, 4, 12), "k": f32(2, 150, 2, 12), "v": f32(2, 150, 2, 12)}),
    ("q", {"q": f32(2, 100, 4, 264), "k": f32(2, 150, 2, 264), "v": f32(2, 150, 2, 264)}),
    ("k", {"k": f32(2, 150, 2, 64).half()}),
    ("k", {"k": f32(2, 150, 2, 64, device="meta")}),
    ("k", {"k": f32(2, 150, 2, 128)}),
    ("k", {"k": f32(3, 150, 2, 64), "v": f32(3, 150, 2, 64)}),
    ("k", {"k": f32(150, 2, 64)}),
    ("k", {"k": f32(2, 150, 3, 64), "v": f32(2, 150, 3, 64)}),
    ("k", {"k": f32(2, 150, 8, 64), "v": f32(2, 150, 8, 64)}),
    ("k", {"k": f32(2, 150, 0, 64), "v": f32(2, 150, 0, 64)}),
    ("k", {"k": last_dim_strided(2, 150, 2, 64)}),
    ("v", {"v": f32(2, 150, 2, 64).half()}),
    ("v", {"v": f32(2, 150, 2, 64, device="meta")}),
    ("v", {"v": f32(2, 149, 2, 64)}),
    ("v", {"v": f32(2, 150, 1, 64)}),
    ("v", {"v": f32(2, 150, 2, 32)}),
    ("v", {"v": last_dim_strided(2, 150, 2, 64)}),
    ("block_q", {"block_q": 0}),
    ("block_q", {"block_q": -64}),
    ("block_q", {"block_q": 48}),
    ("block_q", {"block_q": 256}),
    ("block_kv", {"block_kv": 0}),
    ("block_kv", {"block_kv": 100}),
    ("scale", {"scale": math.nan}),
    ("scale", {"scale": math.inf}),
    ("cu_seqlens_q|q", {"cu_seqlens_q": ints(0, 50, 100), "cu_seqlens_kv": ints(0, 70, 150),
                        "max_rows_q": 60, "max_rows_kv": 80}),
]  # fmt: skip
MASK = [
    ("block_bits", {"block_bits": bits(2, 4, 2, 1, dtype=torch.int64)}),
    ("block_bits", {"block_bits": bits(2, 4, 2, 5, dtype=torch.bool)}),
    ("block_bits", {"block_bits": bits(2, 4, 2, 1, device="meta")}),
    ("block_bits", {"block_bits": bits(4, 2, 1)}),
    ("block_bits", {"block_bits": bits(3, 4, 2, 1)}),
    ("block_bits", {"block_bits": bits(2, 3, 2, 1)}),
    ("block_bits", {"block_bits": bits(2, 4, 1, 1)}),
    ("block_bits", {"block_bits": bits(2, 4, 3, 1)}),
    ("block_bits", {"block_bits": bits(2, 4, 2, 0)}),
    ("block_bits", {"block_bits": bits(2, 4, 2, 4)[..., ::2]}),
    ("block_bits", {"k": f32(2, 2100, 2, 64), "v": f32(2, 2100, 2, 64)}),
]
VARLEN = [
    ("cu_seqlens_kv|cu_seqlens_q", {"cu_seqlens_kv": None}),
    ("cu_seqlens_q|cu_seqlens_kv", {"cu_seqlens_q": None}),
    ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 40, 100, dtype=torch.int64)}),
    ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 40, 100).to("meta")}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([[0, 40, 100]], dtype=torch.int32)}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.zeros(0, dtype=torch.int32),
                      "cu_seqlens_kv": torch.zeros(0, dtype=torch.int32)}),
    ("cu_seqlens_kv|cu_seqlens_q", {"cu_seqlens_kv": ints(0, 70, 100, 150)}),
    ("max_rows_q", {"max_rows_q": 0}),
    ("max_rows_kv", {"max_rows_kv": 0}),
    ("max_rows_q", {"max_rows_q": -1}),
    ("q", {"q": f32(1, 100, 4, 64)}),
    ("k", {"k": f32(1, 150, 2, 64)}),
    ("v", {"v": f32(149, 2, 64)}),
    ("q", {"q": f32(100, 4, 64).double()}),
]  # fmt: skip
# Mistakes in what cu_seqlens holds: the CPU reads and refuses, CUDA clamps without looking.
CONTENTS = [
    ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 60, 40)}),
    ("cu_seqlens_q", {"cu_seqlens_q": ints(-1, 40, 100)}),
    ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 40, 101), "max_rows_q": 70}),
    ("cu_seqlens_kv", {"cu_seqlens_kv": ints(0, 70, 2**31 - 1)}),
    ("cu_seqlens_q|max_rows_q", {"max_rows_q": 59}),
    ("cu_seqlens_kv|max_rows_kv", {"max_rows_kv": 10}),
]


def pool_args(**changes):
    args = {
        "x": torch.randn(2, 200, 2, 64),
        "weight": torch.randn(4, 192, 32),
        "cos": torch.randn(4, 16),
        "sin": torch.randn(4, 16),
        "pools": 7,
    }
    return args | changes


POOL_GATE = [
    ("x", {"x": f32(2, 200, 2, 64).double()}),
    ("x", {"x": f32(200, 2, 64)}),
    ("x", {"x": last_dim_strided(2, 200, 2, 64)}),
    ("weight", {"weight": f32(4, 192, 32).half()}),
    ("weight", {"weight": f32(4, 192, 32, device="meta")}),
    ("weight", {"weight": f32(192, 32)}),
    ("weight", {"weight": f32(3, 192, 32)}),
    ("weight", {"weight": f32(4, 128, 32)}),
    ("weight", {"weight": f32(1, 192, 32)}),
    ("cos|sin", {"sin": None}),
    ("cos|sin", {"cos": None}),
    ("cos", {"cos": f32(4, 16).half(), "sin": f32(4, 16).half()}),
    ("cos", {"cos": f32(4, 16, device="meta")}),
    ("sin", {"sin": f32(4, 8)}),
    ("cos", {"cos": f32(3, 16), "sin": f32(3, 16)}),
    ("cos", {"cos": f32(3, 4, 16), "sin": f32(3, 4, 16)}),
    ("cos", {"cos": f32(4, 17), "sin": f32(4, 17)}),
    ("cos", {"cos": f32(4), "sin": f32(4)}),
    ("block", {"block": 0}),
    ("block", {"block": -1}),
    ("pools", {"pools": 0}),
    ("pools", {"pools": 8}),
]


def packed_pool_args(**changes):
    """A valid packed call: lengths 120 and 80."""
    return pool_args(x=torch.randn(200, 2, 64), cos=torch.randn(2, 16), sin=torch.randn(2, 16),
                     cu_seqlens=ints(0, 120, 200), max_rows=120) | changes  # fmt: skip


PACKED_POOL = [
    ("x", {"x": f32(1, 200, 2, 64)}),
    ("cu_seqlens", {"cu_seqlens": ints(0, 120, 200, dtype=torch.int64)}),
    ("cu_seqlens", {"cu_seqlens": ints(0, 120, 200).to("meta")}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([[0, 120, 200]], dtype=torch.int32)}),
    ("cu_seqlens", {"cu_seqlens": torch.zeros(0, dtype=torch.int32)}),
    ("max_rows", {"max_rows": 0}),
    ("max_rows", {"max_rows": -1}),
    ("max_rows", {"max_rows": 2**31}),
    ("cos", {"cos": f32(4, 16), "sin": f32(4, 16)}),
    ("cos", {"cos": f32(3, 2, 16), "sin": f32(3, 2, 16)}),
]
PACKED_POOL_CONTENTS = [
    ("cu_seqlens", {"cu_seqlens": ints(0, 120, 100)}),
    ("cu_seqlens", {"cu_seqlens": ints(1, 120, 200)}),
    ("cu_seqlens", {"cu_seqlens": ints(0, 120, 199)}),
    ("cu_seqlens", {"max_rows": 119}),
]


def score_args(**changes):
    return {"q_gate": torch.randn(2, 3, 4, 32), "k_gate": torch.randn(2, 5, 2, 32)} | changes


GATE = [
    ("q_gate", {"q_gate": f32(2, 3, 4, 32).double()}),
    ("q_gate", {"q_gate": f32(3, 4, 32)}),
    ("q_gate", {"q_gate": last_dim_strided(2, 3, 4, 32)}),
    ("k_gate", {"k_gate": f32(2, 5, 2, 32).half()}),
    ("k_gate", {"k_gate": f32(2, 5, 2, 32, device="meta")}),
    ("k_gate", {"k_gate": f32(5, 2, 32)}),
    ("k_gate", {"k_gate": f32(1, 5, 2, 32)}),
    ("k_gate", {"k_gate": f32(2, 5, 3, 32)}),
    ("k_gate", {"k_gate": f32(2, 5, 8, 32)}),
    ("k_gate", {"k_gate": f32(2, 5, 0, 32)}),
    ("k_gate", {"k_gate": f32(2, 5, 2, 16)}),
    ("k_gate", {"k_gate": last_dim_strided(2, 5, 2, 32)}),
    ("scale", {"scale": math.nan}),
]


def packed_score_args(**changes):
    return score_args(cu_seqlens_q=ints(0, 30, 78), cu_seqlens_kv=ints(0, 80, 90), block_q=16,
                      block_kv=16) | changes  # fmt: skip


PACKED_GATE = [
    ("cu_seqlens_q", {"cu_seqlens_q": None}),
    ("cu_seqlens_kv", {"cu_seqlens_kv": None}),
    ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 30, 78, dtype=torch.int64)}),
    ("cu_seqlens_kv", {"cu_seqlens_kv": ints(0, 80, 90).to("meta")}),
    ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 78)}),
    ("cu_seqlens_kv", {"cu_seqlens_kv": ints(0, 40, 80, 90)}),
    ("block_q", {"block_q": 0}),
    ("block_kv", {"block_kv": -16}),
]
PACKED_GATE_CONTENTS = [
    ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 30, 20)}),
    ("cu_seqlens_q", {"cu_seqlens_q": ints(1, 30, 78)}),
    ("cu_seqlens_kv", {"cu_seqlens_kv": ints(0, 81, 90)}),
]
SELECT = [
    ("method", {"method": 4}),
    ("method", {"method": -1}),
    ("value", {"value": math.nan}),
    ("value", {"method": 1, "value": -1.0}),
    ("value", {"method": 1, "value": math.inf}),
    ("value", {"method": 2, "value": 1.5}),
    ("value", {"method": 2, "value": -0.5}),
    ("sink", {"sink": -1}),
    ("local", {"local": -1}),
    ("dense_last_rows", {"dense_last_rows": -1}),
]
BITS = [
    ("pack_block_bits", "mask", (torch.zeros(1, 1, 2, 3),)),
    ("pack_block_bits", "mask", (torch.zeros(1, 1, 2, 3, dtype=torch.uint8),)),
    ("pack_block_bits", "mask", (torch.tensor(True),)),
    ("unpack_block_bits", "block_bits", (bits(1, 1, 2, 1, dtype=torch.int64), 3)),
    ("unpack_block_bits", "block_bits", (torch.tensor(1, dtype=torch.int32), 3)),
    ("unpack_block_bits", "blocks_kv|block_bits", (bits(1, 1, 2, 1), 33)),
    ("unpack_block_bits", "blocks_kv", (bits(1, 1, 2, 1), -1)),
    ("block_bits_from_indices", "indices", (f32(1, 1, 2, 3), ints(1, 1).view(1, 1, 2), 9)),
    ("block_bits_from_indices", "indices", (bits(1, 2, 3, dtype=torch.int64), bits(1, 2), 9)),
    ("block_bits_from_indices", "counts", (bits(1, 2, 3), bits(1, 2, dtype=torch.int64), 9)),
    ("block_bits_from_indices", "counts", (bits(1, 2, 3), bits(1, 3), 9)),
    ("block_bits_from_indices", "counts", (bits(1, 2, 3), bits(2), 9)),
    ("block_bits_from_indices", "counts", (bits(1, 2, 3), bits(1, 2, device="meta"), 9)),
    ("block_bits_from_indices", "blocks_kv", (bits(1, 2, 3), bits(1, 2), -1)),
]


def hostile(device):
    """(op, argument, builder of the valid call, change) of every case for `device`."""
    attention = [(attention_args, *case) for case in BOTH_ATTENTION]
    attention += [(varlen_args, *case) for case in VARLEN]
    if device == "cpu":
        attention += [(varlen_args, *case) for case in CONTENTS]
    for make, argument, change in attention:
        yield "block_sparse_attn", argument, make, change
        yield "attn_pool", argument, make, change
    for argument, change in MASK:
        yield "block_sparse_attn", argument, attention_args, change
    for argument, change in POOL_GATE:
        yield "pool_gate", argument, pool_args, change
    packed_pool, packed_gate = list(PACKED_POOL), list(PACKED_GATE)
    if device == "cpu":
        packed_pool += PACKED_POOL_CONTENTS
        packed_gate += PACKED_GATE_CONTENTS
    for argument, change in packed_pool:
        yield "pool_gate", argument, packed_pool_args, change
    for argument, change in packed_gate:
        yield "gate_scores", argument, packed_score_args, change
        yield "gate_select", argument, packed_score_args, change
    for argument, change in GATE:
        yield "gate_scores", argument, score_args, change
        yield "gate_select", argument, score_args, change
    for argument, change in SELECT:
        yield "gate_select", argument, score_args, change


def params():
    for device in ("cpu", "cuda"):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for n, case in enumerate(hostile(device)):
            name = f"{device}-{case[0]}-{case[1].split('|')[0]}-{n}"
            yield pytest.param(device, *case, id=name, marks=marks)


def place(name, x, device):
    """x on `device`, with bf16 for fp32 on CUDA, which has no fp32 kernels; meta stays meta."""
    if not isinstance(x, torch.Tensor) or device == "cpu" or x.device.type == "meta":
        return x
    if x.dtype == torch.float32 and name not in ("cos", "sin"):
        x = x.bfloat16() if x.is_contiguous() else x.repeat_interleave(2, -1).bfloat16()[..., ::2]
    if x.is_contiguous():
        return x.to(device)
    return x.repeat_interleave(2, -1).to(device)[..., ::2]  # .to() alone would close the gaps


def call(op, make, change, device):
    args = make(**change)
    if op == "attn_pool":
        args.pop("block_bits", None)
    return getattr(ops, op)(**{name: place(name, x, device) for name, x in args.items()})


def assert_contract_text(error, op, argument):
    """The text names the op and the argument, what was expected, what came and what to do."""
    form = rf"seer::{op}: ({argument}): expected .+, got .+\. \S.*\."
    assert re.search(form, str(error.value)), f"no match for {form} in:\n{error.value}"


@pytest.mark.parametrize("device, op, argument, make, change", list(params()))
def test_refused(device, op, argument, make, change):
    with pytest.raises(RuntimeError) as error:
        call(op, make, change, device)
    assert_contract_text(error, op, argument)


@pytest.mark.parametrize("op, argument, args", BITS, ids=range(len(BITS)))
def test_bit_ops_refuse(op, argument, args):
    with pytest.raises(RuntimeError) as error:
        getattr(ops, op)(*args)
    assert_contract_text(error, op, argument)


@pytest.mark.parametrize(
    "op, make",
    [("block_sparse_attn", attention_args), ("block_sparse_attn", varlen_args),
     ("attn_pool", attention_args), ("attn_pool", varlen_args), ("pool_gate", pool_args),
     ("gate_scores", score_args), ("gate_select", score_args), ("pool_gate", packed_pool_args),
     ("gate_scores", packed_score_args), ("gate_select", packed_score_args)],
)  # fmt: skip
def test_the_unchanged_calls_are_valid(device, op, make):
    """The hostile cases differ from these in one thing each."""
    call(op, make, {}, device)


@pytest.mark.gpu
def test_cuda_refuses_what_it_has_no_kernel_for():
    """fp32, head_dim 96 and blocks of 32: the text says what this build has."""
    q = torch.randn(1, 128, 2, 64, device="cuda")
    wide = torch.randn(1, 128, 2, 96, device="cuda", dtype=torch.bfloat16)
    half = q.half()
    for args, kwargs in (((q, q, q), {}), ((wide, wide, wide), {}),
                         ((half, half, half), {"block_q": 32})):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"seer::block_sparse_attn: .+"):
            ops.block_sparse_attn(*args, **kwargs)


@pytest.mark.gpu
def test_mixed_devices():
    gpu = {k: v.cuda().bfloat16() if v.dtype.is_floating_point else v.cuda()
           for k, v in attention_args().items()}  # fmt: skip
    for name in ("k", "v", "block_bits"):
        with pytest.raises(RuntimeError) as error:
            ops.block_sparse_attn(**(gpu | {name: gpu[name].cpu()}))
        assert_contract_text(error, "block_sparse_attn", name)


def test_no_memory_for_the_results():
    """More than any machine addresses: an exception that says what was wanted, and where."""
    q = torch.zeros(1, 1, 1, 8).expand(1, 2**31 - 1, 100_000, 8)
    lists = torch.zeros(100_000, 0, dtype=torch.int32)
    for call in (
        lambda: ops.block_sparse_attn(q, q[:, :1, :1], q[:, :1, :1]),
        lambda: ops.block_bits_from_indices(lists, lists.sum(-1, dtype=torch.int32), 2**31 - 1),
    ):
        with pytest.raises(RuntimeError, match=r"expected memory for .+ on cpu, got none\. Free"):
            call()
