# SPDX-License-Identifier: Apache-2.0
"""setuptools' build backend, plus one thing: a machine without nvcc gets the compiler from PyPI.

Set ``SEER_CUDA=OFF`` for a CPU-only build that downloads no compiler.
"""

from __future__ import annotations

import os
import platform
import shutil

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the backend's hooks)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# Together these are a full toolkit under site-packages/nvidia/cu13, static runtime included.
NVCC_WHEELS = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
]


def nvcc_wheels() -> list[str]:
    """The compiler wheels if this build needs them, else an empty list."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which(os.environ.get("CUDACXX") or "nvcc") or any(
        home and os.path.exists(os.path.join(home, "bin", "nvcc")) for home in homes
    )
    linux = platform.system() == "Linux"
    wanted = (os.environ.get("SEER_CUDA") or "AUTO").upper() != "OFF" and linux
    return NVCC_WHEELS if wanted and not found else []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + nvcc_wheels()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + nvcc_wheels()
