# SPDX-License-Identifier: Apache-2.0
"""The programs of examples/ run, and the pages that show them show what runs.

examples/block_sparse_attn.cpp is built and run by ctest.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seer_cuda._library import library_path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TORCH = Path(torch.__file__).parent


def _run(*command, **environment):
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("page", "program"),
    [
        ("cpp_api.md", "block_sparse_attn.cpp"),
        ("other_frameworks.md", "torch_library.py"),
        ("other_frameworks.md", "libtorch.cpp"),
    ],
)
def test_pages_show_what_runs(page, program):
    language = "python" if program.endswith(".py") else "cpp"
    shown = re.search(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert shown[1].strip() in (EXAMPLES / program).read_text()


def test_torch_library_alone(tmp_path):
    """In a folder from which seer_cuda cannot be imported."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('seer_cuda') is not None)"
    if subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=False).returncode:
        pytest.skip("seer_cuda is installed: its absence cannot be shown here")
    out = _run(sys.executable, "-I", EXAMPLES / "torch_library.py", library_path())
    assert "largest difference from torch's attention" in out


@pytest.fixture(scope="module")
def libtorch_program(tmp_path_factory):
    """examples/libtorch.cpp, compiled as docs/other_frameworks.md says."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or not (TORCH / "include" / "ATen" / "ATen.h").exists():
        pytest.skip("no C++ compiler, or a torch without its headers")
    program = tmp_path_factory.mktemp("libtorch") / "example_libtorch"
    include, library = TORCH / "include", TORCH / "lib"
    command = [compiler, "-std=c++20", "-O0", "-isystem", include]
    command += ["-isystem", include / "torch" / "csrc" / "api" / "include"]
    command += [EXAMPLES / "libtorch.cpp", "-o", program, f"-L{library}"]
    command += [f"-Wl,-rpath,{library}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run(*command, "-ldl")
    return program


def test_libtorch_calls_an_operator(libtorch_program):
    assert "out [1, 512, 4, 64], largest error 0.00" in _run(libtorch_program, library_path())
    done = subprocess.run([libtorch_program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "expected the path of libseer_ops.so" in done.stdout


@pytest.mark.slow
def test_libtorch_runs_what_aot_inductor_compiled(libtorch_program, tmp_path):
    model = tmp_path / "model.pt2"
    _run(sys.executable, EXAMPLES / "aot_inductor.py", model, PYTHONPATH=str(ROOT))
    out = _run(libtorch_program, library_path(), model)
    assert "out [1, 512, 4, 64], largest error 0.00" in out
