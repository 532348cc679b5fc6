# SPDX-License-Identifier: Apache-2.0
"""NaN and Inf wherever a kernel has no business: unkept blocks, memory around the tensors, freed
memory that becomes an output, neighbours of a packed sequence."""

import math

import attention
import inputs
import numerics
import patterns
import pytest
import torch
from attention import make_bits, run_and_check, small, sparse_op

from seer_cuda import reference

POISON = [math.nan, math.inf, -math.inf]


@pytest.fixture
def device(sparse_device):
    return sparse_device


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("block", [(64, 64), (128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_that_no_row_keeps(device, value, block, causal, seed):
    rows = 400
    q, k, v = small(device, rows=(rows, rows), heads=(2, 2), batch=1, seed=seed)
    blocks = [attention.ceil_div(rows, b) for b in block]
    dense = patterns.pattern("random_50", 1, 2, *blocks, seed)
    dense[..., 1::2] = False  # odd KV blocks belong to nobody
    bits = reference.pack_block_bits(dense).to(device)
    kw = {"block_q": block[0], "block_kv": block[1], "causal": causal}
    clean = sparse_op(q, k, v, bits, **kw)
    unkept = (torch.arange(rows) // block[1] % 2 == 1).to(device)
    k[:, unkept], v[:, unkept] = value, value
    dirty = sparse_op(q, k, v, bits, **kw)
    for name, a, b in zip(("out", "lse"), dirty, clean, strict=True):
        numerics.assert_bitwise(name, a, b)


@pytest.mark.parametrize("value", POISON)
def test_blocks_that_other_heads_and_rows_keep(device, value, seed):
    """A poisoned KV block reaches exactly the rows that keep it, also where rows share loads."""
    rows = 512
    q, k, v = small(device, rows=(rows, rows), heads=(4, 1), batch=1, seed=seed)
    dense = patterns.pattern("random_50", 1, 4, 8, 8, seed)
    bits = reference.pack_block_bits(dense).to(device)
    clean, clean_lse = sparse_op(q, k, v, bits, causal=False)
    k[:, 192:256], v[:, 192:256] = value, value
    out, lse = sparse_op(q, k, v, bits, causal=False)
    keeps = dense[0, :, :, 3].repeat_interleave(64, -1).to(device)  # [heads, rows]
    numerics.assert_bitwise("out", out[0].transpose(0, 1)[~keeps], clean[0].transpose(0, 1)[~keeps])
    numerics.assert_bitwise("lse", lse[0][~keeps], clean_lse[0][~keeps])
    assert (~out[0].transpose(0, 1)[keeps].isfinite()).any(-1).all()


@pytest.mark.parametrize("poisoned", ["k", "v"])
def test_nan_that_is_seen_is_not_hidden(device, poisoned, seed):
    """A NaN that a row attends to makes that row NaN: errors upstream must stay visible."""
    q, k, v = small(device, rows=(200, 200), heads=(2, 2), batch=1, seed=seed)
    {"k": k, "v": v}[poisoned][:, 70] = math.nan
    out, _ = sparse_op(q, k, v)
    assert out[:, 70:].isnan().all() and out[:, :64].isfinite().all()


@pytest.mark.parametrize(
    "rows", [(1, 1), (63, 63), pytest.param((65, 65), marks=pytest.mark.reduced), (100, 250)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_memory_around_the_tensors(device, rows, causal, seed):
    """The rows after the last one, and the gaps between rows and heads, hold NaN."""
    q, k, v = small(device, rows=rows, layout="gaps", seed=seed)
    run_and_check(q, k, v, causal=causal)
    bits = make_bits("random_50", rows_q=rows[0], rows_kv=rows[1], device=device, seed=seed)
    run_and_check(q, k, v, bits, causal=causal)


@pytest.mark.parametrize("rows", [(1, 1), (63, 63), (65, 65), (100, 250)])
@pytest.mark.parametrize("causal", [True, False])
def test_memory_around_the_tensors_of_the_map_and_the_gate(device, rows, causal, seed):
    """The same for attn_pool and pool_gate."""
    q, k, v = small(device, rows=rows, layout="gaps", seed=seed)
    for out in torch.ops.seer.attn_pool(q, k, v, causal=causal):
        assert not out.isnan().any()
    assert torch.ops.seer.pool_gate(k, pools=7).isfinite().all()


@pytest.mark.parametrize(
    "op", [pytest.param("block_sparse_attn", marks=pytest.mark.reduced), "attn_pool"]
)
@pytest.mark.parametrize("causal", [True, False])
def test_neighbouring_sequences(device, op, causal, seed):
    """One sequence of a pack holds NaN: the others do not notice."""
    lengths = [70, 64, 31, 100]
    case = inputs.varlen(
        "normal",
        lengths,
        lengths,
        device=device,
        heads_q=4,
        heads_kv=2,
        dtype=torch.bfloat16,
        seed=seed,
    )
    bits = make_bits(
        "random_50", rows_q=100, rows_kv=100, batch=4, heads=2, seed=seed, device=device
    )
    edges = case["cu_seqlens_q"].tolist()
    for n in range(4):
        mine = slice(edges[n], edges[n + 1])
        others = torch.ones(edges[-1], dtype=torch.bool, device=device)
        others[mine] = False
        dirty = {**case}
        for name in ("q", "k", "v"):
            dirty[name] = case[name].clone()
            dirty[name][mine] = math.nan
        mask = {"block_bits": bits} if op == "block_sparse_attn" else {}
        run = sparse_op if op == "block_sparse_attn" else torch.ops.seer.attn_pool
        clean, spoiled = (run(**c, **mask, causal=causal)[:2] for c in (case, dirty))
        numerics.assert_bitwise("out", spoiled[0][others], clean[0][others])
        numerics.assert_bitwise("lse", spoiled[1][:, others], clean[1][:, others])


def fill_free_memory(device, tensors):
    """Leaves blocks of NaN of these tensors' sizes in the allocator's free lists."""
    for x in tensors:
        kind = x.dtype if x.is_floating_point() else torch.int32
        fill = math.nan if x.is_floating_point() else -1
        junk = [torch.full((x.numel() + 1,), fill, dtype=kind, device=device) for _ in range(4)]
        del junk


@pytest.mark.parametrize("pattern", ["nothing", "empty_rows", "above_diagonal", "random_50"])
@pytest.mark.parametrize("rows", [(150, 150), (300, 100)])
def test_every_output_element_is_written(device, pattern, rows, seed):
    """Outputs reuse memory that was full of NaN: rows that see nothing must still be written."""
    q, k, v = small(device, rows=rows, seed=seed)
    bits = make_bits(pattern, rows_q=rows[0], rows_kv=rows[1], heads=4, seed=seed, device=device)
    for _ in range(3):
        fill_free_memory(device, sparse_op(q, k, v, bits))
        run_and_check(q, k, v, bits)
    fill_free_memory(device, torch.ops.seer.attn_pool(q, k, v))
    for result in torch.ops.seer.attn_pool(q, k, v):
        assert not result.isnan().any()


def test_tokens_of_no_sequence_are_written(device, seed):
    """Rows before the first and behind the last sequence (CUDA), and of one without keys."""
    case = inputs.varlen(
        "normal",
        [40, 0, 30],
        [40, 50, 0],
        slack=inputs.SLACK[device],
        device=device,
        dtype=torch.bfloat16,
        seed=seed,
    )
    start, end = case["cu_seqlens_q"].tolist()[:2]
    nobody = torch.ones(case["q"].shape[0], dtype=torch.bool, device=device)
    nobody[start:end] = False
    for run in (sparse_op, lambda **c: torch.ops.seer.attn_pool(**c)[:2]):
        fill_free_memory(device, run(**case))
        out, lse = run(**case)
        assert (out[nobody] == 0).all() and (lse[:, nobody] == -math.inf).all()
        assert lse[:, ~nobody].isfinite().all()


@pytest.mark.parametrize("per_token", [False, True])
def test_poisoned_values_stay_out_of_the_map(device, per_token, seed):
    """pooled holds probabilities: v has no influence on it."""
    q, k, v = small(device, seed=seed)
    clean = torch.ops.seer.attn_pool(q, k, v, per_token=per_token)
    dirty = torch.ops.seer.attn_pool(q, k, v * math.nan, per_token=per_token)
    numerics.assert_bitwise("pooled", dirty[2], clean[2])
    numerics.assert_bitwise("lse", dirty[1], clean[1])
