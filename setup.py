# SPDX-License-Identifier: Apache-2.0
"""Drives CMake; sources, architectures and flags live in CMakeLists.txt.

Environment: ``SEER_ARCHS`` ("80;90a"), ``SEER_CUDA`` (AUTO, ON, OFF), ``CMAKE_ARGS`` (all else),
``MAX_JOBS`` (parallel compilers).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def forget_stale_cache(build: Path) -> None:
    """Removes a build folder whose tools are gone.

    An isolated ``pip install .`` brings ninja, nvcc and CUTLASS in a temporary folder and deletes
    it afterwards; CMake would look for them there again.
    """
    cache = build / "CMakeCache.txt"
    tools = {"CMAKE_MAKE_PROGRAM", "CMAKE_CUDA_COMPILER", "SEER_NVCC", "SEER_CUDART"}
    tools.add("pybind11_DIR")
    for line in cache.read_text().splitlines() if cache.exists() else []:
        name, _, path = line.partition("=")
        if name.split(":")[0] in tools and path.startswith("/") and not os.path.exists(path):
            shutil.rmtree(build)
            return


class CMakeBuild(build_ext):
    """Configures, builds and installs both binaries into the package folder."""

    def run(self):
        # Editable installs put the binaries beside the sources; wheels take them from build_lib.
        prefix = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cp{sys.version_info[0]}{sys.version_info[1]}"
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        # Always given: a value from an earlier build in this folder must not linger. Empty, as make
        # exports what is not set, means the default.
        options.append(f"-DSEER_ARCHS={os.environ.get('SEER_ARCHS') or '80;90a'}")
        options.append(f"-DSEER_CUDA={os.environ.get('SEER_CUDA') or 'AUTO'}")
        # The package is these two; what is missing for them is an error here.
        options += ["-DSEER_TORCH=ON", "-DSEER_PYTHON=ON", "-DSEER_BENCH=OFF"]
        options += os.environ.get("CMAKE_ARGS", "").split()
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        forget_stale_cache(build)
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options],
            ["cmake", "--build", str(build), *jobs],
            ["cmake", "--install", str(build), "--prefix", str(prefix)],
        ):
            print("+", *command, flush=True)
            subprocess.run(command, check=True)
        print((build / "summary.txt").read_text())

    def get_outputs(self):
        package = Path(self.build_lib) / "seer_cuda"
        return [str(path) for path in package.glob("*.so")]


setup(
    # Marks the wheel as platform-specific; CMake builds the real files.
    ext_modules=[Extension("seer_cuda._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
