# SPDX-License-Identifier: Apache-2.0
"""Named input families and memory layouts. Everything is drawn on the CPU from one seed, so a
case holds the same numbers on every device."""

import torch
from torch import Tensor

FAMILIES = ("normal", "large_logit", "constant", "one_hot", "denormal", "rising", "falling")
LAYOUTS = ("bshd", "bhsd", "gaps", "fused")
# Rows of no sequence at both ends of a pack: the CPU refuses cu_seqlens that leave any.
SLACK = {"cpu": 0, "cuda": 7}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def qkv(
    family: str,
    *,
    rows_q: int,
    rows_kv: int,
    batch: int = 1,
    heads_q: int = 1,
    heads_kv: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "bshd",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[batch, rows_q, heads_q, head_dim]``; k, v ``[batch, rows_kv, heads_kv, head_dim]``."""
    gen = generator(seed)
    q = torch.randn(batch, rows_q, heads_q, head_dim, generator=gen)
    k = torch.randn(batch, rows_kv, heads_kv, head_dim, generator=gen)
    v = torch.randn(batch, rows_kv, heads_kv, head_dim, generator=gen)
    q, k, v = _shape(family, q, k, v, dtype)
    return _lay_out(layout, *(x.to(device=device, dtype=dtype) for x in (q, k, v)))


def _shape(family, q, k, v, dtype):
    head_dim = q.shape[-1]
    if family == "normal":
        return q, k, v
    if family == "large_logit":  # logits of some hundreds: softmax close to one-hot
        return q * 6, k * 6, v
    if family == "constant":  # uniform softmax; out equals v
        return torch.full_like(q, 0.5), torch.full_like(k, 0.25), torch.full_like(v, 0.75)
    if family == "one_hot":  # row r looks for the columns c with c = r modulo head_dim
        eye = torch.eye(head_dim)
        q = 16 * eye[torch.arange(q.shape[1]) % head_dim][None, :, None].expand_as(q)
        k = 4 * eye[torch.arange(k.shape[1]) % head_dim][None, :, None].expand_as(k)
        return q.clone(), k.clone(), v
    if family == "denormal":  # below the smallest normal number of the type
        tiny = 2.0**-20 if dtype == torch.float16 else 2.0**-130
        return q * tiny, k * tiny, v * tiny
    # rising, falling: the running maximum moves in every block, or never after the first one;
    # v alternates in sign and is large, so terms cancel.
    ramp = torch.linspace(0, 1, max(1, k.shape[1]))[: k.shape[1], None, None]
    ramp = ramp if family == "rising" else 1 - ramp
    k = 0.05 * k + ramp
    q = 0.05 * q + 40.0 / head_dim**0.5
    sign = 1.0 - 2.0 * (torch.arange(v.shape[1]) % 2)
    return q, k, (4.0 + v) * sign[:, None, None]


def _lay_out(layout, q, k, v):
    if layout == "bshd":
        return q, k, v
    if layout == "bhsd":  # a view of [batch, heads, rows, head_dim]
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if layout == "gaps":  # every stride larger than it need be, v's unlike k's, NaN in between
        return with_gaps(q, 1, 8), with_gaps(k, 2, 16), with_gaps(v, 3, 8)
    if layout == "fused":  # k and v are slices of one projection [batch, rows, 2 heads, head_dim]
        both = torch.cat([k, v], dim=2)
        return q, both[:, :, : k.shape[2]], both[:, :, k.shape[2] :]
    raise ValueError(layout)


def with_gaps(x: Tensor, extra: int, tail: int) -> Tensor:
    """x in the middle of a larger tensor of NaN: gaps around every dim but the last one's unit
    stride; strides stay multiples of 8 elements."""
    shape = [size + extra for size in x.shape[:-1]] + [x.shape[-1] + tail]
    room = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = room[tuple(slice(0, size) for size in x.shape)]
    view.copy_(x)
    return view


def packed(lengths: list[int], slack: int = 0) -> Tensor:
    """cu_seqlens int32 of these lengths. slack moves the first sequence away from row 0."""
    edges = torch.tensor([slack, *lengths]).cumsum(0)
    return edges.to(torch.int32)


def varlen(
    family: str,
    lengths_q: list[int],
    lengths_kv: list[int],
    *,
    slack: int = 0,
    device: str = "cpu",
    **kwargs,
) -> dict:
    """Packed inputs as keyword arguments: q, k, v, cu_seqlens_q, cu_seqlens_kv, max_rows_*.

    With slack, that many rows at both ends belong to no sequence.
    """
    q, k, v = qkv(
        family,
        rows_q=sum(lengths_q) + 2 * slack,
        rows_kv=sum(lengths_kv) + 2 * slack,
        device=device,
        **kwargs,
    )
    return {
        "q": q[0],
        "k": k[0],
        "v": v[0],
        "cu_seqlens_q": packed(lengths_q, slack).to(device),
        "cu_seqlens_kv": packed(lengths_kv, slack).to(device),
        "max_rows_q": max(1, *lengths_q),
        "max_rows_kv": max(1, *lengths_kv),
    }
