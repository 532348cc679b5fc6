# SPDX-License-Identifier: Apache-2.0
"""Gates in files, in the released format of SeerAttention.

A folder with ``config.json`` (the model's configuration and ``seerattn_*`` keys) and the weights,
``model.layers.{i}.self_attn.attn_gate.*``, as ``attn_gate_weights.pth`` or ``.safetensors``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seer_cuda._checkpoint import released_gate_state
from seer_cuda.gate import AttnGate
from seer_cuda.integrations.transformers._attach import (
    attach,
    attached_config,
    detach,
    gates,
    state_of,
)
from seer_cuda.integrations.transformers._config import Mode, SeerConfig

WEIGHTS = {"safetensors": "attn_gate_weights.safetensors", "pth": "attn_gate_weights.pth"}
_KEY = "model.layers.{}.self_attn.attn_gate.{}"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\..*attn_gate\.")
# The names that SeerAttention-R gave to the same projections.
_ALIASES = {f"attngate_linear_{side}.weight": f"mask_linear_{side}.weight" for side in "qk"}


def save_gates(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    format: Literal["safetensors", "pth"] = "safetensors",
) -> Path:
    """Writes the gates of a model and their configuration into a folder.

    Args:
        model: With gates.
        folder: Made if it is not there. Both files are written before either is replaced.
        format: ``"pth"`` is what the reference implementation reads.

    Returns:
        The file of the weights.

    Raises:
        ValueError: unknown format, or no gates.
    """
    if format not in WEIGHTS:
        raise ValueError(
            f"seer::save_gates: format: expected safetensors or pth, got {format!r}. Choose one."
        )
    state, own = state_of(model, "save_gates"), gates(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        _KEY.format(index, name): value.detach().to("cpu").contiguous()
        for index, gate in enumerate(own)
        for name, value in gate.state_dict().items()
    }
    base = state.base.config
    config = json.loads(base.to_json_string(use_diff=False))
    config |= {"base_model": base._name_or_path} | state.config.released(own[0].config.gate_dim)
    save = torch.save
    if format == "safetensors":
        from safetensors.torch import save_file as save
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    _replace(
        {
            folder / WEIGHTS[format]: lambda path: save(weights, path),
            folder / "config.json": lambda path: path.write_text(text),
        }
    )
    # A folder has one set of weights, or a reader could take the old one.
    for other in set(WEIGHTS) - {format}:
        (folder / WEIGHTS[other]).unlink(missing_ok=True)
    return folder / WEIGHTS[format]


def load_gates(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    mode: Mode = "sparse",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Loads gates from a folder in the released format into a model.

    Args:
        model: Without gates, which are then attached as ``config.json`` says, in `mode` and `dtype`
            (see `attach`); or with gates of the same shapes, whose mode and rule stay.
        folder: With ``config.json`` and ``attn_gate_weights.safetensors`` or ``.pth``, which is
            read with ``weights_only``: it cannot run code.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such folder or file.
        KeyError, ValueError: weights that the model's gates lack or do not fit, names the key; or
            a damaged file, names it. The model is then as before.
    """
    folder = Path(folder)
    fresh = attached_config(model) is None
    if fresh:
        path = _existing(folder, ["config.json"])
        attach(model, SeerConfig.from_released(_settings(path), mode), dtype=dtype)
    try:
        _load(gates(model), _read(folder))
    except BaseException:
        if fresh:
            detach(model)
        raise
    # Gate keys that were kept with a KV cache are other weights'.
    state_of(model, "load_gates").forget()
    return model


def _load(own: list[AttnGate], state: dict[str, Tensor]) -> None:
    """All gates or none."""
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, name = _LAYER.search(key), key.rpartition("attn_gate.")[2]
        if layer is not None:
            layers.setdefault(int(layer[1]), {})[_ALIASES.get(name, name)] = value
    for index, gate in enumerate(own):
        found = released_gate_state(layers.get(index, {}), norms=gate.config.qk_norm)
        expected = gate.config.weight_shapes()
        for name, shape in expected.items():
            key = _KEY.format(index, name)
            if name not in found:
                raise KeyError(
                    f"seer::load_gates: {key}: expected a weight of shape {list(shape)}, got none "
                    f"(layers {_range(layers)}, here {sorted(found)}). Use an adapter of this "
                    "model."
                )
            if tuple(found[name].shape) != shape:
                raise ValueError(
                    f"seer::load_gates: {key}: expected shape {list(shape)}, got "
                    f"{list(found[name].shape)}. Use an adapter of this model, or attach gates of "
                    "its shape."
                )
        for name in sorted(set(found) - set(expected)):
            raise KeyError(
                f"seer::load_gates: {_KEY.format(index, name)}: expected only {sorted(expected)}, "
                "got more. Set seerattn_gate_type and seerattn_gate_force_double of this adapter."
            )
    for index in sorted(set(layers) - set(range(len(own)))):
        name = min(layers[index])
        raise KeyError(
            f"seer::load_gates: {_KEY.format(index, name)}: expected {len(own)} layers, got more. "
            "Use an adapter of this model."
        )
    for index, gate in enumerate(own):
        gate.load_released_state_dict(layers[index])


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither UTF-8 nor JSON
        raise _damaged(path, "a JSON object", error) from error
    if not isinstance(found, Mapping):
        raise _damaged(path, "a JSON object", type(found).__name__)
    return found


def _read(folder: Path) -> dict[str, Tensor]:
    path = _existing(folder, list(WEIGHTS.values()))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # pickles and archives break in many ways
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise _damaged(path, "weights by name", reason) from error
    named = isinstance(state, Mapping) and all(isinstance(key, str) for key in state)
    if not (named and all(isinstance(value, Tensor) for value in state.values())):
        raise _damaged(path, "weights by name", type(state).__name__ + " of something else")
    return state


def _damaged(path: Path, expected: str, got: object) -> ValueError:
    return ValueError(
        f"seer::load_gates: {path}: expected {expected}, got: {got}. Download the adapter again, "
        "or save the gates again."
    )


def _existing(folder: Path, names: list[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"seer::load_gates: folder: expected {' or '.join(names)} in {folder}, got neither file. "
        "Download the adapter first (hf download <name> --local-dir <folder>)."
    )


def _replace(files: dict[Path, Callable[[Path], Any]]) -> None:
    """Writes all beside their places, then puts them there: a kill or a full disk while they are
    written leaves the old ones, which belong together."""
    parts = {path: path.with_name(f".{path.name}.part") for path in files}
    try:
        for path, write in files.items():
            write(parts[path])
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _range(layers: dict[int, Any]) -> str:
    return f"{min(layers)} to {max(layers)}" if layers else "none"
