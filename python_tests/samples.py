# SPDX-License-Identifier: Apache-2.0
"""One small call of every op in each of its forms, for the tests of the machinery around them."""

import attention
import inputs
import torch

FORMS = (
    "block_sparse_attn",
    "block_sparse_attn dense",
    "block_sparse_attn varlen",
    "attn_pool",
    "attn_pool per_token",
    "attn_pool varlen",
    "pool_gate",
    "pool_gate plain",
    "pool_gate narrow",
    "pool_gate varlen",
    "_pool_gate_pair",
    "_pool_gate_pair varlen",
    "gate_scores",
    "gate_scores varlen",
    "gate_select threshold",
    "gate_select varlen",
    "gate_select topk",
    "gate_select density",
    "gate_select topp",
    "pack_block_bits",
    "unpack_block_bits",
    "block_bits_from_indices",
)


def sample(form: str, device: str = "cpu", rows: int = 150, *, grad: bool = False, seed: int = 0):
    """(op, args, kwargs) of `form`. grad: float arguments that have a gradient require it."""
    name, _, kind = form.partition(" ")
    op = getattr(torch.ops.seer, name)
    dtype = torch.bfloat16
    gen = inputs.generator(seed)

    def draw(*shape):
        x = torch.randn(*shape, generator=gen).to(device=device, dtype=dtype)
        return x.requires_grad_(grad)

    if name in ("block_sparse_attn", "attn_pool"):
        grad = grad and name == "attn_pool"
        kwargs = {"per_token": True} if kind == "per_token" else {}
        if kind == "varlen":
            cu = inputs.packed([rows // 2, rows - rows // 2]).to(device)
            q, k, v = draw(rows, 4, 64), draw(rows, 2, 64), draw(rows, 2, 64)
            most = rows - rows // 2
            kwargs |= {"cu_seqlens_q": cu, "cu_seqlens_kv": cu}
            kwargs |= {"max_rows_q": most, "max_rows_kv": most}
        else:
            q, k, v = draw(2, rows, 4, 64), draw(2, rows, 2, 64), draw(2, rows, 2, 64)
            most = rows
        if name == "block_sparse_attn" and kind != "dense":
            kwargs["block_bits"] = attention.make_bits(
                "random_50", rows_q=most, rows_kv=most, batch=2, heads=2, seed=seed, device=device
            )
        return op, (q, k, v), kwargs
    blocks = attention.ceil_div(rows, 64)
    lengths = inputs.packed([rows // 2, rows - rows // 2]).to(device)
    if name == "_pool_gate_pair":
        rope = [torch.rand(blocks, 32, generator=gen).to(device) for _ in range(4)]
        lead = (rows,) if kind == "varlen" else (2, rows)
        q, k, weight = draw(*lead, 4, 64), draw(*lead, 2, 64), draw(4, 192, 64)
        tail = (lengths, lengths, rows, rows) if kind == "varlen" else ()
        return op, (q, k, None, weight, *rope, 64, 64, 4, 7, *tail), {}
    if name == "pool_gate":
        x = draw(2, rows, 2, 64)
        if kind == "plain":
            return op, (x,), {"pools": 5}
        cos, sin = (torch.rand(blocks, 16, generator=gen).to(device) for _ in range(2))
        # No CUDA kernel was compiled for the narrow gate.
        width = 32 if kind == "narrow" else 64
        if kind == "varlen":
            args = (x[0], draw(4, 192, width), cos, sin, lengths)
            return op, args, {"pools": 7, "max_rows": rows}
        return op, (x, draw(4, 192, width), cos, sin), {"pools": 7}
    if name in ("gate_scores", "gate_select"):
        grad = grad and name == "gate_scores"
        rule = {
            "": {},
            "threshold": {"method": 0, "value": 0.05, "local": 1},
            "topk": {"method": 1, "value": 3.0, "sink": 1},
            "density": {"method": 2, "value": 0.5, "dense_last_rows": 1},
            "topp": {"method": 3, "value": 0.8},
            "varlen": {"block_q": 1, "block_kv": 1},
        }[kind]
        if kind == "varlen":
            gates = (draw(2, rows, 4, 64), draw(2, rows, 2, 64))
            return op, (*gates, lengths, lengths), rule
        return op, (draw(2, rows, 4, 64), draw(2, rows, 2, 64)), rule
    mask = (torch.rand(2, 3, rows, 70, generator=gen) < 0.4).to(device)
    if name == "pack_block_bits":
        return op, (mask,), {}
    if name == "unpack_block_bits":
        return op, (torch.ops.seer.pack_block_bits(mask), 70), {}
    order = (~mask).to(torch.int32).argsort(dim=-1, stable=True).to(torch.int32)
    return op, (order, mask.sum(-1).to(torch.int32), 70), {}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)
