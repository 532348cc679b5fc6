# SPDX-License-Identifier: Apache-2.0
"""The record's bookkeeping: source hash, counts, tables, figures, and the checks of tools/."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from bench import figures, record, report
from bench.checks import count_tests, sanitizer_errors
from bench.source import source_files, source_hash
from tools.check_dependencies import allowed
from tools.check_kernels import offenders

# ------------------------------------------------------------------------------------ source hash


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


# ------------------------------------------------------------------------------------- the record


def row(mask="random", density=0.1, ms=2.0, block=(64, 64), rows_kv=32768, **peers):
    return {
        "op": "block_sparse_attn",
        "arch": "sm80",
        "batch": 1,
        "heads_q": 32,
        "heads_kv": 8,
        "head_dim": 128,
        "rows_q": rows_kv,
        "rows_kv": rows_kv,
        "dtype": "bfloat16",
        "causal": True,
        "block": list(block),
        "density": density,
        "mask": mask,
        "ms": ms,
        "ms_burst": 0.9 * ms,
        "tflops": 400.0,
        "peers": peers,
        "peers_burst": peers,
    }


@pytest.fixture
def sample() -> dict:
    return {
        "gpu": "NVIDIA H200",
        "driver": "580.1",
        "torch": "2.11.0+cu130",
        "cuda": "13.0",
        "date": "2026-01-02",
        "source": "ab" * 32,
        "tests": {"passed": 3, "failed": 0, "skipped": 1},
        "rows": [
            row("dense", 1.0, 20.0, sdpa_flash=24.0),
            row("random", 0.5, 10.0, flex=15.0, fa4=9.0),
            row("random", 0.1, 2.0, flex=5.0),
            row("random", 0.1, 1.0, (128, 128), flex=5.0),
        ],
    }


def test_record_round_trip_and_place(sample, tmp_path):
    path = tmp_path / record.record_path("NVIDIA H200").name
    assert path.name == "nvidia_h200.json"
    record.write_record(sample, path)
    assert json.loads(path.read_text()) == sample
    one_per_line = [line for line in path.read_text().splitlines() if line.startswith('  {"op"')]
    assert len(one_per_line) == len(sample["rows"])


def test_check_line_answers_whether_the_record_is_current(sample, tmp_path):
    assert record.check_line([], "ab" * 32)[0] is False
    path = tmp_path / "nvidia_h200.json"
    record.write_record(sample, path)
    belongs, line = record.check_line([path], "ab" * 32)
    assert belongs and "3 passed, 0 failed, 1 skipped" in line
    belongs, line = record.check_line([path], "cd" * 32)
    assert not belongs and "make gpu-check" in line and "\n" not in line


@pytest.mark.parametrize(
    ("tests", "sanitizer", "missing", "wanted"),
    [
        ({"failed": 0}, {"memcheck": 0}, [], True),
        ({"failed": 1}, {"memcheck": 0}, [], False),
        ({"failed": 0}, {"memcheck": 2}, [], False),
        ({"failed": 0}, {"memcheck": "stopped after 40 s"}, [], False),
        ({"failed": 0}, None, [], True),
        ({"failed": 0}, None, ["sm80-8k"], False),
    ],
)
def test_exit_status(tests, sanitizer, missing, wanted):
    assert record.succeeded({"tests": tests, "sanitizer": sanitizer}, missing) is wanted


def test_counts_of_junit_and_sanitizer_logs(tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite tests="10" failures="1" errors="2" skipped="3"/></testsuites>'
    )
    assert count_tests(junit) == {"passed": 4, "failed": 3, "skipped": 3}
    assert sanitizer_errors("memcheck", "========= ERROR SUMMARY: 0 errors") == 0
    assert sanitizer_errors("memcheck", "= ERROR SUMMARY: 1 error\n= ERROR SUMMARY: 2 errors") == 3
    race = "========= RACECHECK SUMMARY: 4 hazards displayed (1 error, 3 warnings)"
    assert sanitizer_errors("racecheck", race) == 4
    assert sanitizer_errors("synccheck", "killed") is None


# ------------------------------------------------------------------------------ tables and figures


def test_ratios(sample):
    rows = sample["rows"]
    assert report.flash_speedup(rows[2], rows) == pytest.approx(12.0)
    assert report.best_peer(rows[1]) == ("fa4", 9.0)
    assert report.peer_tflops(rows[2], "flex") == pytest.approx(160.0)
    text = "\n".join(report.ratio_lines(rows))
    assert "0.90x fa4" in text and "12.00x" in text
    table = report.markdown_table(rows, 32768, (64, 64))
    assert table[0].endswith("against FlashAttention-4 | against FlexAttention |")
    assert table[-1] == "| 10% | 2.00 | 400 | 12.0x | not timed | 2.50x |"


def test_series_give_dense_peers_their_dense_rate(sample):
    lines = figures.series(sample["rows"], (64, 64))
    assert lines["seer_cuda"] == [(0.5, 400.0), (0.1, 400.0)]
    assert lines["sdpa_flash"][0][1] == pytest.approx(400 * 20 / 24)
    assert lines["fa4"] == [(0.5, pytest.approx(400 / 0.9))]


VARIANTS = [
    {"op": "block_sparse_attn", "sm": 80, "dtype": dtype, "head_dim": 128, "block_q": block}
    | {"tile_kv": 64}
    for dtype in ("bfloat16", "float16")
    for block in (64, 128)
]


def test_generated_readme_is_stable_and_complete(sample):
    bare = "# x\n" + "\n".join(
        f"<!-- generated: {name} -->\n<!-- end: {name} -->" for name in ("speed", "support")
    )
    text = figures.generated_readme(bare, sample, VARIANTS)
    assert figures.generated_readme(text, sample, VARIANTS) == text
    assert "| 10% | 2.00 | 400 |" in text
    compiled = "compute capability 8.0 and newer | bfloat16, float16 | 128 | 64, 128 | 64, 128"
    assert compiled in text
    assert "| `attn_pool` | torch operations, no kernel yet" in text
    assert figures.generated_readme(text, None, VARIANTS) != text
    with pytest.raises(ValueError, match="expected the markers"):
        figures.with_section("# x", "speed", "")


def test_stale_names_what_is_out_of_date(sample, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(
        "".join(f"<!-- generated: {n} -->\n<!-- end: {n} -->\n" for n in ("speed", "support"))
    )
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "README", readme)
    monkeypatch.setattr(figures, "IMAGES", tmp_path / "docs" / "img")
    assert len(figures.stale(sample, VARIANTS)) == 3
    for theme in figures.THEMES:
        figures.draw(sample, theme, figures.figure_path(theme))
    readme.write_text(figures.generated_readme(readme.read_text(), sample, VARIANTS))
    assert figures.stale(sample, VARIANTS) == []
    sample["rows"][1]["ms"] = 11.0
    assert len(figures.stale(sample, VARIANTS)) == 3


# ------------------------------------------------------------------------------------------ tools


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


def test_spills_are_offences():
    clean = {"name": "a", "spill_stores": 0, "spill_loads": 0, "stack": 0}
    assert offenders([clean]) == []
    assert len(offenders([clean | {"stack": 8}, clean | {"spill_loads": 4}])) == 2
