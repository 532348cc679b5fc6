# SPDX-License-Identifier: Apache-2.0
"""A gate's embeddings in two steps: pooling, which has no weights, and all that training changes.

Pooled inputs are 1 / block of q and k. Whoever trains a gate on the same tokens many times keeps
those and does the second step alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_cuda import _gate_math
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
    # A pooled block is a token to the projection; where a norm stands before RoPE, that comes last.
    fused = (None, None) if config.qk_norm else tables
    weights = (
        None if config.single_linear else gate.mask_linear_q.weight.to(q.dtype),
        gate.mask_linear_k.weight.to(k.dtype),
    )
    found = [
        _gate_math.pool_gate(x, weight, *fused, block=1)
        for x, weight in zip((q, k), weights, strict=True)
    ]
    if config.qk_norm:
        norms = gate.attngate_qnorm.weight, gate.attngate_knorm.weight
        found = [
            _gate_math.norm_rotate(y, norm, config.norm_eps, *tables)
            for y, norm in zip(found, norms, strict=True)
        ]
    return found[0], found[1]
