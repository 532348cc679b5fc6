# SPDX-License-Identifier: Apache-2.0
"""Gradients of the ops.

pool_gate differentiates to x and weight, gate_scores to both embeddings, attn_pool to q, k and v
through `out`; its lse and pooled leave the graph (requires_grad False), so a loss on them fails
loudly instead of training nothing. block_sparse_attn and gate_select are forward-only.

On CUDA the gradient of attn_pool is computed by torch's own FlashAttention-2 where that serves
(`_flash_backward`). The formulas are pure functions of `_attn_math` and `_gate_math`. Those with
loops or data-dependent routing run inside an op of their own (``seer::_*_backward``), opaque to
torch.compile, so that dynamic shapes stay dynamic. First derivatives only: the backward ops refuse
a second one.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from seer_cuda import _attn_math, _flash_backward, _gate_math

_library = torch.library.Library("seer", "FRAGMENT")
_library.define(
    "_attn_pool_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, *, bool causal, float? scale, SymInt max_rows_q, "
    "SymInt max_rows_kv) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "_pool_gate_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, "
    "Tensor? cu_seqlens, *, SymInt block, int pools, SymInt max_rows, bool need_x, "
    "bool need_weight) -> (Tensor, Tensor)"
)


def _exact(grad: Tensor) -> Any:
    """Autocast off: it would round the fp32 operands of the formulas."""
    return torch.autocast(grad.device.type, enabled=False)


def _attn_pool_backward_op(
    grad_out: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, ...]:
    v, out, lse, cu_seqlens_q, _ = rest
    rule = {name: options[name] for name in ("causal", "scale")}
    packed = cu_seqlens_q is not None
    if _flash_backward.serves(q, k, packed=packed, dtype=grad_out.dtype, **rule):
        grads = _flash_backward.backward(grad_out, q, k, v, out, lse, **rule)
    else:
        with _exact(grad_out):
            grads = _attn_math.attn_pool_backward(grad_out, q, k, *rest, **options)
    return tuple(grad.contiguous() for grad in grads)


def _pool_gate_backward_op(
    grad: Tensor, x: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    with _exact(grad):
        grads = _gate_math.pool_gate_backward(grad, x, *args, **kwargs)
    # An op returns tensors: an empty one stands for a gradient that nobody needs.
    return tuple(x.new_empty(0) if g is None else g.contiguous() for g in grads)


_library.impl("_attn_pool_backward", _attn_pool_backward_op, "CompositeExplicitAutograd")
_library.impl("_pool_gate_backward", _pool_gate_backward_op, "CompositeExplicitAutograd")


# ------------------------------------------------------------------------------------ attention
# torch.library.register_autograd refuses schemas with keyword-only tensors (cu_seqlens), so these
# two ops get a kernel at the Autograd dispatch key: an autograd.Function around the op itself.


def _below_autograd(op: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


def _needs_graph(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def may_skip_autograd(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a call may start below the Autograd key: no gradient, no tracing, no transform."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or _needs_graph(q, k, v)
    )


class _AttnPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, pooled = _below_autograd(torch.ops.seer.attn_pool.default, q, k, v, **options)
        ctx.mark_non_differentiable(lse, pooled)
        ctx.set_materialize_grads(False)
        lengths = options.get("cu_seqlens_q"), options.get("cu_seqlens_kv")
        ctx.save_for_backward(q, k, v, out, lse, *lengths)
        ctx.options = {
            "causal": options.get("causal", True),
            "scale": options.get("scale"),
            "max_rows_q": options.get("max_rows_q", 0),
            "max_rows_kv": options.get("max_rows_kv", 0),
        }
        return out, lse, pooled

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: None, grad_pooled: None
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return None, None, None, None
        grads = torch.ops.seer._attn_pool_backward(grad_out, *ctx.saved_tensors, **ctx.options)
        return (*grads, None)


def _attn_pool(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
    if _needs_graph(q, k, v):
        return _AttnPool.apply(q, k, v, options)
    return _below_autograd(torch.ops.seer.attn_pool.default, q, k, v, **options)


class _BlockSparseAttn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        block_bits, options = rest
        op = torch.ops.seer.block_sparse_attn.default
        return _below_autograd(op, q, k, v, block_bits, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            "seer::block_sparse_attn: backward is not implemented. To train a gate, use "
            "seer_cuda.attn_pool with seer_cuda.distill (the attention itself stays frozen); for "
            "gradients through masked attention, use torch's flex_attention with "
            "BlockMask.to_flex(); for inference, call it under torch.no_grad()."
        )


def _block_sparse_attn(
    q: Tensor, k: Tensor, v: Tensor, block_bits: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    if _needs_graph(q, k, v):
        return _BlockSparseAttn.apply(q, k, v, block_bits, options)
    op = torch.ops.seer.block_sparse_attn.default
    return _below_autograd(op, q, k, v, block_bits, **options)


_library.impl("attn_pool", _attn_pool, "Autograd")
_library.impl("block_sparse_attn", _block_sparse_attn, "Autograd")


# ------------------------------------------------------------------------------------ pool_gate


def _pool_gate_setup(
    ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    for name, table in zip(("cos", "sin"), inputs[2:], strict=False):
        if table is not None and table.requires_grad:
            raise NotImplementedError(
                f"seer::pool_gate: {name}: expected a table without a gradient, got "
                "requires_grad=True. Detach it: pool_gate differentiates in x and weight only."
            )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _pool_gate_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    # The dispatcher drops trailing arguments that have their default value.
    need_x, need_weight = (*ctx.needs_input_grad, False)[:2]
    grad_x, grad_weight = torch.ops.seer._pool_gate_backward(
        grad, *ctx.saved_tensors, **ctx.options, need_x=need_x, need_weight=need_weight
    )
    return grad_x if need_x else None, grad_weight if need_weight else None, None, None, None


# ---------------------------------------------------------------------------------- gate_scores


def _gate_scores_setup(
    ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _gate_scores_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    with _exact(grad):
        grads = _gate_math.gate_scores_backward(grad, *ctx.saved_tensors, **ctx.options)
    return *grads, None, None


# --------------------------------------------------------------------------------- forward-only


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise NotImplementedError(
        "seer: second derivatives of attn_pool and pool_gate are not implemented. Leave out "
        "create_graph=True, or differentiate seer_cuda.reference."
    )


def _gate_select_backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise NotImplementedError(
        "seer::gate_select: a selection has no gradient. Train the gate through "
        "seer_cuda.gate_scores and seer_cuda.distill.gate_loss."
    )


_FORMULAS = {
    "pool_gate": (_pool_gate_backward, _pool_gate_setup),
    "gate_scores": (_gate_scores_backward, _gate_scores_setup),
    "_attn_pool_backward": (_no_second_derivative, None),
    "_pool_gate_backward": (_no_second_derivative, None),
    "gate_select": (_gate_select_backward, None),
}
for _name, (_backward, _setup) in _FORMULAS.items():
    torch.library.register_autograd(f"seer::{_name}", _backward, setup_context=_setup)
