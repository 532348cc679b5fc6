# SPDX-License-Identifier: Apache-2.0
"""What runs as torch operators on CUDA: calls of attn_pool and of the gate's ops that no compiled
kernel serves (dimensions that no kernel was compiled for; for the gate's ops also float32, and
strides that are no multiples of 16 bytes). The compiled ops check the arguments, decide by the
table, and then call ``seer::_<op>_torch``, implemented here.

They are the formulas of `_attn_math` and `_gate_math`: same contract, fp32 accumulation, no host
synchronisation. Unlike the compiled kernels they allocate temporaries: attn_pool score tiles of
O(chunk * rows_kv), gate_select the scores of a chunk of query blocks, both bounded by
`_TILE_ELEMENTS`; gate_scores and pool_gate some copies of their inputs and output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seer_cuda import _attn_math, _gate_math

_Compute = Callable[..., Tensor | tuple[Tensor, ...]]

_FALLBACKS: dict[str, _Compute] = {
    "attn_pool": _attn_math.attn_pool,
    "pool_gate": _gate_math.pool_gate,
    "gate_scores": _gate_math.gate_scores,
    "gate_select": _gate_math.gate_select,
}

# The registrations live as long as this object.
_library = torch.library.Library("seer", "IMPL")


def _exact(compute: _Compute) -> _Compute:
    def implementation(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        # Autocast would round the fp32 operands of the formulas.
        with torch.autocast(args[0].device.type, enabled=False):
            return compute(*args, **kwargs)

    return implementation


def fallback_ops() -> list[str]:
    """Names of the ops that run as torch operators where no compiled kernel serves the call."""
    return list(_FALLBACKS)


for _name, _compute in _FALLBACKS.items():
    _library.impl(f"_{_name}_torch", _exact(_compute), "CompositeExplicitAutograd")
