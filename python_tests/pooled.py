# SPDX-License-Identifier: Apache-2.0
"""attn_pool for tests: the cases, a call by the kernels of one family, a map against the oracle."""

import attention
import baselines
import inputs
import numerics
import pytest
import torch
from attention import BLOCKS, DTYPES, FAMILIES, HEAD_DIMS, has_kernel
from grid import case_id, pairwise
from numerics import EPS32

from seer_cuda import reference

MAX, SUM = 0, 1
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
        "reduce": (MAX, SUM),
        "rows": rows,
        "group": (1, 4, 7),
        "family": inputs.FAMILIES,
        "layout": inputs.LAYOUTS,
        "batch": (1, 2),
    }
    return pairwise(axes, core=("dtype", "head_dim", "causal", "reduce"), copies=1)


def params():
    for case in cases("cpu"):
        yield pytest.param("cpu", 0, case, id="cpu-" + case_id(case))
    sanitized = set()
    for arch in FAMILIES:
        for case in cases("cuda"):
            if not has_kernel("cuda", case, arch):
                continue
            marks = [pytest.mark.gpu]
            kind = (arch, case["head_dim"], case["per_token"], case["reduce"])
            if max(case["rows"]) <= 130 and kind not in sanitized:
                sanitized.add(kind)
                marks.append(pytest.mark.reduced)
            yield pytest.param(
                "cuda", arch, case, id=f"cuda-sm{arch}-" + case_id(case), marks=marks
            )


def pool_op(q, k, v, *, arch=None, **kw):
    """attn_pool, by the kernels of one family if `arch` or attention.default_arch names it."""
    arch = attention.default_arch if arch is None else arch
    if arch == 0 or any(stride == 0 for x in (q, k, v) for stride in x.stride()):
        return torch.ops.seer.attn_pool(q, k, v, **kw)
    return torch.ops.seer._attn_pool_on(q, k, v, arch=arch, **kw)


def run_and_check_pool(q, k, v, *, arch=None, **kw):
    """attn_pool on these inputs, all three results compared with the oracle."""
    out, lse, pooled = pool_op(q, k, v, arch=arch, **kw)
    assert pooled.dtype == torch.float32 and pooled.device == q.device
    own = ("per_token", "reduce")
    sparse_kw = {name: x for name, x in kw.items() if name not in own}
    attention.check_attention("attn_pool", out, lse, q, k, v, None, **sparse_kw)
    _, _, ref = reference.attn_pool(q, k, v, **kw)
    check_map(pooled, ref, baselines.attention(q, k, v, **sparse_kw).delta, **kw)
    return out, lse, pooled


def map_error(ref, delta):
    """p = exp(score - lse): both errors are at most delta, so p is off by a factor e^(2 delta). And
    lse and the difference, which is ln p, are rounded to fp32: half an ulp of ln p each.
    """
    log = ref.clamp_min(torch.finfo(ref.dtype).tiny).log().abs()
    return torch.expm1(2 * delta + EPS32 * log) * ref


def check_map(pooled, ref, delta, *, reduce=MAX, per_token=False, block_q=64, block_kv=64, **_):
    """By map_error(). A sum also rounds once per term, and a term below fp32's normal numbers may
    be 0. CUDA rounds what each 16 rows add to an entry of a 2-D sum to a multiple of 2^-23.
    """
    extra = map_error(ref, delta)
    if reduce == SUM:
        extra = extra + (block_q + block_kv) * EPS32 * ref
        extra = extra + block_kv * numerics.FLUSH[torch.float32]
        if pooled.is_cuda and not per_token:
            extra = extra + block_q / 16 * 2.0**-24
    numerics.compare(
        "attn_pool pooled",
        pooled,
        ref,
        extra=extra,
        axes=MAP_AXES[pooled.dim()],
    )
