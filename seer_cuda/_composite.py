# SPDX-License-Identifier: Apache-2.0
"""CUDA implementations of the ops that have no compiled CUDA kernel in this library, and of
attn_pool for what its kernels do not serve (head_dim other than 64 and 128, fp32).

They are the torch-operator formulas of `_attn_math` and `_gate_math`: same contract, fp32
accumulation, no host synchronisation. Unlike the compiled kernels they allocate temporaries:
attn_pool score tiles of O(chunk * rows_kv), gate_select the scores of a chunk of query blocks, both
bounded by `_TILE_ELEMENTS`; gate_scores and pool_gate some copies of their inputs and output. The
argument checks are those of the compiled ops (``seer::_check_*``, the same arguments), so a mistake
reads the same on every device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seer_cuda import _attn_math, _gate_math

_Compute = Callable[..., Tensor | tuple[Tensor, ...]]

_COMPOSITES: dict[str, _Compute] = {
    "pool_gate": _gate_math.pool_gate,
    "gate_scores": _gate_math.gate_scores,
    "gate_select": _gate_math.gate_select,
}

# The registrations live as long as this object.
_library = torch.library.Library("seer", "IMPL")


def _checked(name: str, compute: _Compute) -> _Compute:
    check = getattr(torch.ops.seer, f"_check_{name}")

    def implementation(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        check(*args, **kwargs)
        # Autocast would round the fp32 operands of the formulas.
        with torch.autocast(args[0].device.type, enabled=False):
            return compute(*args, **kwargs)

    return implementation


def _attn_pool(*args: Any, **kwargs: Any) -> Any:
    """The compiled kernel where there is one for the arguments, else the formula."""
    if torch.ops.seer._attn_pool_has_kernel(*args, **kwargs):
        return torch.ops.seer._attn_pool_on(*args, **kwargs)
    with torch.autocast(args[0].device.type, enabled=False):
        return _attn_math.attn_pool(*args, **kwargs)


def composite_ops() -> list[str]:
    """Names of the ops whose CUDA implementation is made of torch operators."""
    return list(_registered)


def _register() -> list[str]:
    names = []
    for name, compute in _COMPOSITES.items():
        # A compiled kernel, where the library has one, is left in place.
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"seer::{name}", "CUDA"):
            continue
        _library.impl(name, _checked(name, compute), "CUDA")
        names.append(name)
    # The library's own CUDA implementation, for programs without Python, refuses what it has no
    # kernel for. torch warns of any kernel that takes another's place.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _library.impl("attn_pool", _attn_pool, "CUDA", allow_override=True)
    return names


_registered = _register()
