# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, its exit codes, and that user errors are one line."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from seer_cuda import __version__, cli, info

SM80 = {
    "op": "block_sparse_attn",
    "name": "kernel_sm80",
    "sm": 80,
    "dtype": "bfloat16",
    "head_dim": 128,
    "block_q": 64,
    "tile_kv": 64,
    "threads": 64,
    "smem_bytes": 49152,
    "registers": {"sm_80": 168},
}
SM90 = {**SM80, "name": "kernel_sm90", "sm": 90, "registers": {"sm_90a": 240}}


GATE = {
    "op": "gate_select",
    "name": "gate_kernel",
    "sm": 80,
    "dtype": "bfloat16",
    "head_dim": 128,
    "registers": {"sm_80": 164},
}


class FakeCore:
    """`seer_cuda._core` of a CUDA build, with the C++ table's rule of which kernel runs where."""

    def __init__(self, variants=(SM80, SM90), cuda=True):
        self._variants, self._cuda = list(variants), cuda

    def build_info(self):
        version = "13.0" if self._cuda else ""
        return {
            "compiler": "GNU 12",
            "cuda": self._cuda,
            "cuda_version": version,
            "archs": "80;90a",
        }

    def variants(self):
        return self._variants

    def explain(self, op, sm, dtype, head_dim, block_q, block_kv):
        runs = any(sm == v["sm"] or (v["sm"] == 80 and sm >= 80) for v in self._variants)
        return "" if runs else f"no kernel for sm_{sm}: rebuild"


@pytest.fixture
def machine(monkeypatch):
    """Describes a machine with these GPUs and this core."""

    def describe(core, *sms):
        gpus = [
            {"device": f"cuda:{i}", "name": "GPU", "sm": sm, "memory_gib": 80.0}
            for i, sm in enumerate(sms)
        ]
        monkeypatch.setattr(info._library, "load_core", lambda: core)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(info, "_gpu", lambda index: dict(gpus[index]))
        return info.collect()

    return describe


def used_on(about):
    return {kernel["name"]: kernel["used_on"] for kernel in about["kernels"]}


def test_version_and_module_entry():
    done = subprocess.run(
        [sys.executable, "-m", "seer_cuda", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"seer_cuda {__version__}")


def test_info_names_every_op(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert __version__ in printed and torch.__version__ in printed
    assert all(op in printed for op in info.OPS)
    assert "\x1b" not in printed


def test_info_json_is_complete(capsys):
    assert cli.main(["info", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert [row["op"] for row in about["ops"]] == list(info.OPS)
    assert {row["cpu"] for row in about["ops"]} == {"C++ kernel"}


def test_info_lists_exactly_the_ops_of_the_library():
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.removeprefix("seer::") for s in schemas if s.name.startswith("seer::")}
    assert {name for name in names if not name.startswith("_")} == set(info.OPS)


def test_info_works_without_the_introspection_module(machine):
    about = machine(None)
    assert about["build"] is None and about["kernels"] == []
    assert "not built for this Python" in info.as_text(about)


def test_info_gives_each_gpu_its_most_specific_kernel(machine):
    about = machine(FakeCore(), 80, 90, 100)
    assert used_on(about) == {"kernel_sm80": ["cuda:0", "cuda:2"], "kernel_sm90": ["cuda:1"]}
    rows = {row["op"]: row for row in about["ops"]}
    assert rows["block_sparse_attn"]["cuda:2"] == "CUDA kernel, 1 shapes"
    assert "240 (sm_90a)" in info.as_text(about)


def test_info_says_what_runs_without_a_kernel(machine):
    about = machine(FakeCore(variants=(SM80, GATE)), 90, 75)
    assert used_on(about) == {"kernel_sm80": ["cuda:0"], "gate_kernel": ["cuda:0"]}
    row = {row["op"]: row for row in about["ops"]}["gate_select"]
    assert row["cuda:0"] == "CUDA kernel, 1 shapes; else torch operations"
    assert row["cuda:1"] == "torch operations"
    assert "164 (sm_80)" in info.as_text(about)
    about = machine(FakeCore(variants=(), cuda=False), 90)
    row = {row["op"]: row for row in about["ops"]}["gate_select"]
    assert row["cuda:0"] == "torch operations"


def test_info_says_why_a_gpu_has_no_kernel(machine):
    about = machine(FakeCore(), 75)
    assert used_on(about) == {"kernel_sm80": [], "kernel_sm90": []}
    text = info.as_text(about)
    assert "none: no kernel for sm_75" in text
    assert "block_sparse_attn on cuda:0: no kernel for sm_75: rebuild" in text


def test_info_says_that_the_build_has_no_cuda(machine):
    about = machine(FakeCore(variants=(), cuda=False), 90)
    rows = {row["op"]: row for row in about["ops"]}
    assert rows["block_sparse_attn"]["cuda:0"] == "none: built without CUDA"
    assert rows["pack_block_bits"]["cuda:0"] == "none: built without CUDA"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--text", "/no/such/place"], "no such file or folder"),
        (["--seed", "99999999999999999999"], "--seed: expected 0 to 2147483647, got 9999"),
        (["--seed", "-1"], "--seed: expected 0 to 2147483647, got -1"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--context", "1000"], "--context: expected a multiple of 16"),
        (["--context", "320"], "at least 640"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(arguments, expected, capsys, tmp_path):
    base = ["demo", "--device", "cpu", "--size", "small", "--out", str(tmp_path / "out")]
    assert cli.main(base + arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert captured.out == "" and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_is_refused_where_there_is_none(capsys):
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "sees no CUDA device. Use --device cpu." in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "rich" else find(name)
    )
    assert cli.main(["demo"]) == cli.MISSING
    assert "needs rich: pip install 'seer_cuda[demo]'" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file(capsys, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main(["demo", "--device", "cpu", "--out", str(blocked)]) == 1
    assert f"--out {blocked}" in capsys.readouterr().err


def test_a_file_elsewhere_is_not_blamed_on_the_output_folder(monkeypatch, capsys, tmp_path):
    from seer_cuda.demo import run

    def unreadable(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path / "text.txt"))

    monkeypatch.setattr(run, "run", unreadable)
    assert cli.main(["demo", "--device", "cpu", "--out", str(tmp_path / "out")]) == cli.FAILED
    captured = capsys.readouterr().err
    assert "--out" not in captured and f"{tmp_path}/text.txt" in captured


def test_unknown_options_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--size", "huge"])
    assert stop.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_a_missing_library_is_one_line(tmp_path):
    """The command line says what is missing and what to do; an import still raises."""
    environment = os.environ | {"SEER_OPS_LIBRARY": str(tmp_path / "none.so")}

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = run("-m", "seer_cuda", "info")
    assert (done.returncode, done.stdout) == (cli.MISSING, "")
    (line,) = done.stderr.splitlines()
    assert "none.so" in line and "pip install ." in line
    done = run("-c", "import seer_cuda")
    assert done.returncode == 1 and "ImportError: seer_cuda: expected the operator" in done.stderr
