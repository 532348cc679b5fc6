# SPDX-License-Identifier: Apache-2.0
"""What runs as torch operators on CUDA: all of an op, or what its compiled kernels do not serve.

They are the formulas of `_attn_math` and `_gate_math`: same contract, fp32 accumulation, no host
synchronisation. Unlike the compiled kernels they allocate temporaries: attn_pool score tiles of
O(chunk * rows_kv), gate_select the scores of a chunk of query blocks, both bounded by
`_TILE_ELEMENTS`; gate_scores and pool_gate some copies of their inputs and output. The argument
checks are those of the compiled ops, so a mistake reads the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seer_cuda import _attn_math, _gate_math

_Compute = Callable[..., Tensor | tuple[Tensor, ...]]

# Ops without a kernel of their own on CUDA.
_COMPOSITES: dict[str, _Compute] = {"attn_pool": _attn_math.attn_pool}
# Ops with one, which call ``seer::_<op>_torch`` for float32, dimensions that no kernel was compiled
# for, and strides that are no multiples of 16 bytes.
_FALLBACKS: dict[str, _Compute] = {
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


def _checked(name: str, compute: _Compute) -> _Compute:
    check, compute = getattr(torch.ops.seer, f"_check_{name}"), _exact(compute)

    def implementation(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        check(*args, **kwargs)
        return compute(*args, **kwargs)

    return implementation


def composite_ops() -> list[str]:
    """Names of the ops whose CUDA implementation is made of torch operators."""
    return list(_COMPOSITES)


def fallback_ops() -> list[str]:
    """Names of the ops that run as torch operators where no compiled kernel serves the call."""
    return list(_FALLBACKS)


for _name, _compute in _COMPOSITES.items():
    _library.impl(_name, _checked(_name, _compute), "CUDA")
for _name, _compute in _FALLBACKS.items():
    _library.impl(f"_{_name}_torch", _exact(_compute), "CompositeExplicitAutograd")
