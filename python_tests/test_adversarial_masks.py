# SPDX-License-Identifier: Apache-2.0
"""Masks against a kernel that merges the rows of several query blocks, or of several heads, into
one ordered stream of KV blocks: neighbours that agree, that share nothing, that end long before
or after each other, and streams of any length through a ring of buffers."""

import math
from itertools import product

import attention
import inputs
import numerics
import patterns
import pytest
import torch
from attention import FAMILIES, has_kernel, run_repeatedly, sparse_op
from grid import case_id, pairwise

from seer_cuda import reference

MASKS = (
    "one_in_2",
    "one_in_3",
    *(f"checkerboard_{side}" for side in (1, 2, 3, 4)),
    "equal_rows",
    "disjoint_2",
    "disjoint_3",
    "first_block",
    "last_block",
    "all_then_first",
    "all_then_last",
    "gaps",
    "gaps_among_dense",
    "densities",
    "noise",
)
# (rows_q, rows_kv, KV heads times group at most)
SHAPES = {
    "cpu": ((330, 330, 4), (70, 600, 8), (300, 130, 7)),
    "cuda": (
        (640, 640, 16),
        (1000, 1000, 14),
        (777, 333, 8),
        (4096, 4096, 64),
        (200, 16384, 28),
        (64, 32768, 32),
    ),
}


def hostile_bits(name, *, batch, heads, rows_q, rows_kv, block, seed, device, stray=True):
    """Block bits of the mask `name`. Each head and batch entry starts at another phase.

    Bits past the last block are set; bits above the diagonal are where the pattern has them.
    """
    gen = inputs.generator(seed)
    blocks_q, blocks_kv = (
        attention.ceil_div(rows_q, block[0]),
        attention.ceil_div(rows_kv, block[1]),
    )
    shape = (batch, heads, blocks_q, blocks_kv)
    if name == "noise":
        words = (*shape[:3], attention.ceil_div(blocks_kv, 32) + 1)
        noise = torch.randint(-(2**31), 2**31, words, generator=gen, dtype=torch.int64)
        return noise.to(device=device, dtype=torch.int32)
    row = torch.arange(blocks_q)
    phase = row + torch.arange(heads)[:, None] + torch.arange(batch)[:, None, None]
    i, j = phase[..., None], torch.arange(blocks_kv)
    # The last block that a row sees under the causal rule.
    seen = torch.minimum((row + 1) * block[0], torch.tensor(rows_q)) - 1 + rows_kv - rows_q
    last = (seen // block[1]).clamp(0, max(0, blocks_kv - 1))[:, None]
    draw = torch.rand(shape, generator=gen)
    words = name.split("_")
    if name.startswith("one_in"):  # dense rows among empty ones
        mask = i % int(words[2]) == 0
    elif name.startswith("checkerboard"):
        mask = (i // int(words[1]) + j // int(words[1])) % 2 == 0
    elif name == "equal_rows":
        mask = draw[:, :, :1] < 0.3
    elif name.startswith("disjoint"):
        mask = j % int(words[1]) == i % int(words[1])
    elif name == "first_block":
        mask = j == 0
    elif name == "last_block":
        mask = j == last
    elif name == "all_then_first":  # a row's one block is at the far end of its neighbour's
        mask = (i % 2 == 0) | (j == 0)
    elif name == "all_then_last":
        mask = (i % 2 == 0) | (j == last)
    elif name == "gaps":  # one block in forty, at another place in each row
        mask = (j + 7 * i) % 40 == 0
    elif name == "gaps_among_dense":
        mask = (i % 3 != 0) | (j % 40 == 39)
    elif name == "densities":
        density = torch.tensor([0, 1 / 64, 0.5, 1])
        mask = draw < density[torch.randint(4, (*shape[:3], 1), generator=gen)]
    else:
        raise ValueError(name)
    bits = reference.pack_block_bits(mask.expand(shape))
    return (patterns.with_stray_bits(bits, blocks_kv) if stray else bits).to(device)


def cases(device):
    axes = {
        "mask": MASKS,
        "block": attention.BLOCKS[device],
        "causal": (True, False),
        "shape": SHAPES[device],
        "dtype": attention.DTYPES[device],
        "head_dim": attention.HEAD_DIMS[device][:2],
        "group": (1, 3, 4, 7),
        "mask_heads": ("q_heads", "kv_heads", "all"),
        "batch": (1, 2),
    }
    return pairwise(axes, core=("mask", "block") if device == "cuda" else ("mask",), copies=1)


def params():
    for case in cases("cpu"):
        yield pytest.param("cpu", 0, case, id="cpu-" + case_id(case))
    sanitized = set()
    for arch, case in product(FAMILIES, cases("cuda")):
        if not has_kernel("cuda", case, arch):
            continue
        marks = [pytest.mark.gpu]
        kind = (arch, case["mask"])
        if case["mask"] in ("noise", "all_then_last") and case["shape"][0] <= 1000:
            if kind not in sanitized:
                marks.append(pytest.mark.reduced)
            sanitized.add(kind)
        yield pytest.param("cuda", arch, case, id=f"cuda-sm{arch}-" + case_id(case), marks=marks)


def draw_qkv(device, batch, rows_q, rows_kv, heads_q, heads_kv, head_dim, dtype, seed):
    """Normal q, k, v, drawn where they stay: a long problem takes the CPU seconds to draw."""
    gen = torch.Generator(device).manual_seed(seed)
    shapes = (rows_q, heads_q), (rows_kv, heads_kv), (rows_kv, heads_kv)
    return [
        torch.randn(batch, rows, heads, head_dim, generator=gen, device=device, dtype=dtype)
        for rows, heads in shapes
    ]


@pytest.mark.parametrize("device, arch, case", list(params()))
def test_agrees_with_the_oracle(device, arch, case, seed):
    """Three runs of equal bits, judged as a whole where the score matrix is small enough."""
    rows_q, rows_kv, heads = case["shape"]
    group, batch, block = case["group"], case["batch"], case["block"]
    heads_kv = max(1, heads // group)
    q, k, v = draw_qkv(
        device,
        batch,
        rows_q,
        rows_kv,
        heads_kv * group,
        heads_kv,
        case["head_dim"],
        case["dtype"],
        seed,
    )
    bits = hostile_bits(
        case["mask"],
        batch=batch,
        heads={"all": 1, "kv_heads": heads_kv, "q_heads": q.shape[2]}[case["mask_heads"]],
        rows_q=rows_q,
        rows_kv=rows_kv,
        block=block,
        seed=seed,
        device=device,
    )
    kw = {"block_q": block[0], "block_kv": block[1], "causal": case["causal"]}
    out, lse = run_repeatedly(q, k, v, bits, arch=arch, **kw)
    if batch * q.shape[2] * rows_q * rows_kv <= 2**25:
        attention.check_attention(case["mask"], out, lse, q, k, v, bits, **kw)
    else:
        attention.check_heads(case["mask"], out, lse, q, k, v, bits, seed=seed, **kw)


@pytest.mark.parametrize("mask", ["checkerboard_1", "disjoint_3", "densities", "all_then_last"])
def test_a_row_does_not_depend_on_its_neighbours_masks(sparse_device, mask, seed):
    """What a query block keeps decides its result; what the blocks beside it keep does not. The
    Hopper kernel walks a row's blocks in an order that depends on its neighbours' rows, so there
    the last bits may differ; elsewhere they may not."""
    rows, block = 1000, (64, 64)
    q, k, v = draw_qkv(sparse_device, 1, rows, rows, 4, 2, 128, torch.bfloat16, seed)
    shape = {"batch": 1, "heads": 4, "rows_q": rows, "rows_kv": rows, "block": block}
    bits = hostile_bits(mask, **shape, seed=seed, device=sparse_device, stray=False)
    out, lse = attention.run_and_check(q, k, v, bits)
    for period, kept in ((2, 0), (2, 1), (3, 1)):
        alone = bits.clone()
        alone[:, :, torch.arange(bits.shape[2], device=bits.device) % period != kept] = 0
        out_alone, lse_alone = sparse_op(q, k, v, alone)
        mine = (torch.arange(rows, device=bits.device) // block[0]) % period == kept
        attention.check_attention("alone", out_alone, lse_alone, q, k, v, alone)
        if attention.default_arch != 90:
            numerics.assert_bitwise("out", out_alone[:, mine], out[:, mine])
            numerics.assert_bitwise("lse", lse_alone[..., mine], lse[..., mine])


@pytest.mark.parametrize("block", [(64, 64), (128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("owner", [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_poison_reaches_only_rows_that_keep_it(sparse_device, block, owner, seed):
    """A KV block of NaN and Inf that one query block in two or three keeps, the heads of a group
    at different phases: a tile that computes with its neighbour's block shows it."""
    rows, period, kept = 900, *owner
    q, k, v = draw_qkv(sparse_device, 1, rows, rows, 6, 2, 128, torch.bfloat16, seed)
    blocks_q, blocks_kv = (attention.ceil_div(rows, size) for size in block)
    dense = patterns.pattern("random_50", 1, 6, blocks_q, blocks_kv, seed)
    i = torch.arange(blocks_q) + torch.arange(6)[:, None]
    poisoned = blocks_kv // 2
    dense[..., poisoned] = i % period == kept
    kw = {"block_q": block[0], "block_kv": block[1], "causal": False}
    bits = reference.pack_block_bits(dense).to(sparse_device)
    clean, clean_lse = sparse_op(q, k, v, bits, **kw)
    there = slice(poisoned * block[1], min(rows, (poisoned + 1) * block[1]))
    k[:, there], v[:, there] = math.nan, math.inf
    out, lse = sparse_op(q, k, v, bits, **kw)
    keeps = dense[0, :, :, poisoned].repeat_interleave(block[0], -1)[:, :rows].to(sparse_device)
    out, clean = out[0].transpose(0, 1), clean[0].transpose(0, 1)
    numerics.assert_bitwise("out", out[~keeps], clean[~keeps])
    numerics.assert_bitwise("lse", lse[0][~keeps], clean_lse[0][~keeps])
    assert (~out[keeps].isfinite()).any(-1).all()
