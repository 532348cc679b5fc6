# SPDX-License-Identifier: Apache-2.0
"""Reading the released checkpoints of SeerAttention's gates."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_GATE = "attn_gate."
# The norms' weights: the name of the first decode checkpoints, and the present one.
_NORMS = {f"mask_{side}norm.weight": f"attngate_{side}norm.weight" for side in "qk"}


def released_gate_state(
    state: Mapping[str, Tensor], layer: int | None = None, *, norms: bool = False
) -> dict[str, Tensor]:
    """The weights of one prefill gate under the names of `AttnGate`, prefixes off.

    Args:
        state: A checkpoint, see `AttnGate.load_released_state_dict`. A whole model's state dict is
            fine: where keys carry layer numbers, only those with ``attn_gate.`` count.
        layer: Keep the keys of this layer only. None: keys must not carry layer numbers.
        norms: The gate has norms of its embeddings (`GateConfig.qk_norm`), so their weights do not
            make it a decode gate.

    Raises:
        KeyError: layer is None and the keys carry layer numbers.
        ValueError: the gate is a decode gate of SeerAttention-R.
    """
    numbers = {key: _LAYER.search(key) for key in state}
    numbered = [key for key, number in numbers.items() if number is not None]
    if numbered and layer is None:
        raise KeyError(
            f"seer::AttnGate: {numbered[0]}: expected the keys of one gate, got numbered layers. "
            "Pass layer=."
        )
    own = {}
    for key, value in state.items():
        number = numbers[key]
        if numbered and (number is None or int(number[1]) != layer or _GATE not in key):
            continue
        name = key.rpartition(_GATE)[2]
        own[_NORMS.get(name, name) if norms else name] = value
    for name, value in own.items():
        if not (norms and name in _NORMS.values()) and _of_decode(name, value):
            raise ValueError(
                f"seer::AttnGate: {name}: expected the weights of a prefill gate, got a decode "
                f"gate of SeerAttention-R (shape {list(value.shape)}). This class holds prefill "
                "gates; use a prefill checkpoint."
            )
    return own


def check_gate_state(
    own: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    layer: int | None,
    *,
    single_linear: bool,
) -> None:
    """KeyError or ValueError unless these are the weights of a gate with the `expected` shapes."""
    where = "" if layer is None else f" of layer {layer}"
    for name, shape in expected.items():
        if name not in own:
            raise KeyError(
                f"seer::AttnGate: {name}{where}: expected a weight of shape {list(shape)}, got "
                f"none among {sorted(own) or 'no keys'}. Check the layer and the key prefix."
            )
        if tuple(own[name].shape) != shape:
            raise ValueError(
                f"seer::AttnGate: {name}{where}: expected shape {list(shape)}, got "
                f"{list(own[name].shape)}. Set the GateConfig of this checkpoint."
            )
        if own[name].is_meta:
            raise ValueError(
                f"seer::AttnGate: {name}{where}: expected values, got a meta tensor. Load the "
                "checkpoint onto a device with memory."
            )
    extra = sorted(set(own) - set(expected))
    if extra:
        mode = "single" if single_linear else "double"
        raise KeyError(
            f"seer::AttnGate: {', '.join(extra)}{where}: expected only {sorted(expected)} in "
            f"{mode}-linear mode, got more. Set force_double, or use a prefill checkpoint."
        )


def _of_decode(name: str, weight: Tensor) -> bool:
    """Decode gates have names of their own, norms, and one q matrix per head of a GQA group."""
    return (
        name.startswith("attngate_")
        or name.endswith("norm.weight")
        or (name == "mask_linear_q.weight" and weight.dim() == 4)
    )
