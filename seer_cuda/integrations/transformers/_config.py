# SPDX-License-Identifier: Apache-2.0
"""`SeerConfig`: what is attached to a model, and its keys in a released ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from seer_cuda._gate_config import GATE_NAMES, GateConfig, is_whole
from seer_cuda.select import Rule, check_rule

Mode = Literal["dense", "distilling", "joint", "sparse"]
MODES: tuple[str, ...] = get_args(Mode)
#: Modes whose prompts are dense and give gates their loss.
LEARNING = ("distilling", "joint")

_BLOCKS = (16, 32, 64, 128)

# Methods of `Rule` by their names in seerattn_sparsity_method, and the key of their value. The
# first two are the reference's.
_METHODS = {
    "threshold": ("threshold", "seerattn_threshold"),
    "nz_ratio": ("density", "seerattn_nz_ratio"),
    "topk": ("topk", "seerattn_topk"),
    "topp": ("topp", "seerattn_topp"),
}
_DEFAULT_VALUES = {"seerattn_threshold": 0.0, "seerattn_nz_ratio": 1.0}
_LAST_ROWS = 2  # what seerattn_last_block_dense means
_RULE = Rule(dense_last_rows=_LAST_ROWS)


@dataclass(frozen=True)
class SeerConfig:
    """Gates of a model and how its prompts are computed.

    Attributes:
        mode: ``"sparse"``: prompts attend to the blocks that the gates keep. ``"distilling"``:
            dense attention, whose map the gates learn (`gate_loss`); the model is frozen.
            ``"joint"``: the same with a model that trains too. ``"dense"``: the model as it was.
        rule: How a row of blocks chooses (sparse).
        gate: Pooling, one of `seer_cuda.gate.GATE_NAMES`.
        gate_dim: Channels of the gate. Default: the model's head_dim.
        block: Tokens per block: 64 or 128, on the CPU also 16 or 32.
        force_double: Project q even where the single-linear mode is possible.
        qk_norm: Norms in the gate; no released prefill gate has them.

    Raises:
        ValueError: a field outside its contract.
        TypeError: rule is not a `Rule`.
    """

    mode: Mode = "sparse"
    rule: Rule = _RULE
    gate: str = "Qavg_Kmaxminavg"
    gate_dim: int | None = None
    block: int = 64
    force_double: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        check_mode("SeerConfig", self.mode)
        check_rule("SeerConfig", "rule", self.rule)
        if self.gate not in GATE_NAMES:
            raise ValueError(
                "seer::SeerConfig: gate: expected one of seer_cuda.gate.GATE_NAMES, got "
                f"{self.gate!r}. Use Qavg_Kmaxminavg."
            )
        if self.gate_dim is not None and not (is_whole(self.gate_dim) and self.gate_dim >= 1):
            raise ValueError(
                "seer::SeerConfig: gate_dim: expected a whole number of at least 1, got "
                f"{self.gate_dim!r}. Leave it out for the model's head_dim."
            )
        if not is_whole(self.block) or self.block not in _BLOCKS:
            raise ValueError(
                f"seer::SeerConfig: block: expected one of {', '.join(map(str, _BLOCKS))}, got "
                f"{self.block!r}. Use 64."
            )

    def gate_config(
        self, heads_q: int, heads_kv: int, head_dim: int, attention_scaling: float
    ) -> GateConfig:
        """The gate of one layer of a model with these sizes."""
        return GateConfig(
            heads_q,
            heads_kv,
            head_dim,
            name=self.gate,
            gate_dim=head_dim if self.gate_dim is None else self.gate_dim,
            block=self.block,
            force_double=self.force_double,
            rotary_dim=head_dim,
            attention_scaling=attention_scaling,
            qk_norm=self.qk_norm,
        )

    def released(self, gate_dim: int) -> dict[str, Any]:
        """The keys of this config in a released ``config.json``; gate_dim as it came out."""
        names = {method: (name, key) for name, (method, key) in _METHODS.items()}
        name, key = names[self.rule.method]
        return {
            "seerattn_sparsity_method": name,
            key: self.rule.value,
            "seerattn_gate_type": self.gate,
            "seerattn_gate_block_size": self.block,
            "seerattn_gate_hidden_size": gate_dim,
            "seerattn_gate_force_double": self.force_double,
            "seerattn_last_block_dense": self.rule.dense_last_rows > 0,
            # Ours: what the reference has no key for.
            "seerattn_dense_last_rows": self.rule.dense_last_rows,
            "seerattn_sink_blocks": self.rule.sink,
            "seerattn_local_blocks": self.rule.local,
            "seerattn_use_qk_norm": self.qk_norm,
        }

    @classmethod
    def from_released(cls, keys: Mapping[str, Any], mode: Mode = "sparse") -> SeerConfig:
        """Reads a released ``config.json``; keys that are missing have the reference's defaults.

        Raises:
            ValueError: a key of a decode adapter, or a value outside its contract; names the key.
        """
        method = _typed(keys, "seerattn_sparsity_method", "threshold")
        if method == "token_budget" or "seerattn_k_seq_pooling_type" in keys:
            raise ValueError(
                "seer::load_gates: config.json: expected a prefill adapter (seerattn_gate_type), "
                "got a decode adapter of SeerAttention-R. Use a prefill adapter."
            )
        if method not in _METHODS:
            raise ValueError(
                f"seer::load_gates: seerattn_sparsity_method: expected one of "
                f"{', '.join(_METHODS)}, got {method!r}. Correct config.json."
            )
        method, key = _METHODS[method]
        value = keys.get(key, _DEFAULT_VALUES.get(key))
        last = _LAST_ROWS if _typed(keys, "seerattn_last_block_dense", True) else 0
        forced = {
            "sink": _typed(keys, "seerattn_sink_blocks", 0),
            "local": _typed(keys, "seerattn_local_blocks", 0),
            "dense_last_rows": _typed(keys, "seerattn_dense_last_rows", last),
        }
        try:
            rule = Rule(method, value, **forced)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"seer::load_gates: {key}: expected a value of seerattn_sparsity_method, got "
                f"{value!r} ({error}). Correct config.json."
            ) from error
        return cls(
            mode=mode,
            rule=rule,
            gate=_typed(keys, "seerattn_gate_type", cls.gate),
            gate_dim=_typed(keys, "seerattn_gate_hidden_size", 128),
            block=_typed(keys, "seerattn_gate_block_size", 64),
            force_double=_typed(keys, "seerattn_gate_force_double", False),
            qk_norm=_typed(keys, "seerattn_use_qk_norm", False),
        )


def _typed(keys: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a key; ValueError unless it has the type of its default."""
    value = keys.get(key, default)
    if type(value) is not type(default):
        raise ValueError(
            f"seer::load_gates: {key}: expected {type(default).__name__}, got {value!r}. Correct "
            "config.json."
        )
    return value


def check_mode(function: str, mode: str) -> None:
    """ValueError unless mode is one of `MODES`."""
    if mode not in MODES:
        raise ValueError(
            f"seer::{function}: mode: expected one of {', '.join(MODES)}, got {mode!r}. Choose one."
        )
