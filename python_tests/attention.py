# SPDX-License-Identifier: Apache-2.0
"""Runs and judges the attention ops: shared by every test that needs a right answer."""

import json
from pathlib import Path

import baselines
import inputs
import numerics
import patterns
import torch
from torch import Tensor

from seer_cuda import reference

# The support matrix of the compiled kernels; block_kv is any multiple of tile_kv up to 128.
VARIANTS = json.loads((Path(__file__).parents[1] / "csrc" / "variants.json").read_text())
KERNELS = sorted(
    (row["dtype"], row["head_dim"], row["block_q"], block_kv)
    for row in VARIANTS["kernels"]
    if row["op"] == "block_sparse_attn"
    for block_kv in range(row["tile_kv"], 129, row["tile_kv"])
)
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": tuple(getattr(torch, name) for name in sorted({x[0] for x in KERNELS})),
}
BLOCKS = {
    "cpu": ((64, 64), (64, 128), (128, 64), (16, 32), (32, 16), (128, 128)),
    "cuda": tuple(sorted({x[2:] for x in KERNELS})),
}
HEAD_DIMS = {"cpu": (64, 128, 8, 40, 256), "cuda": tuple(sorted({x[1] for x in KERNELS}))}
AXES = {4: ("batch", "row", "head", "d"), 3: ("row", "head", "d")}
LSE_AXES = {3: ("batch", "head", "row"), 2: ("head", "row")}


def has_kernel(device: str, case: dict) -> bool:
    """Whether the support matrix has a row for this grid case. CPU kernels take everything."""
    key = (str(case["dtype"]).removeprefix("torch."), case["head_dim"], *case["block"])
    return device == "cpu" or key in KERNELS


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def make_bits(
    name: str,
    *,
    rows_q: int,
    rows_kv: int,
    block_q: int = 64,
    block_kv: int = 64,
    batch: int = 1,
    heads: int = 1,
    seed: int = 0,
    device: str = "cpu",
    stray: bool = True,
) -> Tensor:
    """Block bits of the pattern `name`, by default with every bit past blocks_kv set too."""
    blocks_q, blocks_kv = ceil_div(rows_q, block_q), ceil_div(rows_kv, block_kv)
    mask = patterns.pattern(name, batch, heads, blocks_q, blocks_kv, seed)
    bits = reference.pack_block_bits(mask)
    return (patterns.with_stray_bits(bits, blocks_kv) if stray else bits).to(device)


def sparse_op(q, k, v, block_bits=None, **kw) -> tuple[Tensor, Tensor]:
    return torch.ops.seer.block_sparse_attn(q, k, v, block_bits, **kw)


def run_and_check(q, k, v, block_bits=None, **kw) -> tuple[Tensor, Tensor]:
    """block_sparse_attn on these inputs, compared with the oracle. Returns (out, lse)."""
    out, lse = sparse_op(q, k, v, block_bits, **kw)
    check_attention("block_sparse_attn", out, lse, q, k, v, block_bits, **kw)
    return out, lse


def check_attention(name, out, lse, q, k, v, block_bits=None, **kw):
    """Compares out and lse with the oracle; also their types, layout and device."""
    assert (out.dtype, out.shape, out.is_contiguous()) == (q.dtype, q.shape, True)
    assert (lse.dtype, lse.device, out.device) == (torch.float32, q.device, q.device)
    ref_out, ref_lse = reference.block_sparse_attn(q, k, v, block_bits, **kw)
    base = baselines.attention(q, k, v, block_bits, **kw)
    judge_out(name, out, ref_out, base, kw.get("block_q", 64))
    judge_lse(name, lse, ref_lse, base, kw.get("block_q", 64))


def judge_out(name, out, ref, base, block_q=64, *, strict=True):
    verdict = numerics.compare if strict else numerics.check
    return verdict(
        f"{name} out",
        out,
        ref,
        base.out,
        extra=2 * base.delta * base.peak,
        row_limit=base.row_limit(ref),
        axes=AXES[out.dim()],
        blocks={"row": block_q},
    )


def judge_lse(name, lse, ref, base, block_q=64, *, strict=True):
    verdict = numerics.compare if strict else numerics.check
    return verdict(
        f"{name} lse",
        lse,
        ref,
        base.lse,
        extra=base.delta,
        axes=LSE_AXES[lse.dim()],
        blocks={"row": block_q},
    )


def agrees(out, lse, q, k, v, block_bits=None, **kw) -> bool:
    """check_attention as a yes or no, for the mutants."""
    ref_out, ref_lse = reference.block_sparse_attn(q, k, v, block_bits, **kw)
    base = baselines.attention(q, k, v, block_bits, **kw)
    return (
        judge_out("mutant", out, ref_out, base, strict=False).ok
        and judge_lse("mutant", lse, ref_lse, base, strict=False).ok
    )


def small(
    device: str,
    *,
    rows=(150, 150),
    heads=(4, 2),
    head_dim=64,
    batch=2,
    family="normal",
    seed=0,
    layout="bshd",
    dtype=torch.bfloat16,
):
    """q, k, v of a small ragged GQA problem."""
    return inputs.qkv(
        family,
        rows_q=rows[0],
        rows_kv=rows[1],
        batch=batch,
        heads_q=heads[0],
        heads_kv=heads[1],
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        layout=layout,
        seed=seed,
    )
