# SPDX-License-Identifier: Apache-2.0
"""Dense attention with block pooling, and its gradient, in torch operators.

Serves `seer::attn_pool` on devices without a compiled kernel, and its gradient everywhere. A plan
of loops over sequences, KV heads and chunks of query rows keeps memory at O(chunk * rows_kv):
the chunk shrinks as rows_kv grows, so that a score tile never exceeds `_TILE_ELEMENTS`. Nothing
here reads a tensor's value on the host. float64 inputs are computed in float64, all others in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE_ELEMENTS = 1 << 26
_MOST_ROWS = 1024  # small chunks skip more of the causal triangle


class Sequence(NamedTuple):
    """One sequence of the batch. Lengths are 0-dim tensors where only the device knows them."""

    q: Tensor  # [rows_q, heads_q, head_dim]
    k: Tensor  # [rows_kv, heads_kv, head_dim]
    v: Tensor
    length_q: int | Tensor
    length_kv: int | Tensor
    rows_q: Tensor | None  # packed row of each row, `total_q` where there is none
    rows_kv: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices (or two batches) with the sums, and the result, in float32.

    On CUDA, 16-bit operands go to the tensor cores as they are: products of 16-bit numbers are
    exact in float32, so nothing is lost against widening them first.
    """
    wide = accumulation_dtype(a.dtype)
    if a.is_cuda and a.element_size() == 2:
        multiply = torch.mm if a.dim() == 2 else torch.bmm
        return multiply(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def attn_pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_q: int = 64,
    block_kv: int = 64,
    causal: bool = True,
    scale: float | None = None,
    per_token: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_rows_q: int = 0,
    max_rows_kv: int = 0,
    reduce: int = 0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`seer::attn_pool` on any device: out, lse, pooled (contract: `seer_cuda.attn_pool`).

    chunk_rows: query rows computed at a time, by default as many as the memory bound allows.
    """
    wide = accumulation_dtype(q.dtype)
    heads_q, total_q = q.shape[-2], q.shape[-3]
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
    rows_q, rows_kv = (max_rows_q, max_rows_kv) if packed else (total_q, k.shape[1])
    blocks_q, blocks_kv = -(-rows_q // block_q), -(-rows_kv // block_kv)
    # A packed output has one row more, where rows past a sequence's end are written.
    held = (heads_q, total_q + 1) if packed else (batch, heads_q, rows_q)
    out = q.new_zeros((total_q + 1, *q.shape[1:]) if packed else q.shape)
    lse = q.new_full(held, -torch.inf, dtype=wide)
    shape = (*held, blocks_kv) if per_token else (batch, heads_q, blocks_q, blocks_kv)
    pooled = q.new_zeros(shape, dtype=wide)

    options = (block_q, block_kv, causal, scale, per_token, reduce, chunk_rows)
    lengths = (cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv)
    for n, one in enumerate(_sequences(q, k, v, *lengths)):
        if not packed:
            _attend(one, out[n], lse[n], pooled[n], *options)
            continue
        rows = one.rows_q
        out_n = torch.zeros_like(one.q)
        lse_n = lse.new_full((heads_q, rows_q), -torch.inf)
        pooled_n = pooled.new_zeros(heads_q, rows_q, blocks_kv) if per_token else pooled[n]
        _attend(one, out_n, lse_n, pooled_n, *options)
        out[rows] = out_n
        lse[:, rows] = lse_n
        if per_token:
            pooled[:, rows] = pooled_n
    if packed:
        out, lse = out[:total_q], lse[:, :total_q].contiguous()
        if per_token:
            pooled = pooled[:, :total_q].contiguous()
    return out, lse, pooled


def attn_pool_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    max_rows_q: int = 0,
    max_rows_kv: int = 0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k, v through out (FlashAttention-2, Dao 2023, section 2.3.2).

    ``P = exp(scale q k^T - lse)``, ``dP = dO v^T``, ``dS = P (dP - rowsum(dO * out))``,
    ``dq = scale dS k``, ``dk = scale dS^T q``, ``dv = P^T dO``; the heads of a group add up in
    dk and dv. Rows with lse = -inf give and get nothing.
    """
    wide = accumulation_dtype(q.dtype)
    packed = cu_seqlens_q is not None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    extra = 1 if packed else 0
    grads = [
        x.new_zeros((x.shape[0] + extra, *x.shape[1:]), dtype=wide if packed else x.dtype)
        for x in (q, k, v)
    ]
    lengths = (cu_seqlens_q, cu_seqlens_kv, max_rows_q, max_rows_kv)
    for n, one in enumerate(_sequences(q, k, v, *lengths)):
        if packed:
            grad_n, out_n = _gather(grad_out, one.rows_q), _gather(out, one.rows_q)
            lse_n = _gather(lse.t(), one.rows_q, fill=-torch.inf).t()
        else:
            grad_n, out_n, lse_n = grad_out[n], out[n], lse[n]
        partial = _attend_backward(one, grad_n, out_n, lse_n, causal, scale, chunk_rows)
        for grad, rows, part in zip(
            grads, (one.rows_q, one.rows_kv, one.rows_kv), partial, strict=True
        ):
            if packed:
                grad.index_add_(0, rows, part)
            else:
                grad[n] = part
    if packed:
        grads = [grad[:-1].to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)]
    return tuple(grads)


def _sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    max_rows_q: int,
    max_rows_kv: int,
) -> Iterator[Sequence]:
    """The sequences of a batch; packed ones are padded with zeros to max_rows."""
    if cu_seqlens_q is None:
        for n in range(q.shape[0]):
            yield Sequence(q[n], k[n], v[n], q.shape[1], k.shape[1], None, None)
        return
    for n in range(cu_seqlens_q.shape[0] - 1):
        rows_q, length_q = _packed_rows(cu_seqlens_q, n, q.shape[0], max_rows_q)
        rows_kv, length_kv = _packed_rows(cu_seqlens_kv, n, k.shape[0], max_rows_kv)
        keys, values = _gather(k, rows_kv), _gather(v, rows_kv)
        yield Sequence(_gather(q, rows_q), keys, values, length_q, length_kv, rows_q, rows_kv)


def _packed_rows(cu_seqlens: Tensor, n: int, total: int, max_rows: int) -> tuple[Tensor, Tensor]:
    """Packed row of each of the sequence's max_rows rows (`total` past its end), and its length.

    Contents of cu_seqlens are not trusted: start and end are clamped to [0, total].
    """
    start = cu_seqlens[n].to(torch.int64).clamp(0, total)
    end = cu_seqlens[n + 1].to(torch.int64).clamp(0, total)
    length = (end - start).clamp(0, max_rows)
    at = torch.arange(max_rows, device=cu_seqlens.device)
    return torch.where(at < length, start + at, total), length


def _gather(x: Tensor, rows: Tensor, fill: float = 0.0) -> Tensor:
    """``x[rows]`` along dimension 0, where row `len(x)` holds `fill`."""
    padding = x.new_full((1, *x.shape[1:]), fill)
    return torch.cat([x, padding]).index_select(0, rows)


def _chunks(rows: int, per_row: int, multiple: int, chunk_rows: int | None) -> Iterator[range]:
    """Ranges over `rows`: multiples of `multiple` rows, each of `per_row` score elements."""
    if chunk_rows is None:
        chunk_rows = min(_MOST_ROWS, _TILE_ELEMENTS // max(1, per_row))
    step = max(multiple, chunk_rows // multiple * multiple)
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))


def _reach(one: Sequence, rows: range, causal: bool) -> int:
    """KV rows that can be visible to `rows`, as far as the host knows."""
    rows_kv = one.k.shape[0]
    if not causal or isinstance(one.length_q, Tensor):
        return rows_kv
    return min(rows_kv, max(0, rows.stop + rows_kv - one.length_q))


def _visible_end(one: Sequence, rows: range, causal: bool) -> Tensor:
    """int64 ``[len(rows)]``: row r sees the columns below this (0 past the sequence's end)."""
    row = torch.arange(rows.start, rows.stop, device=one.q.device)
    end = torch.zeros_like(row) + one.length_kv
    if causal:
        end = torch.minimum(end, row + 1 + (one.length_kv - one.length_q)).clamp_min(0)
    return torch.where(row < one.length_q, end, 0)


def _heads_of(x: Tensor, rows: range, kv_head: int, heads_kv: int) -> Tensor:
    """``[group, len(rows), head_dim]``: the query heads that share one KV head."""
    group = x.shape[1] // heads_kv
    heads = slice(kv_head * group, (kv_head + 1) * group)
    return x[rows.start : rows.stop, heads].transpose(0, 1)


def _scores(queries: Tensor, keys: Tensor, end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled scores ``[group, rows, columns]``, -inf where not visible, and that mask."""
    group, rows, head_dim = queries.shape
    score = matmul(queries.reshape(group * rows, head_dim), keys.t()).mul_(scale)
    hidden = torch.arange(keys.shape[0], device=keys.device) >= end[:, None]
    return score.view(group, rows, -1).masked_fill_(hidden, -torch.inf), hidden


_SPECIAL = (torch.inf, -torch.inf, torch.nan)


def _first_special(values: Tensor) -> Tensor:
    """int64 ``[3, head_dim]``: first column that holds Inf, -Inf, NaN in each channel."""
    column = torch.arange(values.shape[0], device=values.device)[:, None]
    kinds = torch.stack([values == torch.inf, values == -torch.inf, values.isnan()])
    return column.where(kinds, values.shape[0]).amin(1)


def _special_terms(first: Tensor, end: Tensor, dtype: torch.dtype) -> Tensor:
    """``[rows, head_dim]``: what Inf and NaN in v add to the rows that see them, else 0.

    A row sees a prefix of the columns, so the first special one decides. Added after the product,
    they stay away from rows that do not see them, whose weight 0 would make 0 * NaN = NaN.
    """
    seen = end[:, None] > first[:, None]
    terms = torch.zeros_like(seen[0], dtype=dtype)
    for kind, here in zip(_SPECIAL, seen, strict=True):
        terms = terms + torch.zeros_like(terms).masked_fill(here, kind)
    return terms


def _attend(
    one: Sequence,
    out: Tensor,
    lse: Tensor,
    pooled: Tensor,
    block_q: int,
    block_kv: int,
    causal: bool,
    scale: float | None,
    per_token: bool,
    reduce: int,
    chunk_rows: int | None,
) -> None:
    """Fills out ``[rows_q, heads_q, d]``, lse ``[heads_q, rows_q]`` and pooled of one sequence."""
    rows_q, heads_q, head_dim = one.q.shape
    rows_kv, heads_kv = one.k.shape[:2]
    if rows_q == 0 or rows_kv == 0 or heads_q == 0:
        return
    scale = head_dim**-0.5 if scale is None else scale
    group = heads_q // heads_kv
    # Whole blocks only: padding columns are hidden by the mask like any other.
    padding = -rows_kv % block_kv
    for kv_head in range(heads_kv):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        keys, values = (F.pad(x[:, kv_head], (0, 0, 0, padding)) for x in (one.k, one.v))
        first_special = _first_special(values)
        values = values.masked_fill(~values.isfinite(), 0)
        for rows in _chunks(rows_q, group * keys.shape[0], block_q, chunk_rows):
            columns = -(-_reach(one, rows, causal) // block_kv) * block_kv
            if columns == 0:
                continue
            end = _visible_end(one, rows, causal)
            at = slice(rows.start, rows.stop)
            queries = _heads_of(one.q, rows, kv_head, heads_kv)
            score, _ = _scores(queries, keys[:columns], end, scale)
            block_top = score.unflatten(-1, (-1, block_kv)).amax(-1)
            top = block_top.amax(-1, keepdim=True)
            top = top.masked_fill(top == -torch.inf, 0)
            weight = score.sub_(top).exp_()
            mass = weight.sum(-1, keepdim=True)
            product = matmul(weight.to(values.dtype).view(-1, columns), values[:columns])
            result = product.view(group, -1, head_dim) / mass.masked_fill(mass == 0, 1)
            result += _special_terms(first_special, end, result.dtype)
            out[at, heads] = result.transpose(0, 1).to(out.dtype)
            row_lse = top + mass.log()
            lse[heads, at] = row_lse.squeeze(-1)
            if reduce:
                prob = weight.unflatten(-1, (-1, block_kv)).sum(-1) / mass.masked_fill(mass == 0, 1)
            else:
                prob = (block_top - row_lse.masked_fill(row_lse == -torch.inf, 0)).exp_()
            if not per_token:
                tail = -len(rows) % block_q
                prob = F.pad(prob, (0, 0, 0, tail)).unflatten(1, (-1, block_q))
                prob = prob.sum(2) / _rows_of_blocks(one, rows, block_q) if reduce else prob.amax(2)
            first = rows.start if per_token else rows.start // block_q
            pooled[heads, first : first + prob.shape[1], : prob.shape[2]] = prob


def _rows_of_blocks(one: Sequence, rows: range, block_q: int) -> Tensor:
    """fp32 ``[blocks, 1]``: how many of each block's rows exist in the sequence, at least 1."""
    first = torch.arange(rows.start, rows.stop, block_q, device=one.q.device)
    return (one.length_q - first).clamp(1, block_q)[:, None].to(torch.float32)


def _attend_backward(
    one: Sequence,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one sequence in the accumulation dtype."""
    wide = lse.dtype
    rows_q, heads_q, head_dim = one.q.shape
    rows_kv, heads_kv = one.k.shape[:2]
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (one.q, one.k, one.v))
    if rows_q == 0 or rows_kv == 0 or heads_q == 0:
        return grad_q, grad_k, grad_v
    group = heads_q // heads_kv
    for kv_head in range(heads_kv):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        head_keys, head_values = (x[:, kv_head].to(wide) for x in (one.k, one.v))
        for rows in _chunks(rows_q, group * rows_kv, 1, chunk_rows):
            columns = _reach(one, rows, causal)
            if columns == 0:
                continue
            keys, values = head_keys[:columns], head_values[:columns]
            end = _visible_end(one, rows, causal)
            at = slice(rows.start, rows.stop)
            queries, grad, result = (
                _heads_of(x, rows, kv_head, heads_kv).to(wide) for x in (one.q, grad_out, out)
            )
            score, hidden = _scores(queries, keys, end, scale)
            row_lse = lse[heads, at, None]
            prob = score.sub_(row_lse.masked_fill(row_lse == -torch.inf, 0)).exp_()
            delta = (grad * result).sum(-1, keepdim=True)
            grad_score = (grad @ values.t()).sub_(delta).mul_(prob).mul_(scale)
            # Explicit zeros: hidden columns of v may hold NaN, and 0 * NaN is NaN.
            grad_score = grad_score.masked_fill_(hidden, 0)
            grad_q[at, heads] = (grad_score @ keys).transpose(0, 1)
            flat = (-1, columns)
            grad_k[:columns, kv_head] += grad_score.view(flat).t() @ queries.reshape(-1, head_dim)
            grad_v[:columns, kv_head] += prob.view(flat).t() @ grad.reshape(-1, head_dim)
    return grad_q, grad_k, grad_v
