# SPDX-License-Identifier: Apache-2.0
"""Local text as tokens: a part to train on, a part held out, and windows of a fixed length."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Share of the tokens, at the end, that is held out.
HELD_OUT = 0.1


class RunError(ValueError):
    """Options, text or a folder that cannot be used; one line for the user."""


@dataclass(frozen=True)
class Corpus:
    """int64 tokens of all files, those held out apart."""

    train: Tensor
    held_out: Tensor

    def sample(self, count: int, length: int, seed: int, step: int) -> Tensor:
        """``[count, length]`` windows of a training step.

        They follow from seed and step alone, so that a run that goes on needs no generator's state.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return self._windows(self.train, count, length, generator)

    def evaluation(self, count: int, length: int) -> Tensor:
        """``[count, length]`` held-out windows, the same in every run."""
        return self._windows(self.held_out, count, length, torch.Generator().manual_seed(0))

    def digest(self) -> str:
        """Of all tokens: a run goes on only with the text that it began with."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(part.numpy())
        return digest.hexdigest()

    @staticmethod
    def _windows(stream: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
        if stream.numel() < length:
            raise RunError(
                f"--text: expected at least {length} tokens in each part ({HELD_OUT:.0%} is held "
                f"out), got {stream.numel()}. Give more text or a smaller --context."
            )
        starts = torch.randint(stream.numel() - length + 1, (count,), generator=generator)
        return stream[starts[:, None] + torch.arange(length)]


def load(path: Path, tokenizer: Any) -> Corpus:
    """Reads a text file, or all UTF-8 files of a folder in the order of their names.

    A ``.npy`` file holds the tokens themselves: large text need not go through the tokenizer in
    every run.

    Raises:
        RunError: no such path, no text in it, or tokens that the tokenizer does not have.
    """
    if not path.exists():
        raise RunError(f"--text: expected a file or folder, got {path}, which does not exist.")
    if path.suffix == ".npy":
        return _divided(_tokens(path, len(tokenizer)))
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    parts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            parts.append(torch.tensor(ids, dtype=torch.int64))
    if not parts:
        raise RunError(f"--text: expected UTF-8 text in {path}, got none.")
    return _divided(torch.cat(parts))


def _tokens(path: Path, vocabulary: int) -> Tensor:
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RunError(f"--text: expected an array of tokens in {path}, got: {error}.") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise RunError(
            f"--text: expected integers [tokens] in {path}, got {tokens.dtype} "
            f"{list(tokens.shape)}. Save one array of token ids."
        )
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise RunError(
            f"--text: expected tokens from 0 to {vocabulary - 1} in {path}, got "
            f"{int(tokens.min())} to {int(tokens.max())}. Use the model's own tokenizer."
        )
    return torch.from_numpy(tokens.astype(np.int64))


def _divided(tokens: Tensor) -> Corpus:
    cut = tokens.numel() - int(HELD_OUT * tokens.numel())
    return Corpus(tokens[:cut], tokens[cut:])
