# SPDX-License-Identifier: Apache-2.0
"""Prefill time of whole models: torch's dense attention and gates at 90 % sparsity.

Time does not depend on what weights know, so they are random: this experiment's model, and one of
Llama 3.1 8B's shape, whose gates come from a folder in the released format that is made here from
the published shapes. No logits are made: they are the same work either way.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.experiment.settings import Settings
from bench.experiment.train import build
from bench.peers import fa3
from seer_cuda import Rule
from seer_cuda.integrations import transformers as seer_hf
from seer_cuda.integrations.transformers._attention import attention as seer_attention
from seer_cuda.integrations.transformers._state import NAME

DENSITY = 0.1
LENGTHS = (32768, 131072)
LLAMA = "Llama 3.1 8B's shape"
OURS = "this experiment's model"
_REPEATS = {32768: 3, 131072: 2}


def llama(layers: int = 32) -> nn.Module:
    """The decoder of Llama 3.1 8B's shape with random bf16 weights, on the default device."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
    )
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = scaling | {"rope_theta": 500000.0}
    else:
        config.rope_theta, config.rope_scaling = 500000.0, scaling
    return LlamaModel(config)


def released_adapter(folder: Path, *, layers: int, heads: int, head_dim: int) -> Path:
    """Gates in the released format, from its published shapes alone: no code of this package."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.{layer}.self_attn.attn_gate.mask_linear_k.weight": (
            torch.randn(heads, 3 * head_dim, head_dim, generator=generator) * 0.02
        ).bfloat16()
        for layer in range(layers)
    }
    torch.save(weights, folder / "attn_gate_weights.pth")
    keys = {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct",
        "seerattn_sparsity_method": "nz_ratio",
        "seerattn_nz_ratio": DENSITY,
        "seerattn_gate_type": "Qavg_Kmaxminavg",
        "seerattn_gate_block_size": 64,
        "seerattn_gate_hidden_size": head_dim,
        "seerattn_last_block_dense": False,
        "use_flash_rope": True,
    }
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


class Clock:
    """Time inside attention, by events around each call."""

    def __init__(self) -> None:
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def around(self, function: Callable) -> Callable:
        """The function, timed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = function(*args, **kwargs)
            end.record()
            self.spans.append((start, end))
            return out

        return call

    def read(self) -> float:
        """Milliseconds since the last read."""
        torch.cuda.synchronize()
        spans, self.spans = self.spans, []
        return sum(start.elapsed_time(end) for start, end in spans)


def _sdpa(backend: SDPBackend) -> Callable:
    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        with sdpa_kernel([backend]):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=True
            )
        return out.transpose(1, 2), None

    return attention


def _fa3(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"softmax_scale": scaling, "is_causal": True, "num_splits": 1}
    return torch.ops.flash_attn_3.fwd.default(q, k, v, **options)[0], None


def dense_attentions() -> dict[str, Callable]:
    """What dense attention can run as here."""
    found = {
        "SDPA, FlashAttention-2": _sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA, cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    return found | ({} if fa3.available() else {"FlashAttention-3": _fa3})


@contextmanager
def _registered(function: Callable, name: str) -> Iterator[None]:
    """A function as the attention of a name; "seer" is itself again afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    if name != NAME:
        AttentionMaskInterface.register(name, lambda **kwargs: None)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, seer_attention)


@torch.inference_mode()
def _time(model: nn.Module, ids: Tensor, clock: Clock, repeats: int) -> dict[str, float]:
    """Medians of whole calls; the share of attention from the same calls."""
    whole, inside = [], []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 1):
        clock.read()
        began = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        torch.cuda.synchronize()
        whole.append(1e3 * (time.perf_counter() - began))
        inside.append(clock.read())
    ms, attention = statistics.median(whole[1:]), statistics.median(inside[1:])
    return {
        "ms": round(ms, 2),
        "attention_ms": round(attention, 2),
        "share": round(attention / ms, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def measure(
    name: str, model: nn.Module, adapter: Path | None, lengths: tuple[int, ...], log=print
) -> list[dict[str, Any]]:
    """Rows of one model: every dense attention at the first length, the best one at all, sparse."""
    rows, clock, best = [], Clock(), ""
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = {n: torch.randint(vocabulary, (1, n), generator=generator).cuda() for n in lengths}

    def row(length: int, attention: str) -> None:
        times = _time(model, prompts[length], clock, _REPEATS[length])
        rows.append({"model": name, "tokens": length, "attention": attention} | times)
        log(json.dumps(rows[-1]))

    for length in lengths:
        for attention, function in dense_attentions().items():
            if best and attention != best:
                continue
            with _registered(clock.around(function), "experiment_dense"):
                model.set_attn_implementation("experiment_dense")
                try:
                    row(length, attention)
                except RuntimeError as error:
                    # An attention that does not serve these sizes is left out, and says why.
                    reason = str(error).partition("\n")[0]
                    log(f"{name}: {attention}: left out ({reason})")
        best = min((r["ms"], r["attention"]) for r in rows if r["tokens"] == lengths[0])[1]
    if adapter is None:
        seer_hf.attach(model)
    else:
        seer_hf.load_gates(model, adapter)
    seer_hf.configure(model, rule=Rule("density", DENSITY, local=1))
    kept: list[Tensor] = []
    seer_hf.observe(model, lambda layer, mask: kept.append(mask.density().mean()))
    with _registered(clock.around(seer_attention), NAME):
        for length in lengths:
            kept.clear()
            row(length, "gates")
            rows[-1]["kept"] = round(torch.stack(kept).mean().item(), 4)
    return rows


def run(folder: Path, settings: Settings, log=print) -> list[dict[str, Any]]:
    """Times both models and writes ``prefill.json``; a model that is done is not timed again."""
    path = folder / "prefill.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    before = torch.get_default_dtype()
    for name in (LLAMA, OURS):
        if any(row["model"] == name for row in rows):
            continue
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"), torch.no_grad():
                model = llama() if name == LLAMA else build(settings, settings.vocabulary).model
        finally:
            torch.set_default_dtype(before)
        adapter = None
        if name == LLAMA:
            sizes = {"layers": 32, "heads": 32, "head_dim": 128}
            adapter = released_adapter(folder / "adapter", **sizes)
        rows += measure(name, model.eval(), adapter, LENGTHS, log)
        path.write_text(json.dumps(rows, indent=1))
        del model
        torch.cuda.empty_cache()
    return rows
