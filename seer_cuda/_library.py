# SPDX-License-Identifier: Apache-2.0
"""Finding and loading the compiled parts of the package.

``libseer_ops.so`` registers ``torch.ops.seer`` (required). ``_core`` is a torch-free pybind11
module with introspection and host bit tools; it is built per Python version and may be missing.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

LIBRARY_NAME = "libseer_ops.so"
#: Names another build of the library, e.g. one in a CMake build folder.
LIBRARY_VARIABLE = "SEER_OPS_LIBRARY"
OLDEST_TORCH = (2, 11)


def library_path() -> Path:
    """Where the operator library is looked for: ``$SEER_OPS_LIBRARY``, else beside this file."""
    chosen = os.environ.get(LIBRARY_VARIABLE)
    return Path(chosen) if chosen else Path(__file__).with_name(LIBRARY_NAME)


def load_ops() -> Path:
    """Loads the operator library, which defines ``torch.ops.seer``. Loading twice is harmless.

    Returns:
        The path of the library.

    Raises:
        ImportError: the file is missing, or the dynamic linker refuses it; the text says what was
            looked for, which torch is installed and how to build the library.
    """
    path = library_path()
    version = torch.__version__
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    found = f"Installed: torch {version} ({cuda}), needed: torch >= {_dotted(OLDEST_TORCH)}."
    build = (
        "Build it with `pip install .` in the repository, or in place with `cmake -S . -B build && "
        "cmake --build build && cmake --install build --prefix .`; the environment variable "
        f"{LIBRARY_VARIABLE} names a library that lies elsewhere."
    )
    if not path.is_file():
        here = Path(__file__).parent
        if path.parent == here and here.with_name("CMakeLists.txt").is_file():
            build += " If it is installed already, start Python in another folder: this checkout's "
            build += "seer_cuda comes before the installed one."
        raise ImportError(f"seer_cuda: expected the operator library at {path}. {found} {build}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"seer_cuda: cannot load {path}: {error}. {found} {build}") from error
    return path


def load_for_package() -> None:
    """`load_ops` for the import of the package. Where the process is the command line itself
    (``python -m seer_cuda``, ``seer-cuda``), which a traceback does not help, it ends with the
    error's text and status 3, as for every part that is missing."""
    try:
        load_ops()
    except ImportError as error:
        if not _is_command():
            raise
        print(f"seer-cuda: {error}", file=sys.stderr)
        raise SystemExit(3) from None


def _is_command() -> bool:
    # While `python -m` imports the package, argv[0] is "-m", and only orig_argv has the name.
    if sys.argv[:1] == ["-m"]:
        return "seer_cuda" in sys.orig_argv
    return Path(sys.argv[0]).name == "seer-cuda" if sys.argv else False


def load_core() -> ModuleType | None:
    """The introspection module ``seer_cuda._core``, or None where it was not built."""
    try:
        return importlib.import_module("seer_cuda._core")
    except ImportError:
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
