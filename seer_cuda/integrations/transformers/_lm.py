# SPDX-License-Identifier: Apache-2.0
"""Training a whole model beside its gates: its loss over long windows, and its files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Rows of logits at a time: at 128k words 0.5 GiB in fp32, where 32k rows would take 16 GiB.
_ROWS = 1024


def lm_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, as transformers' causal models have it for labels.

    Logits exist for a chunk of rows at a time, in backward too, which makes them again.

    Args:
        model: A causal language model.
        ids: int64 ``[batch, rows]``, whole windows without padding; rows >= 2.

    Returns:
        fp32 scalar, differentiable in the model's weights.
    """
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets, head = ids[:, 1:].flatten(), model.get_output_embeddings()
    total = torch.zeros((), device=hidden.device)
    for rows, wanted in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True):
        total = total + checkpoint(
            _summed, head, rows, wanted, use_reentrant=False, preserve_rng_state=False
        )
    return total / targets.numel()


def _summed(head: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(rows).float(), targets, reduction="sum")


def keep_less(model: Any) -> None:
    """Layers keep their input only and are computed again in backward."""
    # transformers 5 has another name for it.
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})


def save_model(model: nn.Module, tokenizer: Any, source: str, folder: Path) -> None:
    """Writes a model without gates, in the dtype that it has in the folder `source`.

    The folder is replaced as a whole; the model's own dtype changes too.
    """
    import transformers

    dtype = transformers.AutoConfig.from_pretrained(source, local_files_only=True).dtype
    if isinstance(dtype, torch.dtype):
        model.to(dtype)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
