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

from seer_cuda import _library, reference

# The support matrix of the compiled kernels; block_kv is any multiple of tile_kv up to 128.
VARIANTS = json.loads((Path(__file__).parents[1] / "csrc" / "variants.json").read_text())


def runs_here(row: dict) -> bool:
    """Whether this machine can run a kernel: without a GPU every one is collected and skipped."""
    core = _library.load_core()
    if core is not None and core.build_info()["cuda"]:
        built = {variant["name"] for variant in core.variants()}  # no family 90 without 90a
    else:
        built = {row["name"]}
    if not torch.cuda.is_available():
        return row["name"] in built
    major, minor = torch.cuda.get_device_capability()
    return row["name"] in built and row["sm"] in (80, 10 * major + minor)


# (family, dtype, head_dim, block_q, block_kv)
KERNELS = sorted(
    (row["sm"], row["dtype"], row["head_dim"], row["block_q"], block_kv)
    for row in VARIANTS["kernels"]
    if row["op"] == "block_sparse_attn" and runs_here(row)
    for block_kv in range(row["tile_kv"], 129, row["tile_kv"])
)
FAMILIES = tuple(sorted({x[0] for x in KERNELS}))
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": tuple(getattr(torch, name) for name in sorted({x[1] for x in KERNELS})),
}
BLOCKS = {
    "cpu": ((64, 64), (64, 128), (128, 64), (16, 32), (32, 16), (128, 128)),
    "cuda": tuple(sorted({x[3:] for x in KERNELS})),
}
HEAD_DIMS = {"cpu": (64, 128, 8, 40, 256), "cuda": tuple(sorted({x[2] for x in KERNELS}))}
AXES = {4: ("batch", "row", "head", "d"), 3: ("row", "head", "d")}
LSE_AXES = {3: ("batch", "head", "row"), 2: ("head", "row")}


def has_kernel(device: str, case: dict, family: int | None = None) -> bool:
    """Whether the support matrix has a row for this grid case, of any family if none is named.
    CPU kernels take everything."""
    key = (str(case["dtype"]).removeprefix("torch."), case["head_dim"], *case["block"])
    families = FAMILIES if family is None else (family,)
    return device == "cpu" or any((sm, *key) in KERNELS for sm in families)


# The kernel family that sparse_op asks for where its caller names none; 0: the op's own choice.
default_arch = 0


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


def sparse_op(q, k, v, block_bits=None, *, arch=None, **kw) -> tuple[Tensor, Tensor]:
    """block_sparse_attn, by the kernels of one family if `arch` or default_arch names it."""
    arch = default_arch if arch is None else arch
    if arch == 0:
        return torch.ops.seer.block_sparse_attn(q, k, v, block_bits, **kw)
    return torch.ops.seer._block_sparse_attn_on(q, k, v, block_bits, arch=arch, **kw)


def run_and_check(q, k, v, block_bits=None, *, arch=None, **kw) -> tuple[Tensor, Tensor]:
    """block_sparse_attn on these inputs, compared with the oracle. Returns (out, lse)."""
    out, lse = sparse_op(q, k, v, block_bits, arch=arch, **kw)
    check_attention("block_sparse_attn", out, lse, q, k, v, block_bits, **kw)
    return out, lse


def run_repeatedly(q, k, v, block_bits=None, *, times=3, **kw) -> tuple[Tensor, Tensor]:
    """The results of sparse_op, which must have the same bits every time."""
    first = sparse_op(q, k, v, block_bits, **kw)
    for _ in range(times - 1):
        again = sparse_op(q, k, v, block_bits, **kw)
        numerics.assert_bitwise("out", again[0], first[0])
        numerics.assert_bitwise("lse", again[1], first[1])
    return first


def check_attention(name, out, lse, q, k, v, block_bits=None, **kw):
    """Compares out and lse with the oracle; also their types, layout and device."""
    assert (out.dtype, out.shape, out.is_contiguous()) == (q.dtype, q.shape, True)
    assert (lse.dtype, lse.device, out.device) == (torch.float32, q.device, q.device)
    ref_out, ref_lse = reference.block_sparse_attn(q, k, v, block_bits, **kw)
    base = baselines.attention(q, k, v, block_bits, **kw)
    judge_out(name, out, ref_out, base, kw.get("block_q", 64))
    judge_lse(name, lse, ref_lse, base, kw.get("block_q", 64))


def check_heads(name, out, lse, q, k, v, block_bits=None, *, heads=16, seed=0, **kw):
    """check_attention on about `heads` query heads, whole KV groups of one batch entry at a time:
    for problems whose score matrix would not fit. The first and the last group are among them."""
    batch, heads_kv = q.shape[0], k.shape[2]
    group = q.shape[2] // heads_kv
    order = torch.randperm(heads_kv - 1, generator=inputs.generator(seed)).tolist()
    for n, u in enumerate({0, heads_kv - 1, *order[: heads // group]}):
        b, mine = n % batch, slice(u * group, (u + 1) * group)
        args = [q[b : b + 1, :, mine], k[b : b + 1, :, u : u + 1], v[b : b + 1, :, u : u + 1]]
        if block_bits is not None:
            row = b % block_bits.shape[0]
            first, last = (h * block_bits.shape[1] // q.shape[2] for h in (mine.start, mine.stop))
            args.append(block_bits[row : row + 1, first : max(last, first + 1)])
        ref_out, ref_lse = reference.block_sparse_attn(*args, **kw)
        base = baselines.attention(*args, **kw)
        where = f"{name} (batch {b}, heads {mine.start} to {mine.stop - 1})"
        judge_out(where, out[b : b + 1, :, mine], ref_out, base, kw.get("block_q", 64))
        judge_lse(where, lse[b : b + 1, mine], ref_lse, base, kw.get("block_q", 64))


def check_blocks(name, out, lse, q, k, v, block_bits=None, *, count=12, seed=0, **kw):
    """check_attention on `count` query blocks: for problems in which one head is too large.

    Of the first and the last head the first and the last block, the rest at random. The keys that
    a query block keeps are gathered into a problem of their own, with blocks of one token.
    """
    block_q, block_kv = kw.get("block_q", 64), kw.get("block_kv", 64)
    (batch, rows_q, heads_q), (rows_kv, heads_kv) = q.shape[:3], k.shape[1:3]
    shift = rows_kv - rows_q if kw.get("causal", True) else rows_kv
    blocks_q, blocks_kv = ceil_div(rows_q, block_q), ceil_div(rows_kv, block_kv)
    sizes = torch.tensor([batch, heads_q, blocks_q])
    picks = (torch.rand(count, 3, generator=inputs.generator(seed)) * sizes).long()
    picks[:4, 1:] = torch.tensor([[0, 0], [0, -1], [-1, 0], [-1, -1]]) % sizes[1:]
    for b, h, i in picks.tolist():
        rows = slice(i * block_q, min((i + 1) * block_q, rows_q))
        kept = torch.ones(blocks_kv, dtype=torch.bool, device=q.device)
        if block_bits is not None:
            mask_head = h * block_bits.shape[1] // heads_q
            row_bits = block_bits[b % block_bits.shape[0], mask_head, i]
            kept = reference.unpack_block_bits(row_bits, blocks_kv)
        keys = kept.repeat_interleave(block_kv)[:rows_kv].nonzero()[:, 0]
        keys = keys[keys < rows.stop + shift]
        seen = keys <= torch.arange(rows.start, rows.stop, device=q.device)[:, None] + shift
        mine, u = slice(b, b + 1), h * heads_kv // heads_q
        args = q[mine, rows, h : h + 1], k[mine, keys, u : u + 1], v[mine, keys, u : u + 1]
        bits = reference.pack_block_bits(seen[None, None])
        one = {"block_q": 1, "block_kv": 1, "causal": False, "scale": kw.get("scale")}
        ref_out, ref_lse = reference.block_sparse_attn(*args, bits, **one)
        base = baselines.attention(*args, bits, **one)
        where = f"{name} (batch {b}, head {h}, query block {i})"
        judge_out(where, out[mine, rows, h : h + 1], ref_out, base)
        judge_lse(where, lse[mine, h : h + 1, rows], ref_lse, base)


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
