# SPDX-License-Identifier: Apache-2.0
"""A Llama of transformers, trained from scratch: short windows first, long ones last.

The schedule follows the clock, not the steps: a run lasts `--minutes`, whatever the machine. All
phases have the same number of tokens in a step, laid out as one sequence whose windows only
attention knows. So what torch.compile makes serves every length, and is made once.
"""

from __future__ import annotations

import csv
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.experiment.settings import Settings

ATTENTION = "experiment_windows"
_COLUMNS = ("step", "seconds", "context", "tokens", "loss", "lr", "grad_norm")
_SAVE_SECONDS = 60.0
_WARM_UP, _LAST_RATE = 0.02, 0.05  # shares of the time, of the rate
_HEAD_ROWS = 16384  # logits at a time


def build(settings: Settings, vocabulary: int) -> nn.Module:
    """The model with random weights, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads_q, heads_kv = settings.heads
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads_q,
        num_key_value_heads=heads_kv,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.context,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    # The key of RoPE's base has another place before and after transformers 5.
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = {"rope_type": "default", "rope_theta": settings.theta}
    else:
        config.rope_theta = settings.theta
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class _Windows:
    """Length of the windows in the row that is under way."""

    length = 0


@torch.compiler.disable
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside windows of one long row, for transformers' attention interface.

    query ``[1, heads_q, tokens, head_dim]`` to ``[1, tokens, heads_q, head_dim]``. Not compiled:
    the windows' length would compile everything around it anew.
    """
    split = (-1, _Windows.length)
    q, k, v = (x[0].unflatten(1, split).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)[None], None


def register() -> None:
    """Makes ``attn_implementation=ATTENTION`` known; it needs no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, lambda **kwargs: None)


class Trainer:
    """Model, optimiser and the compiled parts of a step."""

    def __init__(self, settings: Settings, vocabulary: int, device: str) -> None:
        self.settings, self.device = settings, device
        self.model = build(settings, vocabulary).to(device)
        register()
        self.model.set_attn_implementation(ATTENTION)
        matrices = [weight for weight in self.model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in self.model.parameters() if weight.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ]
        cuda = device == "cuda"
        self.optimiser = torch.optim.AdamW(groups, settings.lr, (0.9, 0.95), fused=cuda)
        self.head_loss = _head_loss
        if settings.compile:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
            self.head_loss = torch.compile(_head_loss, dynamic=False)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean nats per token of ``[count, context + 1]`` tokens."""
        count, context = windows.shape[0], windows.shape[1] - 1
        _Windows.length = context
        ids, targets = windows[:, :-1].reshape(1, -1), windows[:, 1:].reshape(-1)
        positions = torch.arange(context, device=ids.device).repeat(1, count)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            x = self.model.model.embed_tokens(ids)
            # A residual stream in bf16, as the model will have where it is used.
            x = x.bfloat16() if self.device == "cuda" else x
            x = self.model.model(inputs_embeds=x, position_ids=positions, use_cache=False)
            x, weight = x.last_hidden_state[0], self.model.lm_head.weight
            parts = zip(x.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True)
            total = sum(self.head_loss(rows, weight, wanted) for rows, wanted in parts)
        return total / targets.numel()

    def step(self, windows: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One step; loss and gradient norm stay on the device."""
        loss = self.loss(windows)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach(), norm


def _head_loss(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, weight).float(), targets, reduction="sum")


def rate_at(done: float, lr: float) -> float:
    """Learning rate after a share of the time: warm-up, half a cosine down to a twentieth."""
    rise = min(1.0, done / _WARM_UP)
    fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return lr * rise * (_LAST_RATE + (1 - _LAST_RATE) * fall)


def context_at(done: float, phases: tuple[tuple[int, float], ...]) -> int:
    """Length of the windows after a share of the time."""
    for context, share in phases:
        if done < share:
            return context
        done -= share
    return phases[-1][0]


def draw(stream: np.ndarray, count: int, length: int, step: int) -> Tensor:
    """int64 ``[count, length]`` windows, which follow from the step alone."""
    starts = np.random.default_rng((0, step)).integers(0, stream.size - length + 1, count)
    return torch.from_numpy(np.stack([stream[at : at + length] for at in starts]).astype(np.int64))


def run(folder: Path, settings: Settings, device: str, log=print) -> Path:
    """Trains until the time is over; a run that was killed goes on from its last checkpoint.

    Returns:
        The folder of the model (bf16 on a GPU) with its tokenizer.
    """
    from transformers import AutoTokenizer

    out, checkpoint = folder / "model", folder / "train" / "checkpoint.pt"
    if (out / "config.json").is_file():
        return out
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    stream = np.load(folder / "train.npy")
    trainer = Trainer(settings, len(tokenizer), device)
    step, seconds, tokens = 0, 0.0, 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        trainer.model.load_state_dict(state["model"])
        trainer.optimiser.load_state_dict(state["optimiser"])
        step, seconds, tokens = state["step"], state["seconds"], state["tokens"]
        log(f"going on after step {step}, {seconds:.0f} s")
    file = _log_until(checkpoint.parent / "log.csv", step).open("a", newline="")
    writer = csv.writer(file)
    began, budget, saved = time.monotonic() - seconds, 60 * settings.minutes, seconds
    while seconds < budget:
        done = seconds / budget
        context, rate = context_at(done, settings.phases), rate_at(done, settings.lr)
        batch = draw(stream, max(1, settings.step_tokens // context), context + 1, step)
        loss, norm = trainer.step(batch.to(device), rate)
        step, tokens = step + 1, tokens + batch.shape[0] * context
        if step % 20 == 0 or step == 1 or time.monotonic() - began >= budget:
            row = (context, tokens, f"{loss.item():.4f}", f"{rate:.3g}", f"{norm.item():.3g}")
            seconds = time.monotonic() - began
            writer.writerow((step, f"{seconds:.1f}", *row))
            file.flush()
        if step % 200 == 0:
            log(f"train {seconds:.0f}/{budget:.0f} s  step {step}  {context}  loss {loss:.4f}")
        elif device == "cuda":
            # The clock is the device's: a step more is queued behind this one, no more.
            torch.cuda.current_stream().synchronize()
        seconds = time.monotonic() - began
        if seconds - saved > _SAVE_SECONDS:
            _save(checkpoint, trainer, step, seconds, tokens)
            saved = seconds
    file.close()
    _save(checkpoint, trainer, step, seconds, tokens)
    model = trainer.model.to(torch.bfloat16 if device == "cuda" else torch.float32)
    model.set_attn_implementation("sdpa")
    # In place as a whole: its config.json says that training is over.
    part = folder / ".model.part"
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)
    part.replace(out)
    log(f"trained {step} steps, {tokens / 1e6:.1f} M tokens in {seconds:.0f} s")
    return out


def _log_until(path: Path, step: int) -> Path:
    """The log without the rows after the checkpoint, whose steps are done again."""
    rows = list(csv.reader(path.open(newline=""))) if step and path.is_file() else []
    rows = [row for row in rows[1:] if len(row) == len(_COLUMNS) and int(row[0]) <= step]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([_COLUMNS, *rows])
    return path


def _save(path: Path, trainer: Trainer, step: int, seconds: float, tokens: int) -> None:
    part = path.with_suffix(".part")
    state = {
        "model": trainer.model.state_dict(),
        "optimiser": trainer.optimiser.state_dict(),
        "step": step,
        "seconds": seconds,
        "tokens": tokens,
    }
    torch.save(state, part)
    part.replace(path)
