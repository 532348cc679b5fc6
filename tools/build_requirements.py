# SPDX-License-Identifier: Apache-2.0
"""Print what a build without isolation needs installed, one requirement per line.

    python tools/build_requirements.py               [build-system] of pyproject.toml, less torch
    python tools/build_requirements.py --compiler    the wheels of nvcc on a machine without one
    python tools/build_requirements.py --dev         the `dev` extra alone: style tools, no build

pip installs these by itself only for isolated builds, which would download a second torch.
`--compiler` needs setuptools, which is among the first.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def declared(key: str) -> list[str]:
    """The strings of `key = [...]`, read without a TOML parser: Python 3.10 has none."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf"^{key} = (\[.*?\])$", text, re.DOTALL | re.MULTILINE)
    if not found:
        raise SystemExit(f"pyproject.toml: expected `{key} = [...]`")
    return ast.literal_eval(found[1])


def compiler_wheels() -> list[str]:
    """nvcc as wheels where the machine has none and CUDA is wanted."""
    sys.path.insert(0, str(ROOT / "cmake"))
    from build_backend import nvcc_wheels

    return nvcc_wheels()


if __name__ == "__main__":
    if sys.argv[1:] == ["--compiler"]:
        print("\n".join(compiler_wheels()))
    elif sys.argv[1:] == ["--dev"]:
        print("\n".join(declared("dev")))
    else:
        print("\n".join(line for line in declared("requires") if not line.startswith("torch")))
