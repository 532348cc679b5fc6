# SPDX-License-Identifier: Apache-2.0
"""The attention that transformers calls under the name ``seer``, and its mask.

A call with one query row is a decode step: transformers' own ``sdpa`` over the KV cache. Every
other call is a prompt or a chunk of one.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from seer_cuda.gate_cache import GateKeyCache
from seer_cuda.integrations.transformers._distil import layer_loss
from seer_cuda.integrations.transformers._plan import Span
from seer_cuda.integrations.transformers._state import (
    LAYER,
    NAME,
    Kept,
    Layer,
    Prompt,
    gate_of,
)
from seer_cuda.ops import attn_pool, block_sparse_attn
from seer_cuda.prefill import gate_mask


def register() -> None:
    """Makes ``attn_implementation="seer"`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(**kwargs: Any) -> Tensor | None:
    """The mask of a call: sdpa's for a decode step, else the padding mask as it was given.

    A prompt gets no mask of its square: at 128k tokens that is 16 GiB.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    rows = kwargs["q_length"] if "q_length" in kwargs else kwargs["cache_position"].shape[0]
    if rows == 1:
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**kwargs)
    return kwargs.get("attention_mask")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers' interface has it.

    Args:
        module: The attention module.
        query: ``[batch, heads_q, rows, head_dim]``, after RoPE.
        key, value: ``[batch, heads_kv, rows_kv, head_dim]``: all of the KV cache.
        attention_mask: From the function above.
        scaling: Softmax scale.
        dropout: Of decode steps; prompts have none.

    Returns:
        ``[batch, rows, heads_q, head_dim]`` and no weights. Rows of padding are 0.

    Raises:
        ValueError: the model has no gates, or output_attentions.
    """
    from transformers import AttentionInterface

    if query.shape[2] == 1:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    layer = getattr(module, LAYER, None)
    if layer is None or layer.plan is None:
        raise ValueError(
            'seer::attach: attn_implementation: expected a model with gates for "seer", got one '
            "without. Call attach; a model that shares another's configuration needs its own."
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "seer::attach: output_attentions: expected False, got True: block-sparse attention "
            "makes no weights. Configure mode='dense', with attn_implementation='eager'."
        )
    return _prompt(module, layer, query, key, value, scaling), None


@torch.compiler.disable
def _prompt(
    module: nn.Module, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> Tensor:
    """All sequences of a call, each by itself; arguments and result as in `attention`."""
    try:
        plan, state = layer.plan, layer.state
        before = layer.before_rope(module, query)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if torch.is_autocast_enabled(q.device.type):
            # Norms, RoPE's tables and the KV cache have made fp32 of what was projected.
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v, *before = (x.to(dtype) for x in (q, k, v, *before))
        distilling = state.config.mode == "distilling"
        if distilling and plan.past:
            raise ValueError(
                f"seer::attach: past_key_values: expected none while distilling, got {plan.past} "
                "tokens. Pass whole sequences with use_cache=False."
            )
        if layer.cache is not None:
            kept = state.kept.setdefault(layer.cache, {})
            if plan.past == 0 or layer.index not in kept:
                kept[layer.index] = Kept()
        out, losses = q if plan.whole else torch.zeros_like(q), []
        for span in plan.spans:
            if distilling:
                part, loss = _distil(module, span, q, k, v, before, scale)
                losses.append(loss)
            else:
                part = _sparse(module, layer, span, q, k, v, before, scale)
            if plan.whole:
                out = part
            else:
                out[span.rows, span.begin : span.end] = part
        if losses:
            # A checkpointed layer's forward runs without gradients.
            with torch.set_grad_enabled(losses[0].requires_grad):
                loss = torch.stack(losses).mean()
            # Made in any case: torch compares what a recomputation saves with what the forward did.
            if state.collecting:
                state.losses[layer.index] = loss
        if layer.cache is not None:
            kept[layer.index].made_of = ref(key)
        return out
    finally:
        layer.end()


def _cut(x: Tensor, span: Span, begin: int, end: int) -> Tensor:
    return x[span.rows, begin:end]


def _distil(
    module: nn.Module,
    span: Span,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: tuple[Tensor, Tensor],
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Dense attention of one span, and the loss of its map."""
    gate = gate_of(module)
    block = gate.config.block
    q, k, v, *before = (_cut(x, span, span.begin, span.end) for x in (q, k, v, *before))
    out, _, pooled = attn_pool(q, k, v, block_q=block, block_kv=block, scale=scale)
    return out, layer_loss(gate, *before, pooled, module.training)


def _sparse(
    module: nn.Module,
    layer: Layer,
    span: Span,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: tuple[Tensor, Tensor],
    scale: float | None,
) -> Tensor:
    """Attention of one span over the blocks that the gate keeps.

    Queries before the next block boundary of their sequence have no pooled query of their own:
    they, and chunks shorter than a block, see every key.
    """
    plan, gate = layer.plan, gate_of(module)
    rows, first = span.end - span.begin, plan.past + span.begin - span.start
    q, q_before = (_cut(x, span, span.begin, span.end) for x in (q, before[0]))
    # A cache of fixed size has rows after these that hold nothing yet.
    k, v = (_cut(x, span, span.start, plan.past + span.end) for x in (k, v))
    block = gate.config.block
    choice = layer.state.choice
    if choice is not None and first == 0:
        k_before = _cut(before[1], span, span.begin, span.end)
        mask = choice(Prompt(layer.index, q, k, v, q_before, k_before, gate, scale))
        return block_sparse_attn(q, k, v, mask, scale=scale)
    dense = rows if first and rows < block else min(-first % block, rows)
    parts = []
    if dense:
        seen = first + dense
        parts.append(block_sparse_attn(q[:, :dense], k[:, :seen], v[:, :seen], scale=scale))
    if dense < rows:
        k_before = _cut(before[1], span, span.begin, span.end)
        if layer.cache is not None and not plan.packed:
            keys = _gate_keys(module, layer, span, k, k_before)
        else:
            keys = k_before
        rule = layer.state.config.rule
        mask = gate_mask(q_before[:, dense:], keys, gate, rule)
        if layer.state.observer is not None:
            layer.state.observer(layer.index, mask)
        parts.append(block_sparse_attn(q[:, dense:], k, v, mask, scale=scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _gate_keys(
    module: nn.Module, layer: Layer, span: Span, k: Tensor, k_before: Tensor
) -> GateKeyCache:
    """The gate keys of a span's sequence, its new keys included.

    Those kept from the call before are used if no other call came between; otherwise the keys of
    the KV cache are rotated back.
    """
    plan, gate = layer.plan, gate_of(module)
    kept = layer.state.kept[layer.cache][layer.index].spans
    keys, start, held = kept.get(span.row, (None, 0, 0))
    same = keys is not None and (start, held) == (span.start, plan.past)
    if not same or keys.keys.dtype != k_before.dtype:
        keys = GateKeyCache(gate, k.shape[0], k.shape[1], device=k.device, dtype=k_before.dtype)
    block = gate.config.block
    done, first = keys.rows // block * block, k.shape[1] - k_before.shape[1]
    keys.truncate(done).reserve(k.shape[1])
    if done < first:
        old = _rotated_back(layer, span, k[:, done:first], first - done)
        k_before = torch.cat([old.to(k_before.dtype), k_before], 1)
    keys.append(k_before)
    kept[span.row] = (keys, span.start, plan.past + plan.rows)
    return keys


def _rotated_back(layer: Layer, span: Span, k: Tensor, distance: int) -> Tensor:
    """Keys as they were before RoPE, fp32; the first is `distance` before the span's first query.

    They carry the rounding of the rotated key, which only the choice of blocks sees.
    """
    steps = torch.arange(k.shape[1], device=k.device) - distance
    if layer.positions is None:
        at = steps[None] + layer.plan.past + span.begin
    else:
        rows = slice(None) if layer.positions.shape[0] == 1 else span.rows
        at = layer.positions[rows, span.begin : span.begin + 1].to(k.device) + steps
    rotary = layer.state.base.rotary_emb
    cos, sin = (table.unsqueeze(2) for table in rotary(k.float(), at))
    half = k.shape[-1] // 2
    turned = torch.cat([-k[..., half:], k[..., :half]], -1)
    # The tables carry YaRN's factor, which the rotated key has once and this product twice.
    return (k * cos - turned * sin) / rotary.attention_scaling**2


__all__ = ["NAME", "attention", "attention_mask", "register"]
