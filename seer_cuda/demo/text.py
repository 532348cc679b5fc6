# SPDX-License-Identifier: Apache-2.0
"""Real text as bytes: which files, how they are split, and windows of a fixed length."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: Folders of the standard library's tree that hold other people's code, or data.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
#: Bytes between two files of a stream; a byte that text does not contain.
_SEPARATOR = b"\0"
#: Share of the text that is held out.
HELD_OUT = 0.1
#: Bytes read at most: enough for any size of the demo, and a bound on memory.
READ_LIMIT = 64 << 20


class TextError(ValueError):
    """The text given by the user cannot be used; the message says what is needed."""


@dataclass(frozen=True)
class Corpus:
    """Text split by file.

    Attributes:
        name: Where it comes from.
        train: uint8 ``[bytes]``, files joined by a zero byte.
        held_out: The same, of files that are not in train.
        files: How many files train and held_out hold.
    """

    name: str
    train: Tensor
    held_out: Tensor
    files: tuple[int, int]

    def sample(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """int64 ``[count, length]``: windows of train that start anywhere."""
        starts = torch.randint(self.train.numel() - length + 1, (count,), generator=generator)
        return _windows(self.train, starts, length)

    def held_out_windows(self, count: int, length: int) -> Tensor:
        """int64 ``[count, length]``: disjoint windows spread evenly over held_out.

        Raises:
            TextError: held_out is shorter than that.
        """
        spare = self.held_out.numel() - count * length
        if spare < 0:
            raise TextError(
                f"{self.name}: {count} held-out windows of {length} bytes need "
                f"{_size(count * length)}, the held-out files have {_size(self.held_out.numel())}."
            )
        gap = spare // max(1, count - 1)
        return _windows(self.held_out, torch.arange(count) * (length + gap), length)


def _windows(stream: Tensor, starts: Tensor, length: int) -> Tensor:
    return stream[starts[:, None] + torch.arange(length)].to(torch.int64)


def load(path: Path | None, train_bytes: int, held_out_bytes: int) -> Corpus:
    """Reads and splits the text; the same files give the same split on every machine.

    Args:
        path: A text file, or a folder whose text files are read. None: the source text of the
            Python standard library that runs this program.
        train_bytes, held_out_bytes: The least that is needed of each part.

    Raises:
        TextError: no such path, no readable text in it, or too little of it.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        name = f"the Python {sysconfig.get_python_version()} standard library"
        files = [p for p in root.rglob("*.py") if not _NOT_LIBRARY & set(p.relative_to(root).parts)]
    else:
        root, name = path, str(path)
        if not path.exists():
            raise TextError(f"--text {path}: no such file or folder.")
        files = [path] if path.is_file() else [p for p in path.rglob("*") if _may_be_text(p, path)]
        root = path.parent if path.is_file() else path
    documents = _read(root, files)
    if not documents:
        raise TextError(f"--text {name}: no text found (UTF-8 files that are not empty).")
    train, held_out = split(documents)
    corpus = Corpus(name, _stream(train), _stream(held_out), (len(train), len(held_out)))
    _check_amount(corpus, train_bytes, held_out_bytes)
    return corpus


def _may_be_text(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.is_file() and not hidden and "__pycache__" not in path.parts


def _read(root: Path, files: list[Path]) -> list[bytes]:
    """Contents in an order that depends on the names only, so that neighbours are unrelated."""

    def key(file: Path) -> bytes:
        return hashlib.sha256(file.relative_to(root).as_posix().encode()).digest()

    documents, total = [], 0
    for file in sorted(files, key=key):
        try:
            content = file.read_bytes()
            content.decode()
        except (OSError, UnicodeDecodeError):
            continue
        if content.strip() and _SEPARATOR not in content:
            documents.append(content)
            total += len(content)
        if total >= READ_LIMIT:
            break
    return documents


def split(documents: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """(train, held_out): whole files, held out from the front until they hold their share.

    A single file is cut at a line end near the share, its tail is held out.
    """
    if len(documents) == 1:
        text = documents[0]
        at = text.rfind(b"\n", 0, len(text) - int(HELD_OUT * len(text))) + 1
        at = at or len(text) - int(HELD_OUT * len(text))
        return [text[:at]], [text[at:]]
    wanted = HELD_OUT * sum(map(len, documents))
    count = total = 0
    # One file at least stays for training.
    while total < wanted and count < len(documents) - 1:
        total += len(documents[count])
        count += 1
    return documents[count:], documents[:count]


def _stream(documents: list[bytes]) -> Tensor:
    joined = bytearray(_SEPARATOR.join(documents))
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0).byte()


def _check_amount(corpus: Corpus, train_bytes: int, held_out_bytes: int) -> None:
    have = corpus.train.numel(), corpus.held_out.numel()
    if have[0] >= train_bytes and have[1] >= held_out_bytes:
        return
    # What a text with an even split would need.
    needed = max(held_out_bytes / HELD_OUT, train_bytes / (1 - HELD_OUT))
    raise TextError(
        f"--text {corpus.name}: too little text. Needed: {_size(train_bytes)} to train and "
        f"{_size(held_out_bytes)} held out (about {_size(needed)} in all); found: "
        f"{_size(have[0])} and {_size(have[1])} after the split by file. Give more text, or use "
        "--size small."
    )


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{max(1, round(count / 1e3))} kB"
