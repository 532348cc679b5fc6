# SPDX-License-Identifier: Apache-2.0
"""What is kept beside an attached model, and the hooks that fill it.

Hooks are module-level functions and bound methods that find their state through the module, so a
deep copy of a model has state of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from seer_cuda.block_mask import BlockMask
from seer_cuda.gate import AttnGate
from seer_cuda.gate_cache import GateKeyCache
from seer_cuda.integrations.transformers._config import SeerConfig
from seer_cuda.integrations.transformers._plan import Plan, make_plan

#: The name of the attention implementation.
NAME = "seer"
STATE = "_seer_state"
LAYER = "_seer_layer"


class Kept:
    """Gate keys of one layer and one KV cache.

    Attributes:
        spans: By the row of their span, with the span's start and the tokens, padding included,
            that the KV cache then held.
        made_of: The tensor that the KV cache then had (weak). Beams that were reordered, rows that
            were repeated or cropped make another one, whose tokens may be others.
    """

    def __init__(self) -> None:
        self.spans: dict[int | None, tuple[GateKeyCache, int, int]] = {}
        self.made_of: Callable[[], Tensor | None] = lambda: None

    def fits(self, cache: Any, index: int) -> bool:
        """Whether the KV cache is as it was left."""
        layers = getattr(cache, "layers", ())
        stored = getattr(layers[index], "keys", None) if index < len(layers) else None
        return stored is not None and self.made_of() is stored


@dataclass(frozen=True)
class Prompt:
    """What a layer's attention is given for whole sequences of one length.

    Attributes:
        layer: Index of the layer.
        q, k, v: ``[batch, rows, heads, head_dim]``, q and k after RoPE.
        q_before, k_before: q and k before RoPE.
        gate: Of the layer.
        scale: Softmax scale; None: the default.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    q_before: Tensor
    k_before: Tensor
    gate: AttnGate
    scale: float | None


class State:
    """Of a model."""

    def __init__(self, base: nn.Module, config: SeerConfig, implementation: str | None) -> None:
        self.base = base
        self.config = config
        self.implementation = implementation
        self.layers: list[Layer] = []
        self.handles: list[Any] = []
        self.frozen: list[nn.Parameter] = []
        self.observer: Callable[[int, BlockMask], None] | None = None
        # Evaluation puts another choice of blocks in the gate's place; None keeps all.
        self.choice: Callable[[Prompt], BlockMask | None] | None = None
        self.forget()

    def forget(self) -> None:
        """Drops everything that belongs to a call or to a KV cache."""
        self.losses: dict[int, Tensor] = {}
        self.collecting = False
        # Weak: gate keys go with the KV cache they belong to.
        self.kept: WeakKeyDictionary[Any, dict[int, Kept]] = WeakKeyDictionary()
        self.plan: Plan | None = None
        self.plan_of: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        transient = ("losses", "collecting", "kept", "plan", "plan_of")
        return {name: value for name, value in self.__dict__.items() if name not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()


class Layer:
    """Of one attention module: the inputs of the call that is under way."""

    def __init__(self, state: State, module: nn.Module, index: int) -> None:
        self.state = state
        self.index = index
        self.sources = {side: source(module, side) for side in "qk"}
        self.end()

    def end(self) -> None:
        """The call is over."""
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.capturing = False
        self.plan: Plan | None = None
        self.cache: Any = None
        self.positions: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("state", "index", "sources")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.end()

    def see_q(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of what makes q."""
        if self.capturing:
            self.q = output

    def see_k(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of what makes k."""
        if self.capturing:
            self.k = output

    def before_rope(self, module: nn.Module, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """q and k ``[batch, rows, heads, head_dim]``; rotated: q after RoPE.

        Raises:
            RuntimeError: the hooks saw nothing, or what they saw was rotated in place.
        """
        if self.q is None or self.k is None:
            raise RuntimeError(
                f"seer::attach: layers.{self.index}.self_attn: expected q and k from "
                f"{' and '.join(names(module))}, got none. Detach, and attach again after changing "
                "modules (adapters, quantisation)."
            )
        if rotated.numel() and rotated.data_ptr() == self.q.data_ptr():
            raise RuntimeError(
                f"seer::attach: layers.{self.index}.self_attn: expected RoPE that leaves its input "
                "as it is, got q rotated in place. Load the model without such a kernel (Liger's "
                "rope, hub kernels)."
            )
        return tuple(
            x.unflatten(-1, (-1, module.head_dim)) if x.dim() == 3 else x for x in (self.q, self.k)
        )


def names(module: nn.Module) -> tuple[str, str]:
    """Names of the submodules whose outputs are q and k before RoPE."""
    return tuple(
        f"{side}_norm"
        if isinstance(getattr(module, f"{side}_norm", None), nn.Module)
        else f"{side}_proj"
        for side in "qk"
    )


def source(module: nn.Module, side: str) -> nn.Module:
    """The submodule whose output is q or k before RoPE: a norm where the model has one."""
    return getattr(module, names(module)["qk".index(side)])


def gate_of(module: nn.Module) -> AttnGate:
    """The gate of an attention module."""
    return module.attn_gate


def before_model(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of the model: the losses of a call begin here.

    `gate_loss` ends them, so that the recomputation of checkpointed layers adds nothing.
    """
    state = getattr(module, STATE)
    state.losses, state.collecting = {}, True


def before_attention(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: what its arguments say about the sequences."""
    layer: Layer = getattr(module, LAYER)
    state = layer.state
    if state.config.mode == "dense":
        return
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cache = kwargs.get("past_key_values")
    if hidden.shape[1] != 1:
        _begin(layer, module, hidden, cache, kwargs)
    elif cache is not None and not torch.compiler.is_compiling():
        # A decode step is dense and tells the gate nothing, so that it costs nothing and compiles
        # whole. The gate keys of this cache are made again from its keys if a longer call follows.
        state.kept.pop(cache, None)


@torch.compiler.disable
def _begin(
    layer: Layer, module: nn.Module, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
) -> None:
    state = layer.state
    layer.end()
    implementation = module.config._attn_implementation
    if implementation != NAME:
        raise RuntimeError(
            f"seer::attach: attn_implementation: expected {NAME!r} in mode {state.config.mode!r}, "
            f"got {implementation!r}, set after attaching. Call configure(model) to set it again, "
            "or detach first."
        )
    if any(source(module, side) is not layer.sources[side] for side in "qk"):
        raise RuntimeError(
            f"seer::attach: layers.{layer.index}.self_attn: expected "
            f"{' and '.join(names(module))} of the time of attaching, got others. Detach, and "
            "attach again after changing modules (adapters, quantisation)."
        )
    layer.cache, layer.positions = cache, kwargs.get("position_ids")
    mask = kwargs.get("attention_mask")
    batch, rows = hidden.shape[:2]
    cu_seqlens = kwargs.get("cu_seq_lens_q") if batch == 1 else None
    # The other layers of a call get the very same tensors; comparing their values would wait for
    # the device in each. The first layer always looks: a buffer may be filled anew in place.
    # A strong reference to the KV cache would keep its memory.
    held = None if cache is None else ref(cache)
    given = (mask, layer.positions, cu_seqlens, batch, rows, held)
    known = len(given) == len(state.plan_of) and all(
        a is b or (isinstance(a, int) and a == b) for a, b in zip(given, state.plan_of, strict=True)
    )
    if state.plan is None or layer.index == state.layers[0].index or not known:
        # 0 or an int for a growing cache; a static one answers with a tensor.
        past = 0 if cache is None else int(cache.get_seq_length(layer.index))
        state.plan = make_plan(batch, rows, past, mask, layer.positions, cu_seqlens)
        state.plan_of = given
    kept = {} if cache is None else state.kept.get(cache, {})
    if layer.index in kept and not kept[layer.index].fits(cache, layer.index):
        del kept[layer.index]
    layer.plan = state.plan
    layer.capturing = True
