# SPDX-License-Identifier: Apache-2.0
"""Attaching gates to a model, and taking them off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from seer_cuda.block_mask import BlockMask
from seer_cuda.gate import AttnGate
from seer_cuda.integrations.transformers._config import Mode, SeerConfig, check_mode
from seer_cuda.integrations.transformers._state import (
    LAYER,
    STATE,
    Layer,
    Prompt,
    State,
    before_attention,
    before_model,
)
from seer_cuda.select import Rule

#: config.model_type of the models that are supported.
FAMILIES = ("llama", "qwen2", "qwen3")
# Their frequencies change with the length of the prompt, those of a gate do not.
_MOVING_ROPE = ("dynamic", "longrope")


def attach(
    model: nn.Module, config: SeerConfig | None = None, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Puts a gate with random weights into every layer, as ``self_attn.attn_gate``.

    Args:
        model: A Llama, Qwen2 or Qwen3 model, with a head or without, or a wrapper around one.
        config: Default: ``SeerConfig()``.
        dtype: Of the gates' weights. Default: the model's.

    Returns:
        The model. Its code and classes are untouched; `detach` takes everything off.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: another architecture, gates are there already, sliding windows or attention
            that is not causal, offloaded weights, or RoPE whose frequencies depend on the length.
    """
    config = SeerConfig() if config is None else config
    _register()
    base = _base(model)
    if getattr(base, STATE, None) is not None:
        raise ValueError(
            "seer::attach: model: expected a model without gates, got one with gates. Call "
            "configure for another mode or rule, or detach first."
        )
    _check(base)
    state = State(base, config, base.config._attn_implementation)
    rotary = base.rotary_emb
    gates = []
    for layer in base.layers:
        module = layer.self_attn
        sizes = base.config.num_attention_heads, base.config.num_key_value_heads, module.head_dim
        gate_config = config.gate_config(*sizes, rotary.attention_scaling)
        # Projections of quantised models hold integers, or have no `weight` at all.
        norm = layer.input_layernorm.weight
        kind = dtype or norm.dtype
        gates.append(AttnGate(gate_config, rotary.inv_freq, device=norm.device, dtype=kind))
    for index, (layer, gate) in enumerate(zip(base.layers, gates, strict=True)):
        module = layer.self_attn
        own = Layer(state, module, index)
        module.attn_gate = gate.train(module.training)
        setattr(module, LAYER, own)
        state.layers.append(own)
        state.handles += [
            module.register_forward_pre_hook(before_attention, with_kwargs=True),
            own.sources["q"].register_forward_hook(own.see_q),
            own.sources["k"].register_forward_hook(own.see_k),
        ]
    state.handles.append(base.register_forward_pre_hook(before_model))
    setattr(base, STATE, state)
    _enter(model, state)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Takes the gates off: hooks, modules and settings are as they were before `attach`.

    Raises:
        ValueError: no gates.
    """
    state = state_of(model, "detach")
    for handle in state.handles:
        handle.remove()
    _thaw(state)
    _use(state.base, state.implementation)
    for layer in state.base.layers:
        del layer.self_attn.attn_gate
        delattr(layer.self_attn, LAYER)
    delattr(state.base, STATE)
    return model


def configure(
    model: nn.Module, *, mode: Mode | None = None, rule: Rule | None = None
) -> SeerConfig:
    """Changes the mode or the rule of attached gates; what is None stays.

    Returns:
        The configuration now.

    Raises:
        ValueError: unknown mode, or no gates.
        TypeError: rule is not a `Rule`.
    """
    state = state_of(model, "configure")
    if mode is not None:
        check_mode("configure", mode)
    changes = {"mode": mode, "rule": rule}
    changes = {name: value for name, value in changes.items() if value is not None}
    state.config = dataclasses.replace(state.config, **changes)
    _enter(model, state)
    return state.config


def attached_config(model: nn.Module) -> SeerConfig | None:
    """The configuration of attached gates, None without."""
    state = getattr(_base(model), STATE, None)
    return None if state is None else state.config


def gates(model: nn.Module) -> list[AttnGate]:
    """The gates, by layer.

    Raises:
        ValueError: no gates.
    """
    return [layer.self_attn.attn_gate for layer in state_of(model, "gates").base.layers]


def gate_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What an optimiser takes: the weights of all gates.

    Raises:
        ValueError: no gates.
    """
    for gate in gates(model):
        yield from gate.parameters()


def observe(model: nn.Module, observer: Callable[[int, BlockMask], None] | None) -> None:
    """Calls `observer` with the layer's index and every mask in sparse mode, until it is None.

    Raises:
        ValueError: no gates.
    """
    state_of(model, "observe").observer = observer


@contextmanager
def choosing(model: nn.Module, choice: Callable[[Prompt], BlockMask | None]) -> Iterator[None]:
    """The model in sparse mode with another choice of blocks in its gates' place; None: all.

    Raises:
        ValueError: no gates.
    """
    state = state_of(model, "evaluate")
    mode = state.config.mode
    configure(model, mode="sparse")
    state.choice = choice
    try:
        yield
    finally:
        state.choice = None
        configure(model, mode=mode)


def gate_loss(model: nn.Module) -> Tensor:
    """The distillation loss of the last call in distilling or joint mode, summed over the layers.

    >>> model(input_ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    >>> seer_hf.gate_loss(model).backward()

    Sequences of a padded or packed batch count the same each. It can be taken once per call, before
    its backward. In joint mode it is added to the model's own loss:

    >>> out = model(input_ids, labels=input_ids, use_cache=False)
    >>> (out.loss + seer_hf.gate_loss(model)).backward()

    Returns:
        fp32 scalar on the first layer's device, differentiable in the gates' weights alone: q, k
        and the map are data to it. The papers' factor 10 is in it (`seer_cuda.distill.LOSS_SCALE`).

    Raises:
        ValueError: no gates, or no call in one of these modes since.
    """
    state = state_of(model, "gate_loss")
    losses, state.losses, state.collecting = state.losses, {}, False
    if not losses:
        raise ValueError(
            "seer::gate_loss: model: expected a call in distilling or joint mode before, got none "
            f"(mode {state.config.mode!r}). Configure mode='distilling', call the model, then take "
            "the loss once."
        )
    device = losses[min(losses)].device
    return torch.stack([loss.to(device) for _, loss in sorted(losses.items())]).sum()


def state_of(model: nn.Module, function: str) -> State:
    """The state of attached gates; ValueError without."""
    state = getattr(_base(model), STATE, None)
    if state is None:
        raise ValueError(
            f"seer::{function}: model: expected a model with gates, got one without. Call attach "
            "or load_gates first."
        )
    return state


def _register() -> None:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "seer::attach: transformers: expected transformers 4.56 or newer, got "
            f"{error}. pip install 'seer_cuda[hf]'"
        ) from error
    from seer_cuda.integrations.transformers._attention import register

    register()


def _base(model: nn.Module) -> nn.Module:
    """The decoder inside a model: what has layers and a rotary embedding."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and hasattr(module, "rotary_emb"):
            return module
    raise ValueError(
        f"seer::attach: model: expected a transformers model of {', '.join(FAMILIES)}, got "
        f"{type(model).__name__} without layers and rotary_emb. Pass the model itself."
    )


def _check(base: nn.Module) -> None:
    config = base.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"seer::attach: model: expected model_type {', '.join(FAMILIES)}, got "
            f"{config.model_type!r}. Use AttnGate and sparse_prefill in the model's own code."
        )
    if base.rotary_emb.rope_type in _MOVING_ROPE:
        raise ValueError(
            "seer::attach: rope_type: expected frequencies that do not depend on the length, got "
            f"{base.rotary_emb.rope_type!r}. Use yarn, llama3, linear or the default."
        )
    for index, layer in enumerate(base.layers):
        module = layer.self_attn
        if not (getattr(base.config, "is_causal", True) and getattr(module, "is_causal", True)):
            raise ValueError(
                f"seer::attach: layers.{index}: expected causal attention, got is_causal=False. "
                "Gates learn the causal triangle: use a causal model."
            )
        if getattr(module, "sliding_window", None) is not None:
            raise ValueError(
                f"seer::attach: layers.{index}: expected full attention, got a sliding window of "
                f"{module.sliding_window}. Set use_sliding_window=False."
            )
        if layer.input_layernorm.weight.is_meta:
            raise ValueError(
                f"seer::attach: layers.{index}: expected weights on a device, got meta tensors "
                "(offloaded, or not loaded yet). Load the model with a device_map that offloads "
                "nothing."
            )
        if 2 * base.rotary_emb.inv_freq.shape[0] != module.head_dim:
            raise ValueError(
                f"seer::attach: rotary_emb: expected head_dim = {module.head_dim} rotated channels"
                f", got {2 * base.rotary_emb.inv_freq.shape[0]}. Partial RoPE is not supported."
            )


def _enter(model: nn.Module, state: State) -> None:
    """Sets the model up for the mode of its configuration."""
    from seer_cuda.integrations.transformers._attention import NAME

    state.forget()
    mode = state.config.mode
    _use(state.base, state.implementation if mode == "dense" else NAME)
    if mode != "distilling":
        _thaw(state)
    elif not state.frozen:
        own = {id(weight) for weight in gate_parameters(model)}
        state.frozen = [
            weight
            for weight in model.parameters()
            if weight.requires_grad and id(weight) not in own
        ]
        for weight in state.frozen:
            weight.requires_grad_(False)


def _thaw(state: State) -> None:
    for weight in state.frozen:
        weight.requires_grad_(True)
    state.frozen = []


def _use(base: nn.Module, implementation: str | None) -> None:
    # The base shares its configuration with the model around it.
    base.set_attn_implementation(implementation)
