# SPDX-License-Identifier: Apache-2.0
"""The hash of the sources that a record is of, and the checks of tools/."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bench.source import source_files, source_hash
from tools.check_dependencies import allowed
from tools.check_kernels import offenders


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "CMakeLists.txt": "project(x)",
        "csrc/a.cu": "kernel",
        "csrc/deep/b.h": "header",
        "seer_cuda/__init__.py": "import torch",
        "README.md": "not a source",
        "seer_cuda/libseer_ops.so": "built",
        "seer_cuda/_core.cpython-311-x86_64-linux-gnu.so": "built",
        "seer_cuda/__pycache__/x.cpython-311.pyc": "built",
        ".gitignore": "*.so\n__pycache__/\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_sources_are_what_can_change_the_numbers(tree):
    wanted = ["CMakeLists.txt", "csrc/a.cu", "csrc/deep/b.h", "seer_cuda/__init__.py"]
    assert source_files(tree, use_git=False) == wanted


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_copy_without_git_has_the_same_hash(tree):
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    subprocess.run(["git", "add", "."], cwd=tree, check=True)
    assert source_files(tree) == source_files(tree, use_git=False)
    (tree / "csrc" / "new.cu").write_text("not added yet")
    assert "csrc/new.cu" in source_files(tree)
    (tree / "csrc" / "a.cu").unlink()  # deleted, still in the index
    assert source_hash(tree) == source_hash(tree, use_git=False)


def test_hash_sees_content_and_names(tree):
    before = source_hash(tree, use_git=False)
    (tree / "README.md").write_text("changed")
    assert source_hash(tree, use_git=False) == before
    (tree / "csrc" / "a.cu").write_text("kernel2")
    changed = source_hash(tree, use_git=False)
    assert changed != before
    (tree / "csrc" / "a.cu").rename(tree / "csrc" / "c.cu")
    assert source_hash(tree, use_git=False) not in (before, changed)


@pytest.mark.parametrize(
    ("folder", "header", "quoted", "fine"),
    [
        ("include", "vector", False, True),
        ("include", "cuda_runtime_api.h", False, True),
        ("include", "seer/types.h", True, True),
        ("include", "cuda_runtime.h", False, False),
        ("include", "common/varlen.cuh", True, False),
        ("common", "cute/tensor.hpp", False, True),
        ("block_sparse_attn", "torch/extension.h", False, False),
        ("tests", "pybind11/pybind11.h", False, False),
        ("torch", "torch/csrc/stable/tensor.h", False, True),
        ("torch", "torch/extension.h", False, False),
        ("torch", "ATen/ATen.h", False, False),
        ("torch", "cutlass/numeric_types.h", False, False),
        ("torch", "common/varlen.cuh", True, False),
        ("python", "pybind11/stl.h", False, True),
        ("python", "torch/torch.h", False, False),
    ],
)
def test_include_rules(folder, header, quoted, fine):
    assert (allowed(folder, header, quoted) == "") is fine


def test_spills_and_slow_code_are_offences():
    clean = {"name": "a", "spill_stores": 0, "spill_loads": 0, "stack": 0, "losses": []}
    assert offenders([clean]) == []
    bad = [{"stack": 8}, {"spill_loads": 4}, {"losses": ["wgmma instructions are serialized"]}]
    assert len(offenders([clean | fault for fault in bad])) == 3
