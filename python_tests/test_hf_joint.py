# SPDX-License-Identifier: Apache-2.0
"""python -m seer_cuda distill --train-all: runs, runs that are killed, what is refused."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hf_models import make_model
from hf_runs import arguments, distill, make_folders, rows

from seer_cuda import cli

pytest.importorskip("transformers")

from seer_cuda.integrations.transformers import _lm, _log, _train

GATES, MODEL = "attn_gate_weights.safetensors", "model/model.safetensors"
JOINT = ["--train-all", "--steps", "4", "--model-lr", "1e-3", "--save-every", "2"]


# ----------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A local model with tied embeddings, and text."""
    root = tmp_path_factory.mktemp("joint")
    return make_folders(root, "qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert distill(folders, out, *JOINT) == 0
    return out


def same(a, b):
    assert rows(a) == rows(b)
    for name in (GATES, MODEL):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_run_lowers_both_losses_and_saves_both(folders, tmp_path, capsys):
    before = (folders / MODEL).read_bytes()
    assert distill(folders, tmp_path, "--train-all", "--steps", "12", "--model-lr", "2e-3") == 0
    printed = capsys.readouterr().out
    assert "step 12/12  loss " in printed and f"model: {tmp_path / 'model'}" in printed
    assert (folders / MODEL).read_bytes() == before
    log = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert list(log[0])[:6] == ["step", "loss", "lm_loss", "gate_loss", "lr", "model_lr"]
    for name in ("lm_loss", "gate_loss"):
        assert float(log[-1][name]) < 0.95 * float(log[0][name])
    for row in log:
        parts = float(row["lm_loss"]) + float(row["gate_loss"])
        assert float(row["loss"]) == pytest.approx(parts, rel=1e-5)
        assert float(row["model_lr"]) == pytest.approx(2 * float(row["lr"]), rel=1e-4)
    # What was saved is a model and its gates, which need nothing of the run.
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base_model"] == str(tmp_path / "model")
    common = ["--text", folders / "text", "--context", 300, "--windows", 2, "--device", "cpu"]
    found = []
    for model in (tmp_path / "model", folders / "model"):
        options = ["eval", "--model", model, "--gates", tmp_path, *common]
        assert cli.main(list(map(str, options))) == 0
        found.append(float(capsys.readouterr().out.split()[2]))
    assert found[0] < 0.9 * found[1]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_killed_run_loses_nothing(after, folders, whole, tmp_path, monkeypatch, capsys):
    """Killed when a step has its gradients, started again: model, gates and log bit for bit."""
    clip = torch.nn.utils.clip_grad_norm_
    left = [after]

    def killed(*args):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", killed)
        assert distill(folders, tmp_path, *JOINT) == cli.INTERRUPTED
    assert not (tmp_path / "model").exists()
    capsys.readouterr()
    assert distill(folders, tmp_path, *JOINT) == 0
    assert ("going on after step 2 of" in capsys.readouterr().out) == (after >= 2)
    same(tmp_path, whole)


@pytest.mark.parametrize("where", ["checkpoint", "model"])
def test_a_kill_while_it_writes_loses_nothing(where, folders, whole, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def half(state, file):
        calls.append(state["step"])
        if calls[-1] == 4:
            file.write(b"half a checkpoint")
            raise KeyboardInterrupt
        save(state, file)

    def stopped(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "checkpoint":
            patch.setattr(torch, "save", half)
        else:
            patch.setattr(_lm.shutil, "rmtree", stopped)
        assert distill(folders, tmp_path, *JOINT) == cli.INTERRUPTED
    # Checkpointing and how often is saved may change.
    assert distill(folders, tmp_path, *JOINT, "--checkpointing", "--save-every", "1") == 0
    same(tmp_path, whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        GATES, "checkpoint.pt", "config.json", "log.csv", "model",
    ]  # fmt: skip
    # Finished: nothing is left to do, and the result stays.
    assert distill(folders, tmp_path, *JOINT) == 0
    same(tmp_path, whole)


def test_a_model_keeps_the_dtype_of_its_files(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    root = shutil.copytree(folders, tmp_path / "root")
    make_model("llama", vocab_size=256).bfloat16().save_pretrained(root / "model")
    assert distill(root, tmp_path / "a", *JOINT) == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    state = torch.load(tmp_path / "a" / "checkpoint.pt")["model"]
    for name, weight in saved.named_parameters():
        assert weight.dtype == torch.bfloat16 and state[name].dtype == torch.float32
        assert torch.equal(weight, state[name].bfloat16())
    assert any((w != w.bfloat16()).any() for w in state.values())


def test_it_begins_with_gates_of_a_folder(folders, tmp_path):
    """Gates first, alone, then both: what the recipe does."""
    rule = {"seerattn_sparsity_method": "nz_ratio", "seerattn_nz_ratio": 0.3}
    assert distill(folders, tmp_path / "a", "--steps", "6") == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | rule))
    begin = ["--gates", tmp_path / "a", "--lr", "0"]
    assert distill(folders, tmp_path / "b", *JOINT, *begin) == 0
    assert (tmp_path / "b" / GATES).read_bytes() == (tmp_path / "a" / GATES).read_bytes()
    after = json.loads((tmp_path / "b" / "config.json").read_text())
    assert rule.items() <= after.items()
    assert distill(folders, tmp_path / "c", *JOINT) == 0
    first = [float(rows(tmp_path / name)[1][3]) for name in "bc"]
    assert first[0] < 0.9 * first[1]
    # Gates alone go on from a folder too.
    assert distill(folders, tmp_path / "d", *begin) == 0
    assert (tmp_path / "d" / GATES).read_bytes() == (tmp_path / "a" / GATES).read_bytes()


def test_the_gates_factor(folders, tmp_path):
    one = ["--train-all", "--steps", "1"]
    for name, scale in (("a", "0"), ("b", "10"), ("c", "20")):
        assert distill(folders, tmp_path / name, *one, "--gate-scale", scale) == 0
    assert distill(folders, tmp_path / "alone", "--steps", "1") == 0
    a, b, c = (list(map(float, rows(tmp_path / name)[1][1:4])) for name in "abc")
    assert a[0] == a[1] == b[1] == c[1] and a[2] == 0
    assert c[2] == pytest.approx(2 * b[2], rel=1e-5)
    # 10 is the factor that the loss of gates alone has.
    assert b[2] == pytest.approx(float(rows(tmp_path / "alone")[1][1]), rel=1e-5)


def test_what_cannot_be_used_is_one_line(folders, whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(folders / "model", tmp_path / "run" / "model")
    own = [tmp_path / "run", "--model", tmp_path / "run" / "model"]
    assert distill(folders, tmp_path / "alone", "--steps", "1") == 0
    wrong = (
        ("--model-lr", [tmp_path / "x", "--model-lr", "1e-4"]),
        ("--gate-scale", [tmp_path / "x", "--gate-scale", "1"]),
        ("--checkpointing", [tmp_path / "x", "--checkpointing"]),
        ("--model-lr", [tmp_path / "x", *JOINT, "--model-lr", "nan"]),
        ("--gate-scale", [tmp_path / "x", *JOINT, "--gate-scale", "-1"]),
        ("--gates", [tmp_path / "x", *JOINT, "--gates", tmp_path / "nowhere"]),
        ("--gates", [tmp_path / "x", *JOINT, "--gates", folders / "model"]),
        ("--train-all", [tmp_path / "alone", "--steps", "1", "--train-all"]),
        ("--train-all", [whole, "--steps", "4"]),
        ("--model-lr", [whole, *JOINT, "--model-lr", "1e-4"]),
        ("--gate-scale", [whole, *JOINT, "--gate-scale", "1"]),
        ("--gates", [whole, *JOINT, "--gates", tmp_path / "alone"]),
        ("--out", [*own, *JOINT]),
    )
    capsys.readouterr()
    for expected, (out, *options) in wrong:
        assert distill(folders, out, *options) == cli.USAGE, options
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and f"seer-cuda: {expected}: expected" in lines[0], lines
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_not_finite_stops_the_run(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_train, "lm_loss", lambda model, ids: _lm.lm_loss(model, ids) * math.nan)
    assert distill(folders, tmp_path, *JOINT) == cli.USAGE
    assert "--lr or --model-lr: expected a finite loss, got nan" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()


# ---------------------------------------------------------------------------------- what it says


def test_tensorboard_has_the_rows_of_the_log(folders, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = [tmp_path / "a", *JOINT, "--tensorboard", tmp_path / "events"]
    row = _log.Log.row

    def killed(log, values):
        row(log, values)
        if values["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_log.Log, "row", killed)
        assert distill(folders, *options) == cli.INTERRUPTED
    assert distill(folders, *options) == 0
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    log = list(csv.DictReader((tmp_path / "a" / "log.csv").open()))
    assert set(events.Tags()["scalars"]) == set(log[0]) - {"step"}
    for name in ("loss", "lm_loss", "gate_loss", "model_lr", "tokens"):
        points = events.Scalars(name)
        # One for each step: those after the checkpoint were withdrawn before they came again.
        assert [point.step for point in points] == [int(row["step"]) for row in log]
        want = [float(row[name]) for row in log]
        assert [point.value for point in points] == pytest.approx(want, rel=1e-5)


def test_tensorboard_that_is_missing_is_one_line(folders, tmp_path, monkeypatch, capsys):
    find = _log.importlib.util.find_spec
    monkeypatch.setattr(
        _log.importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    assert distill(folders, tmp_path / "a", "--tensorboard", tmp_path / "e") == cli.MISSING
    assert capsys.readouterr().err == (
        "seer-cuda: --tensorboard needs tensorboard: pip install tensorboard\n"
    )
    assert not (tmp_path / "a").exists()


def test_a_terminal_has_a_bar_instead_of_lines(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert distill(folders, tmp_path, "--steps", "2") == 0
    said = capsys.readouterr()
    assert "2/2" in said.err and "loss=" in said.err and "step 1" not in said.out


# ------------------------------------------------------------------------------ several processes


@pytest.mark.parametrize("mode", ["gates", "all"])
def test_two_processes_take_the_steps_of_one(mode, folders, whole, tmp_path):
    options = JOINT if mode == "all" else ["--steps", "4"]
    if mode == "gates":
        whole = tmp_path / "one"
        assert distill(folders, whole, *options) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, "-m", "seer_cuda", *arguments(folders, tmp_path, *options)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 4/4") == done.stdout.count("gates: ") == 1
    for got, want in zip(rows(tmp_path)[1:], rows(whole)[1:], strict=True):
        assert list(map(float, got)) == pytest.approx(list(map(float, want)), rel=1e-3)
    from safetensors.torch import load_file

    for name in (GATES, MODEL) if mode == "all" else (GATES,):
        first = load_file((folders if name == MODEL else whole) / name)
        got, want = load_file(tmp_path / name), load_file(whole / name)
        for key in want:
            moved = (want[key] - first[key]).norm() if name == MODEL else want[key].norm()
            assert (got[key] - want[key]).norm() < 1e-2 * moved, key


def test_processes_that_share_a_step_unevenly_are_refused(folders, tmp_path):
    options = arguments(folders, tmp_path, "--accumulate", "3")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "seer_cuda", *options], capture_output=True, text=True
    )
    assert "--accumulate: expected a multiple of the 2 processes, got 3" in done.stderr
