# SPDX-License-Identifier: Apache-2.0
"""``python -m seer_cuda distill`` and ``eval``: gates of a local model, trained and judged."""

from __future__ import annotations

import csv
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seer_cuda.integrations.transformers._attach import (
    attach,
    configure,
    gate_loss,
    gate_parameters,
    gates,
    observe,
)
from seer_cuda.integrations.transformers._config import SeerConfig
from seer_cuda.integrations.transformers._corpus import Corpus, RunError, load
from seer_cuda.integrations.transformers._files import load_gates, save_gates
from seer_cuda.select import Rule

CHECKPOINT, LOG = "checkpoint.pt", "log.csv"
_COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "seconds")
# What a run that goes on may not change: it would be another run.
_FIXED = ("model", "text", "context", "batch", "accumulate", "steps", "lr", "warm_up", "seed")


@dataclass(frozen=True)
class Distill:
    """Options of a training run; those of the reference's recipe are lr, warm_up and the loss."""

    model: str
    text: str
    out: str
    context: int = 8192
    batch: int = 1
    accumulate: int = 16
    steps: int = 500
    lr: float = 1e-3
    warm_up: int = 20
    seed: int = 0
    save_every: int = 25
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("context", "batch", "accumulate", "steps", "save_every"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise RunError(f"--{option}: expected at least 1, got {getattr(self, name)}.")


def learning_rate(step: int, options: Distill) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    rise = min(1.0, (step + 1) / max(1, options.warm_up))
    return options.lr * rise * 0.5 * (1 + math.cos(math.pi * step / options.steps))


def distill(options: Distill) -> Path:
    """Trains gates for a local model and saves them into ``options.out``.

    A run that was killed goes on from its last checkpoint when it is started again, and ends with
    the very gates and log that it would have had: a checkpoint holds weights, optimiser and step,
    is replaced as a whole, and the data follow from seed and step.

    Returns:
        The file of the weights.

    Raises:
        RunError: options that cannot be used, or that differ from those of the run in the folder.
    """
    if Path(options.out).resolve() == Path(options.model).resolve():
        raise RunError(
            f"--out: expected another folder than --model, whose config.json gates would replace, "
            f"got {options.out}."
        )
    model, tokenizer = open_model(options.model, options.device)
    corpus = load(Path(options.text), tokenizer)
    attach(model, SeerConfig("distilling"), dtype=torch.float32)
    torch.manual_seed(options.seed)
    for gate in gates(model):
        for module in gate.children():
            module.reset_parameters()
    weights = list(gate_parameters(model))
    optimiser = torch.optim.AdamW(weights, lr=options.lr, weight_decay=0.0)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    fixed = _fixed(options) | {"tokens": corpus.digest()}
    begin = _resume(folder, fixed, model, optimiser)
    device = weights[0].device
    model.train()
    log = _Log(folder / LOG, begin)
    began = time.monotonic() - log.seconds
    try:
        for step in range(begin, options.steps):
            loss = _step(model, corpus, options, step, device)
            norm = nn.utils.clip_grad_norm_(weights, 1.0).item()
            _check_finite("gradient", norm, step)
            rate = learning_rate(step, options)
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
            done, seconds = step + 1, time.monotonic() - began
            tokens = done * options.accumulate * options.batch * options.context
            log.row(done, f"{loss:.6g}", f"{rate:.6g}", f"{norm:.6g}", tokens, f"{seconds:.1f}")
            left = seconds / done * (options.steps - done)
            print(f"step {done}/{options.steps}  loss {loss:.5f}  {left:.0f} s left", flush=True)
            if done % options.save_every == 0 or done == options.steps:
                _save(folder, fixed, model, optimiser, done)
    finally:
        log.close()
    configure(model, mode="sparse")
    return save_gates(model, folder)


def _step(
    model: nn.Module, corpus: Corpus, options: Distill, step: int, device: torch.device
) -> float:
    """Gradients of one step; its mean loss, read once."""
    count = options.batch * options.accumulate
    windows = corpus.sample(count, options.context, options.seed, step).to(device)
    total = torch.zeros((), device=device)
    for part in windows.split(options.batch):
        # The head is of no use here: its logits of all tokens would be the largest tensor.
        model(part, use_cache=False, logits_to_keep=1)
        loss = gate_loss(model) / options.accumulate
        loss.backward()
        total += loss.detach()
    value = total.item()
    _check_finite("loss", value, step)
    return value


def _check_finite(name: str, value: float, step: int) -> None:
    # A loss can be finite where its gradient is not; the weights would then be in a checkpoint.
    if not math.isfinite(value):
        raise RunError(
            f"--lr: expected a finite {name}, got {value} in step {step + 1}. The last checkpoint "
            "is good; lower --lr in a new folder."
        )


def _save(
    folder: Path,
    fixed: dict[str, Any],
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
) -> None:
    state = {
        "step": step,
        "options": fixed,
        "gates": [gate.state_dict() for gate in gates(model)],
        "optimiser": optimiser.state_dict(),
    }
    part = folder / f".{CHECKPOINT}.part"
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / CHECKPOINT)


def _resume(
    folder: Path, fixed: dict[str, Any], model: nn.Module, optimiser: torch.optim.Optimizer
) -> int:
    """Steps done by the run in the folder; 0 for a new one."""
    if not (folder / CHECKPOINT).is_file():
        return 0
    state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    for name, value in fixed.items():
        if name == "tokens" and state["options"][name] != value:
            raise RunError(
                f"--text: expected the tokens that the run in {folder} began with, got others. Put "
                "text and tokenizer back, or use another --out for another run."
            )
        if state["options"][name] != value:
            raise RunError(
                f"--{name.replace('_', '-')}: expected {state['options'][name]}, as the run in "
                f"{folder} has, got {value}. Use another --out for another run."
            )
    for gate, weights in zip(gates(model), state["gates"], strict=True):
        gate.load_state_dict(weights)
    optimiser.load_state_dict(state["optimiser"])
    print(f"going on after step {state['step']} of {folder / CHECKPOINT}", flush=True)
    return state["step"]


def _fixed(options: Distill) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name in _FIXED}


class _Log:
    def __init__(self, path: Path, begin: int) -> None:
        # Rows after the checkpoint belong to steps that are done again.
        rows = list(csv.reader(path.open(newline=""))) if begin and path.is_file() else []
        rows = [row for row in rows[1:] if len(row) == len(_COLUMNS) and int(row[0]) <= begin]
        # Whole before it takes the old one's place: a first step may last minutes.
        part = path.with_name(f".{path.name}.part")
        with part.open("w", newline="") as file:
            csv.writer(file).writerows([_COLUMNS, *rows])
        part.replace(path)
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file)
        self.seconds = float(rows[-1][-1]) if rows else 0.0

    def row(self, *values: object) -> None:
        self._writer.writerow(values)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Judged:
    """Held-out perplexities, and the kept share of the visible blocks."""

    dense: float
    sparse: float
    density: float


def evaluate(
    model_folder: str,
    gates_folder: str,
    text: str,
    *,
    context: int = 8192,
    windows: int = 8,
    rule: Rule | None = None,
    device: str = "auto",
) -> Judged:
    """Perplexity on the held-out part of a text, dense and sparse, with gates from a folder.

    Raises:
        RunError: options that cannot be used.
    """
    if context < 2 or windows < 1:
        raise RunError("--context, --windows: expected at least 2 tokens and 1 window, got less.")
    model, tokenizer = open_model(model_folder, device)
    tokens = load(Path(text), tokenizer).evaluation(windows, context)
    load_gates(model, gates_folder)
    configure(model, rule=rule)
    densities: list[Tensor] = []
    observe(model, lambda layer, mask: densities.append(mask.density().mean()))
    sparse = _perplexity(model, tokens)
    observe(model, None)
    configure(model, mode="dense")
    dense = _perplexity(model, tokens)
    density = torch.stack([value.cpu() for value in densities]).mean().item()
    return Judged(dense, sparse, density)


@torch.inference_mode()
def _perplexity(model: nn.Module, tokens: Tensor) -> float:
    head, total = model.get_output_embeddings(), 0.0
    for window in tokens:
        ids = window[None].to(head.weight.device)
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[0, :-1]
        # Logits of all tokens at once take gigabytes.
        for rows, targets in zip(hidden.split(1024), ids[0, 1:].split(1024), strict=True):
            loss = nn.functional.cross_entropy(head(rows).float(), targets, reduction="sum")
            total += loss.item()
    mean = total / (tokens.shape[0] * (tokens.shape[1] - 1))
    return torch.tensor(mean, dtype=torch.float64).exp().item()  # inf where math.exp raises


def open_model(folder: str, device: str) -> tuple[Any, Any]:
    """A local model, bf16 on a GPU, and its tokenizer."""
    if not Path(folder, "config.json").is_file():
        raise RunError(
            f"--model: expected a folder with a transformers model, got {folder}. Download one "
            "first (hf download <name> --local-dir <folder>)."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device: expected auto or cpu, got cuda, which torch does not find.")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    dtype = {name: torch.bfloat16 if device == "cuda" else torch.float32}
    load_model = transformers.AutoModelForCausalLM.from_pretrained
    load_tokenizer = transformers.AutoTokenizer.from_pretrained
    try:
        model = load_model(folder, local_files_only=True, **dtype)
        tokenizer = load_tokenizer(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(
            f"--model: expected a model and its tokenizer in {folder}, got: {reason}"
        ) from error
    return model.to(device).eval(), tokenizer
