# SPDX-License-Identifier: Apache-2.0
"""Text: the source of the Python packages on this machine, split by whole packages.

What a package is held out for follows from its name alone (a hash), before anything is measured.
Files of a package stay in the order of their paths, so that a window of 32k tokens spans files that
import, repeat and vary each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np

from bench.experiment.settings import Settings

SPLITS = ("train", "validation", "test")
FILE_TOKEN = "<|file|>"
# A file that few people wrote by hand: longer than this, or with lines like these.
_MOST_BYTES = 300_000
_LEAST_BYTES = 200
_LONGEST_MEAN_LINE = 100
_LEAST_LETTERS = 0.4
# A line of its own has this many characters; a file with more known ones than this share is a copy.
_LINE, _MOST_KNOWN = 25, 0.5
_TASK_FILES = 128
# Copies of other packages inside packages, which could be held-out ones.
_COPIES = frozenset({"_vendor", "vendor", "vendored", "extern", "third_party", "lib2to3"})


@dataclass
class Package:
    """One top-level package or module."""

    name: str
    files: list[tuple[str, str]] = field(default_factory=list)  # path inside, text

    @property
    def size(self) -> int:
        """Bytes of text, as characters."""
        return sum(len(text) for _, text in self.files)


def roots() -> list[Path]:
    """Folders with packages: those of sys.path that hold installed ones, and Python's own."""
    found = [Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return [path for path in dict.fromkeys(found) if path.is_dir()]


def packages(
    folders: Iterable[Path], library: Path | None = None, pool: Executor | None = None
) -> list[Package]:
    """Every package of the folders, by name; the standard library as the package "python"."""
    named: dict[str, list[Path]] = {}
    for folder in folders:
        for entry in sorted(folder.iterdir()):
            if entry.suffix == ".py" or (entry.is_dir() and "-info" not in entry.suffix):
                named.setdefault(entry.stem, []).append(entry)
    if library is not None:
        # Its tests and copies of installed packages left out.
        skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
        named["python"] = [path for path in sorted(library.iterdir()) if path.name not in skip]
    # (package, path, path inside) of every file, read in parallel where there is a pool.
    places = [
        (name, path, str(path.relative_to(entry.parent)))
        for name, entries in sorted(named.items())
        for entry in entries
        for path in _paths(entry)
    ]
    read = map if pool is None else partial(pool.map, chunksize=_TASK_FILES)
    texts = read(_text, [path for _, path, _ in places])
    found: dict[str, Package] = {}
    for (name, _, inside), text in zip(places, texts, strict=True):
        if text is not None:
            found.setdefault(name, Package(name)).files.append((inside, text))
    return list(found.values())


def _paths(entry: Path) -> Iterator[Path]:
    paths = [entry] if entry.is_file() else sorted(entry.rglob("*.py"))
    for path in paths:
        if path.suffix == ".py" and not _COPIES & set(path.relative_to(entry.parent).parts):
            yield path


def _text(path: Path) -> str | None:
    """What a file holds, None if it does not count."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if _written(text) else None


def _written(text: str) -> bool:
    """Whether a text looks written rather than generated: tables of numbers, encoded data."""
    if not _LEAST_BYTES <= len(text) <= _MOST_BYTES:
        return False
    letters = sum(map(str.isalpha, text[:20_000])) / min(len(text), 20_000)
    return letters >= _LEAST_LETTERS and len(text) / (text.count("\n") + 1) <= _LONGEST_MEAN_LINE


def split(found: list[Package], settings: Settings) -> dict[str, list[Package]]:
    """The packages of every split.

    Copies of a file count once, first where it is held out. Files that share most of their lines
    with held-out ones are not trained on: some packages exist twice, under two names.
    """
    low, high = settings.package_bytes
    order = sorted(found, key=lambda package: hashlib.sha256(package.name.encode()).digest())
    parts: dict[str, list[Package]] = {name: [] for name in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    wanted = {"test": settings.held_out_bytes, "validation": settings.validation_bytes}
    for package in order:
        fits = low <= package.size <= high
        part = next((name for name in wanted if fits and sizes[name] < wanted[name]), "train")
        parts[part].append(package)
        sizes[part] += package.size
    seen: set[bytes] = set()
    held_out: set[int] = set()
    for name in ("test", "validation", "train"):
        parts[name].sort(key=lambda package: package.name)
        for package in parts[name]:
            files = [file for file in package.files if _is_new(file[1], seen)]
            if name == "train":
                files = [file for file in files if not _is_known(file[1], held_out)]
            else:
                for _, text in files:
                    held_out |= _lines(text)
            package.files = files
        parts[name] = [package for package in parts[name] if package.files]
    return parts


def _lines(text: str) -> set[int]:
    """Hashes of a text's lines that are long enough to be its own."""
    lines = map(str.strip, text.split("\n"))
    return {hash(line) for line in lines if len(line) >= _LINE}


def _is_known(text: str, held_out: set[int]) -> bool:
    own = _lines(text)
    return bool(own) and len(own & held_out) > _MOST_KNOWN * len(own)


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.sha256("".join(text.split()).encode()).digest()
    new = digest not in seen
    seen.add(digest)
    return new


def train_tokenizer(texts: Iterable[str], vocabulary: int):
    """A byte-level BPE tokenizer as transformers has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[FILE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=FILE_TOKEN, eos_token=FILE_TOKEN
    )


def sample(parts: list[Package], size: int) -> Iterator[str]:
    """About `size` characters of training files, spread over all of them."""
    texts = [text for package in parts for _, text in package.files]
    every = max(1, sum(map(len, texts)) // max(1, size))
    yield from texts[::every]


def encode(
    tokenizer_file: Path, found: list[Package], pool: Executor | None = None
) -> list[np.ndarray]:
    """uint16 tokens of each package: every file with its path before it."""
    tasks = [
        (at, package.files[first : first + _TASK_FILES])
        for at, package in enumerate(found)
        for first in range(0, len(package.files), _TASK_FILES)
    ]
    encoded = (map if pool is None else pool.map)(
        partial(_encode, str(tokenizer_file)), [files for _, files in tasks]
    )
    parts: list[list[np.ndarray]] = [[] for _ in found]
    for (at, _), tokens in zip(tasks, encoded, strict=True):
        parts[at].append(tokens)
    return [np.concatenate(own) if own else np.empty(0, np.uint16) for own in parts]


@cache
def _backend(tokenizer_file: str):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(tokenizer_file)


def _encode(tokenizer_file: str, files: list[tuple[str, str]]) -> np.ndarray:
    texts = [f"{FILE_TOKEN}# {path}\n{text}" for path, text in files]
    encoded = _backend(tokenizer_file).encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array(one.ids, dtype=np.uint16) for one in encoded])


def run(
    folder: Path, settings: Settings, folders: list[Path] | None = None, library: bool = True
) -> dict:
    """Writes the tokenizer, ``{split}.npy`` and ``corpus.json`` into the folder, once.

    Returns:
        What corpus.json holds: the packages of every split with files, characters and tokens.
    """
    report = folder / "corpus.json"
    if report.is_file():
        return json.loads(report.read_text())
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    standard = Path(sysconfig.get_paths()["stdlib"]) if library else None
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), initializer=_alone) as pool:
        found = packages(roots() if folders is None else folders, standard, pool)
        parts = split(found, settings)
        read = time.monotonic()
        tokenizer = _tokenizer(folder, parts["train"], settings)
        trained = time.monotonic()
        splits = {}
        for name, own in parts.items():
            streams = encode(folder / "tokenizer" / "tokenizer.json", own, pool)
            np.save(folder / f"{name}.npy", np.concatenate(streams))
            splits[name] = [
                {
                    "package": package.name,
                    "files": len(package.files),
                    "characters": package.size,
                    "tokens": int(stream.size),
                }
                for package, stream in zip(own, streams, strict=True)
            ]
    seconds = {
        "read": read - began,
        "tokenizer": trained - read,
        "encode": time.monotonic() - trained,
    }
    result = {
        "vocabulary": len(tokenizer),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "splits": splits,
    }
    part = report.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1))
    part.replace(report)
    return result


def _tokenizer(folder: Path, packages: list[Package], settings: Settings):
    """The run's tokenizer: one that is there already belongs to a model."""
    from transformers import AutoTokenizer

    out = folder / "tokenizer"
    if not out.is_dir():
        part = folder / ".tokenizer.part"
        texts = sample(packages, settings.sample_bytes)
        train_tokenizer(texts, settings.vocabulary).save_pretrained(part)
        part.replace(out)
    return AutoTokenizer.from_pretrained(out, local_files_only=True)


def _alone() -> None:
    """A worker's tokenizer uses no threads: the workers are the parallelism."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def windows(folder: Path, name: str, count: int, length: int) -> np.ndarray:
    """int64 ``[count, length]`` windows of a held-out split, none across packages or overlapping.

    Spread evenly over all that there are; fewer than `count` if there are fewer.
    """
    tokens = np.load(folder / f"{name}.npy", mmap_mode="r")
    starts, first = [], 0
    for package in json.loads((folder / "corpus.json").read_text())["splits"][name]:
        starts += [first + at * length for at in range(package["tokens"] // length)]
        first += package["tokens"]
    if not starts:
        raise ValueError(f"{name}: expected a package of {length} tokens, got none.")
    chosen = sorted({round(at) for at in np.linspace(0, len(starts) - 1, count)})
    return np.stack([tokens[starts[at] : starts[at] + length] for at in chosen]).astype(np.int64)
