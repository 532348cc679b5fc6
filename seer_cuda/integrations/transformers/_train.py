# SPDX-License-Identifier: Apache-2.0
"""``python -m seer_cuda distill`` and ``eval``: gates of a local model, trained and judged."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seer_cuda.distill import LOSS_SCALE
from seer_cuda.integrations.transformers import _checkpoint as checkpoint
from seer_cuda.integrations.transformers._attach import (
    attach,
    configure,
    detach,
    gate_loss,
    gate_parameters,
    gates,
    observe,
)
from seer_cuda.integrations.transformers._config import SeerConfig
from seer_cuda.integrations.transformers._corpus import Corpus, RunError, load, option
from seer_cuda.integrations.transformers._files import WEIGHTS, load_gates, save_gates
from seer_cuda.integrations.transformers._lm import keep_less, lm_loss, save_model
from seer_cuda.integrations.transformers._log import Log, check_tensorboard
from seer_cuda.integrations.transformers._options import Distill, schedule
from seer_cuda.integrations.transformers._ranks import Ranks, joined
from seer_cuda.integrations.transformers._windows import KeptWindows
from seer_cuda.select import Rule

LOG, MODEL = "log.csv", "model"
# What a run that goes on may change; with anything else it would be another run.
_FREE = ("out", "save_every", "device", "checkpointing", "tensorboard")


def distill(options: Distill) -> Path:
    """Trains gates for a local model and saves them into ``options.out``.

    With train_all the model trains too, in fp32 (under bf16 autocast on a GPU), and is saved into
    the folder ``model`` beside the gates, in the dtype that it had. Started by torchrun, processes
    share the batches of a step.

    A run that was killed goes on from its last checkpoint when it is started again, and ends with
    the very weights and log that it would have had: a checkpoint holds weights, optimiser and step,
    is replaced as a whole, and the data follow from seed and step. It is so up to rounding where
    another number of processes goes on, which adds up in another order, and with train_all on a
    GPU, where torch's backward of dense attention adds up in any order.

    Returns:
        The file of the gates' weights.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
        RunError: options that cannot be used, or that differ from those of the run in the folder.
    """
    folder = Path(options.out)
    for place in (folder, folder / MODEL) if options.train_all else (folder,):
        if place.resolve() == Path(options.model).resolve():
            raise RunError(
                f"--out: expected another folder than --model, whose files {place} would replace, "
                f"got {options.out}."
            )
    if options.tensorboard is not None:
        check_tensorboard()
    with joined(options.device) as ranks:
        return _run(options, folder, ranks)


def _run(options: Distill, folder: Path, ranks: Ranks) -> Path:
    if options.accumulate % ranks.count:
        raise RunError(
            f"--accumulate: expected a multiple of the {ranks.count} processes, got "
            f"{options.accumulate}. Each takes its share of a step's batches."
        )
    dtype = torch.float32 if options.train_all else None
    if options.cache and ranks.count > 1:
        raise RunError(
            f"--cache: expected one process with it, got {ranks.count}. Start without torchrun: a "
            "step takes little time then."
        )
    model, tokenizer = open_model(options.model, options.device, dtype)
    corpus = load(Path(options.text), tokenizer)
    own = dict(model.named_parameters()) if options.train_all else {}
    _put_gates(model, options)
    trained = [list(gate_parameters(model)), list(own.values())]
    weights = [weight for group in trained for weight in group]
    groups = zip(trained, options.peaks.values(), strict=False)
    optimiser = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in groups], weight_decay=0.0
    )
    folder.mkdir(parents=True, exist_ok=True)
    fixed = {name: value for name, value in asdict(options).items() if name not in _FREE}
    fixed["tokens"] = corpus.digest()
    begin = checkpoint.resume(folder, fixed, model, own, optimiser)
    if begin and ranks.first:
        print(f"going on after step {begin} of {folder / checkpoint.FILE}", flush=True)
    model.train()
    if options.checkpointing:
        keep_less(model)
    parts = ("lm_loss", "gate_loss") if options.train_all else ()
    columns = ("step", "loss", *parts, *options.peaks, "grad_norm", "tokens", "seconds")
    log = None
    if ranks.first:
        log = Log(folder / LOG, columns, begin, options.steps, options.tensorboard)
    began = time.monotonic() - (log.seconds if log else 0.0)
    try:
        kept = None
        if options.cache and begin < options.steps:
            kept = _keep_windows(model, corpus, options)
        for step in range(begin, options.steps):
            losses = _step(model, corpus, options, step, weights, ranks, kept)
            norm = nn.utils.clip_grad_norm_(weights, 1.0).item()
            _check_finite("gradient", norm, step, options)
            rates = {name: rate * schedule(step, options) for name, rate in options.peaks.items()}
            for group, rate in zip(optimiser.param_groups, rates.values(), strict=True):
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
            done, seconds = step + 1, time.monotonic() - began
            tokens = done * options.accumulate * options.batch * options.context
            last = {"grad_norm": norm, "tokens": tokens, "seconds": seconds}
            if log is not None:
                log.row({"step": done, **losses, **rates, **last})
            if done % options.save_every and done != options.steps:
                continue
            # A step can overflow weights whose gradient was finite. Every process sees it.
            largest = torch.stack([weight.detach().abs().amax() for weight in weights]).amax()
            _check_finite("weight", largest.item(), step, options)
            if ranks.first:
                checkpoint.save(folder, fixed, model, own, optimiser, done)
    finally:
        if log is not None:
            log.close()
    return _finish(model, tokenizer, options, folder, ranks)


def _put_gates(model: nn.Module, options: Distill) -> None:
    """Gates in fp32, from a folder or with the seed's weights."""
    mode = "joint" if options.train_all else "distilling"
    if options.gates is not None:
        try:
            load_gates(model, options.gates, mode=mode, dtype=torch.float32)
        except (FileNotFoundError, KeyError, ValueError) as error:
            reason = error.args[0] if isinstance(error, KeyError) else error
            raise RunError(f"--gates: expected gates of this model, got: {reason}") from error
        return
    try:
        config = SeerConfig(mode, gate=options.gate, gate_dim=options.gate_dim)
        attach(model, config, dtype=torch.float32)
    except ValueError as error:
        raise RunError(f"--gate, --gate-dim: {error}") from error
    torch.manual_seed(options.seed)
    for gate in gates(model):
        for module in gate.children():
            module.reset_parameters()


def _step(
    model: nn.Module,
    corpus: Corpus,
    options: Distill,
    step: int,
    weights: list[nn.Parameter],
    ranks: Ranks,
    kept: KeptWindows | None,
) -> dict[str, float]:
    """Gradients of one step; its mean losses, read once."""
    count = options.batch * options.accumulate
    if kept is None:
        device = weights[0].device
        windows = corpus.sample(count, options.context, options.seed, step).to(device)
    else:
        windows = kept.order(count, options.seed, step)
    totals: dict[str, Tensor] = {}
    for part in ranks.own(windows.split(options.batch)):
        losses = _losses(model, part, options) if kept is None else {"loss": kept.loss(part)}
        (losses["loss"] / options.accumulate).backward()
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach() / options.accumulate
    ranks.add_up([weight.grad for weight in weights if weight.grad is not None])
    ranks.add_up(totals.values())
    values = {name: total.item() for name, total in totals.items()}
    _check_finite("loss", values["loss"], step, options)
    return values


def _keep_windows(model: nn.Module, corpus: Corpus, options: Distill) -> KeptWindows:
    """The windows of a run that draws from some: the same whenever it goes on."""
    print(f"{options.cache} windows go through the model once", flush=True)
    each = range(options.cache)
    windows = (corpus.sample(1, options.context, options.seed, at) for at in each)
    return KeptWindows(model, windows, options.cache)


def _losses(model: nn.Module, ids: Tensor, options: Distill) -> dict[str, Tensor]:
    """What a step goes down, and its parts if it has two."""
    if not options.train_all:
        # The head is of no use here: its logits of all tokens would be the largest tensor.
        model(ids, use_cache=False, logits_to_keep=1)
        return {"loss": gate_loss(model)}
    # Weights in bf16 would lose steps of this size to rounding; products need no more than bf16.
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        model_loss = lm_loss(model, ids)
    own = gate_loss(model) * (options.gate_scale / LOSS_SCALE)
    return {"loss": model_loss + own, "lm_loss": model_loss, "gate_loss": own}


def _check_finite(name: str, value: float, step: int, options: Distill) -> None:
    # A loss can be finite where its gradient is not; the weights would then be in a checkpoint.
    if not math.isfinite(value):
        rates = " or ".join(map(option, options.peaks))
        raise RunError(
            f"{rates}: expected a finite {name}, got {value} in step {step + 1}. The last "
            f"checkpoint is good; lower {rates} in a new folder."
        )


def _finish(model: nn.Module, tokenizer: Any, options: Distill, folder: Path, ranks: Ranks) -> Path:
    """Saves what was trained; the file of the gates."""
    configure(model, mode="sparse")
    if options.train_all:
        # The gates belong to the model as it is now.
        model.config._name_or_path = str(folder / MODEL)
    if not ranks.first:
        return folder / WEIGHTS["safetensors"]
    path = save_gates(model, folder)
    if options.train_all:
        save_model(detach(model), tokenizer, options.model, folder / MODEL)
    return path


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


def open_model(folder: str, device: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A local model and its tokenizer; dtype: by default bf16 on a GPU, fp32 on the CPU."""
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
    default = torch.bfloat16 if device == "cuda" else torch.float32
    load_model = transformers.AutoModelForCausalLM.from_pretrained
    load_tokenizer = transformers.AutoTokenizer.from_pretrained
    try:
        model = load_model(folder, local_files_only=True, **{name: dtype or default})
        tokenizer = load_tokenizer(folder, local_files_only=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # each format of weights breaks in ways of its own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RunError(
            f"--model: expected a model and its tokenizer in {folder}, got: {reason}"
        ) from error
    return model.to(device).eval(), tokenizer
