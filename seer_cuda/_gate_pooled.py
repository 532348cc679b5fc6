# SPDX-License-Identifier: Apache-2.0
"""A gate's embeddings in two steps: pooling, which has no weights, and all that training changes.

Pooled inputs are 1 / block of q and k. Whoever trains a gate on the same tokens many times keeps
those and does the second step alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_cuda import _gate_math
from seer_cuda._attn_math import accumulation_dtype
from seer_cuda._gate_pooling import pool_blocks
from seer_cuda.gate import AttnGate


def pooled_inputs(gate: AttnGate, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides pooled as this gate does it.

    Args:
        gate: Tells the block and the poolings.
        q: ``[batch, rows, heads_q, head_dim]``, before RoPE.
        k: ``[batch, rows, heads_kv, head_dim]``, likewise.

    Returns:
        ``[batch, blocks, heads_q, n_pools * head_dim]`` of q and the same of k, of their dtype:
        averages are rounded to it, where `pool_gate` keeps them in fp32.
    """
    config = gate.config
    return (
        pool_blocks(q, config.block, config.q_pools),
        pool_blocks(k, config.block, config.k_pools),
    )


def embed_pooled(gate: AttnGate, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of what `pooled_inputs` gave: `AttnGate.embed` of whole prompts from position 0.

    Differentiable in the gate's weights.

    Returns:
        q_gate ``[batch, blocks, heads_q, gate_dim]`` and k_gate ``[batch, blocks, heads_q
        (single-linear) or heads_kv, gate_dim]``, of their inputs' dtype.
    """
    config = gate.config
    rows = config.block * q.shape[1]
    tables = gate.rope_tables(torch.arange(rows, device=q.device))
    q_weight = None if config.single_linear else gate.mask_linear_q.weight
    if not config.qk_norm:
        return (_project(q, q_weight, *tables), _project(k, gate.mask_linear_k.weight, *tables))
    eps, norms = config.norm_eps, (gate.attngate_qnorm.weight, gate.attngate_knorm.weight)
    plain = _project(q, q_weight), _project(k, gate.mask_linear_k.weight)
    return (
        _gate_math.norm_rotate(plain[0], norms[0], eps, *tables),
        _gate_math.norm_rotate(plain[1], norms[1], eps, *tables),
    )


def _project(
    x: Tensor, weight: Tensor | None, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """Projected and turned in fp32 with a weight rounded to x's dtype, as in `pool_gate`."""
    y = x.to(accumulation_dtype(x.dtype))
    if weight is not None:
        by_head = weight.to(x.dtype).to(y.dtype).unflatten(0, (x.shape[2], -1))
        y = torch.einsum("bnhc,hgcd->bnhgd", y, by_head).flatten(2, 3)
    if cos is not None:
        y = _gate_math.rotate(y, cos, sin)
    return y.to(x.dtype)
