# SPDX-License-Identifier: Apache-2.0
"""compare(): does a result agree with the float64 oracle within an error model?

The model (docs/numerics.md), for a result x of type T, the oracle's value r and a baseline b, the
same mathematics in plain torch at the input type with fp32 accumulation:

1. nan, +inf and -inf stand at the same places in x and in r rounded to T;
2. ``max |x - r| <= 2 max |b - r| + ulp(T) max |r| + extra``, without a baseline element by
   element ``|x - r| <= ulp(T) |r| + extra``;
3. row by row, ``|x - r|_2 <= row_limit``, where the caller states the limit of each row.

`extra` and `row_limit` are derived by the caller from the inputs; no number here is tuned.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPS32 = 2.0**-23
# exp2 and log2 of the CUDA kernels are the hardware approximations: 2 ulp each, in fp32.
FAST_MATH = 4 * EPS32
# Below this magnitude a result may be flushed to zero.
FLUSH = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}


def ulp(dtype: torch.dtype) -> float:
    """Spacing of the numbers of `dtype` in [1, 2): 2^-7 bf16, 2^-10 fp16, 2^-23 fp32."""
    return torch.finfo(dtype).eps


@dataclass
class Report:
    """What compare() found. ok is the verdict, text() the explanation of a failure."""

    name: str
    ok: bool = True
    worst_ratio: float = 0.0  # largest error / limit
    lines: list[str] = field(default_factory=list)

    def fail(self, line: str) -> None:
        self.ok = False
        self.lines.append(line)

    def text(self) -> str:
        return "\n".join([f"{self.name}: does not agree with the float64 oracle", *self.lines])


def check(
    name: str,
    actual: Tensor,
    ref: Tensor,
    baseline: Tensor | None = None,
    *,
    extra: Tensor | float = 0.0,
    row_limit: Tensor | None = None,
    axes: tuple[str, ...] = (),
    blocks: dict[str, int] | None = None,
) -> Report:
    """Compares `actual` with `ref` (float64, same shape) and returns a Report.

    baseline: float tensor of the same shape. extra: absolute error allowed on top, a number or
    a tensor that broadcasts. row_limit: L2 limit of each row, the shape of ref without its last
    dim. axes names the dims and blocks gives the block size of some of them, for the report.
    """
    report = Report(name)
    if actual.shape != ref.shape:
        report.fail(f"  shape: expected {tuple(ref.shape)}, got {tuple(actual.shape)}")
        return report
    dtype, x = actual.dtype, actual.detach().to(torch.float64)
    ref = ref.detach()
    where = _Where(axes, blocks or {})

    rounded = ref.to(dtype)
    for kind, of in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = of(actual) != of(rounded)
        if wrong.any():
            report.fail(f"  {kind} at other places than the oracle: {int(wrong.sum())} elements")
            report.lines += where.describe(wrong.to(torch.float64), x, ref, None)
    if not report.ok or ref.numel() == 0:
        return report

    finite = torch.isfinite(rounded)
    error = (x - ref).abs().masked_fill(~finite, 0.0)
    size = ref.abs().masked_fill(~finite, 0.0)
    if baseline is None:
        limit = ulp(dtype) * size
    else:
        off = (baseline.detach().to(torch.float64) - ref).abs().masked_fill(~finite, 0.0)
        limit = torch.full_like(error, float(2 * off.max() + ulp(dtype) * size.max()))
    limit = limit + FLUSH[dtype] + extra
    report.worst_ratio = float((error / limit).max())
    if not report.worst_ratio <= 1.0:
        report.fail(
            f"  max |x - r| / limit = {report.worst_ratio:.3g}, "
            f"{int((error > limit).sum())} of {error.numel()} elements beyond it, worst:"
        )
        report.lines += where.describe(error / limit, x, ref, limit)
    if row_limit is not None:
        flushed = FLUSH[dtype] * math.sqrt(ref.shape[-1])
        ratio = error.square().sum(-1).sqrt() / (row_limit + flushed)
        report.worst_ratio = max(report.worst_ratio, float(ratio.max()))
        if not ratio.max() <= 1.0:
            report.fail(f"  row L2 error / limit = {float(ratio.max()):.3g}, worst rows:")
            report.lines += where.describe(ratio, None, None, None)
    return report


def compare(name: str, actual: Tensor, ref: Tensor, *args, **kwargs) -> Report:
    """check(), raising AssertionError with the report on a failure."""
    report = check(name, actual, ref, *args, **kwargs)
    assert report.ok, report.text()
    return report


def assert_bitwise(name: str, actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits (so nan equals the same nan, and 0 differs from -0)."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    if actual.dtype.is_floating_point:
        kind = torch.int16 if actual.element_size() == 2 else torch.int32
        actual, expected = actual.contiguous().view(kind), expected.contiguous().view(kind)
    differs = actual != expected
    if differs.any():
        first = [int(i) for i in differs.nonzero()[0]]
        raise AssertionError(f"{name}: {int(differs.sum())} elements differ, the first at {first}")


class _Where:
    """Names coordinates: ``[batch=0 row=70 head=1 d=3] (row block 1)``."""

    def __init__(self, axes: tuple[str, ...], blocks: dict[str, int]):
        self.axes, self.blocks = axes, blocks

    def describe(self, badness, x, ref, limit, count: int = 3) -> list[str]:
        flat = badness.nan_to_num(nan=math.inf).flatten()
        worst = flat.topk(min(count, flat.numel()))
        lines = []
        for ratio, index in zip(worst.values.tolist(), worst.indices.tolist(), strict=True):
            if ratio == 0:
                continue
            at = [int(i) for i in torch.unravel_index(torch.tensor(index), badness.shape)]
            names = self.axes[: len(at)] if self.axes else tuple(f"dim{n}" for n in range(len(at)))
            line = "[" + " ".join(f"{n}={i}" for n, i in zip(names, at, strict=False)) + "]"
            inside = [
                f"{n} block {i // self.blocks[n]}"
                for n, i in zip(names, at, strict=False)
                if n in self.blocks
            ]
            line += f" ({', '.join(inside)})" if inside else ""
            if x is not None:
                line += f" got {float(x[tuple(at)]):.9g}, oracle {float(ref[tuple(at)]):.9g}"
            if limit is not None:
                line += f", limit {float(limit[tuple(at)]):.3g}"
            lines.append(f"    {line}, ratio {ratio:.3g}")
        return lines
