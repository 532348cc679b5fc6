# SPDX-License-Identifier: Apache-2.0
"""Where setup.py lets CMake build for this interpreter, and whether it could do so as it is.

python tools/build_dir.py            print the folder, e.g. build/cp312
python tools/build_dir.py --ready    exit status 0 if this interpreter has a CUDA device, a
                                     torch >= 2.11 and all that build and GPU tests import
"""

from __future__ import annotations

import importlib.util
import sys


def build_dir() -> str:
    """Relative to the repository root; the same rule as setup.py's."""
    return f"build/cp{sys.version_info[0]}{sys.version_info[1]}"


def ready() -> bool:
    """Whether `make gpu-check` can use this interpreter without installing anything."""
    needed = ("torch", "pybind11", "numpy", "pytest", "hypothesis")
    if any(importlib.util.find_spec(name) is None for name in needed):
        return False
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 11) and torch.cuda.is_available()


if __name__ == "__main__":
    if sys.argv[1:] == ["--ready"]:
        sys.exit(0 if ready() else 1)
    print(build_dir())
