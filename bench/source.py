# SPDX-License-Identifier: Apache-2.0
"""Which sources a GPU record belongs to: one hash over everything that can change its numbers."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "seer_cuda", "CMakeLists.txt")
# What a build or an interpreter leaves beside the sources (.gitignore names the same).
_BUILT_SUFFIXES = (".so", ".pyc", ".pyd", ".o", ".a")
_BUILT_FOLDERS = ("__pycache__",)


def _is_source(path: str) -> bool:
    folders = path.split("/")[:-1]
    return not path.endswith(_BUILT_SUFFIXES) and not any(f in _BUILT_FOLDERS for f in folders)


def _by_git(root: Path) -> list[str] | None:
    """Paths that git tracks or would track, or None without git or outside a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    try:
        done = subprocess.run([*command, *SOURCES], cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [path for path in done.stdout.decode().split("\0") if path]


def _by_walk(root: Path) -> list[str]:
    """Every file below SOURCES."""
    paths = [name for name in SOURCES if (root / name).is_file()]
    for name in SOURCES:
        for folder, _, files in os.walk(root / name):
            relative = Path(folder).relative_to(root).as_posix()
            paths.extend(f"{relative}/{file}" for file in files)
    return paths


def source_files(root: Path = ROOT, use_git: bool = True) -> list[str]:
    """Sorted relative paths of the source files; a copy of the tree without git gives the same."""
    paths = _by_git(root) if use_git else None
    # A root inside another repository that ignores it lists nothing: then walk.
    if not paths:
        paths = _by_walk(root)
    return sorted({path for path in paths if _is_source(path) and (root / path).is_file()})


def source_hash(root: Path = ROOT, use_git: bool = True) -> str:
    """sha256 (hex) over path and content of every source file, in the order of the paths."""
    digest = hashlib.sha256()
    for path in source_files(root, use_git):
        content = (root / path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
