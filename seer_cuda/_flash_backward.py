# SPDX-License-Identifier: Apache-2.0
"""The gradient of dense attention by torch's own FlashAttention-2 backward, where that serves.

It takes out and lse of any forward that computed the same softmax, so attn_pool needs no backward
kernel of its own. It does not promise the same bits twice (set
``torch.use_deterministic_algorithms(True)`` for that), and a NaN in k or v may reach the gradients
of rows that do not see it. What it does not take goes to the formula of `_attn_math`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# bf16 and fp16; others would be computed in another precision than the forward was.
_DTYPES = (torch.bfloat16, torch.float16)


def serves(
    q: Tensor, k: Tensor, *, packed: bool, causal: bool, scale: float | None, dtype: torch.dtype
) -> bool:
    """Whether torch's kernel computes this gradient.

    Its causal rule agrees with ours only for queries and keys of one length, and its reading of
    cu_seqlens trusts their contents; both are left to the formula. dtype: of the outer gradient.
    """
    return (
        q.is_cuda
        and not packed
        and q.dtype in _DTYPES
        and dtype == q.dtype
        and q.shape[-1] in (64, 128)
        and (not causal or q.shape[1] == k.shape[1])
        and (scale is None or scale > 0)
        and min(*q.shape, *k.shape) > 0
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, ...]:
    """Gradients to q, k and v. Call it only if `serves`."""
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a dropout that is not there
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad_out.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        causal,
        seed,
        unused,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
