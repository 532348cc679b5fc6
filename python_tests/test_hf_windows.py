# SPDX-License-Identifier: Apache-2.0
"""Training gates on kept windows: the loss of the model's own call, every window in turn."""

from contextlib import contextmanager

import pytest
import torch
from hf_models import FAMILIES, attached, make_model
from hf_runs import distill, make_folders, rows

from seer_cuda import cli
from seer_cuda._gate_pooled import embed_pooled, pooled_inputs
from seer_cuda.gate import AttnGate, GateConfig

pytest.importorskip("transformers")

from seer_cuda.integrations import transformers as seer_hf
from seer_cuda.integrations.transformers import _ranks, _train, _windows

FORMS = (
    {},
    {"gate": "Qmaxminavg_Kmaxminavg", "gate_dim": 128},
    {"gate": "Qmax_Kminavg", "qk_norm": True},
    {"force_double": True},
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("hf"))


def gradients(model, loss):
    weights = list(seer_hf.gate_parameters(model))
    return torch.autograd.grad(loss, weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())) or "own")
def test_the_loss_is_that_of_the_models_call(family, form):
    """Rows of every length; a map in float16 has 11 bits, and the rest is float32."""
    model = attached(family, mode="distilling", **form)
    ids = torch.randint(1, 97, (3, 150), generator=torch.Generator().manual_seed(3))
    kept = _windows.KeptWindows(model, ids.split(1), 3)
    assert seer_hf.configure(model).mode == "distilling"
    for index in ([2], [0, 1], [1, 1, 0]):
        model(ids[index], use_cache=False)
        wanted = seer_hf.gate_loss(model)
        found = kept.loss(torch.tensor(index))
        assert found.item() == pytest.approx(wanted.item(), rel=2**-9)
        pairs = zip(gradients(model, found), gradients(model, wanted), strict=True)
        for ours, theirs in pairs:
            assert (ours - theirs).norm() <= 2**-9 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())) or "own")
def test_the_loss_on_a_gpu(form):
    """Averages are rounded to bf16 once more than in one step, embeddings as often."""
    model = make_model("llama").to("cuda", torch.bfloat16)
    torch.manual_seed(5)
    seer_hf.attach(model, seer_hf.SeerConfig("distilling", **form), dtype=torch.float32)
    ids = torch.randint(1, 97, (2, 700), generator=torch.Generator().manual_seed(3))
    kept = _windows.KeptWindows(model, ids.split(1), 2)
    model(ids.cuda(), use_cache=False)
    wanted, found = seer_hf.gate_loss(model), kept.loss(torch.tensor([1, 0]))
    assert found.item() == pytest.approx(wanted.item(), rel=2**-11)
    for ours, theirs in zip(gradients(model, found), gradients(model, wanted), strict=True):
        assert (ours - theirs).norm() <= 2**-7 * theirs.norm()


@pytest.mark.parametrize("rows", [1, 15, 16, 100])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())) or "own")
def test_two_steps_are_the_embedding(form, rows):
    """In float64 they are what one step in float32 rounds."""
    form = {{"gate": "name"}.get(key, key): value for key, value in form.items()}
    sizes = {"gate_dim": 64, "block": 16} | form
    gate = AttnGate(GateConfig(4, 2, 64, **sizes))
    torch.manual_seed(rows)
    q, k = (torch.randn(2, rows, heads, 64) for heads in (4, 2))
    with torch.no_grad():
        single = gate.embed(q, k)
        double = embed_pooled(gate.double(), *pooled_inputs(gate, q.double(), k.double()))
    for ours, theirs in zip(double, single, strict=True):
        assert ours.dtype == torch.float64 and ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 2**-19 * ours.abs().max()


@pytest.mark.parametrize("count, step_size", [(5, 2), (3, 8), (4, 4), (1, 3)])
def test_every_window_comes_before_any_comes_again(count, step_size):
    kept = object.__new__(_windows.KeptWindows)
    kept.count = count
    steps = [kept.order(step_size, 7, step) for step in range(6)]
    assert all(len(step) == step_size for step in steps)
    drawn = torch.cat(steps)
    for first in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[first : first + count].tolist()) == list(range(count))
    assert torch.equal(kept.order(step_size, 7, 3), steps[3])
    if count > 1:
        others = torch.cat([kept.order(step_size, 8, step) for step in range(6)])
        assert not torch.equal(others, drawn)


def test_the_model_runs_once_per_window(folders, tmp_path, monkeypatch, capsys):
    calls = []
    keep = _windows.KeptWindows._keep

    def counted(self, prompt):
        calls.append(prompt.layer)
        return keep(self, prompt)

    monkeypatch.setattr(_windows.KeptWindows, "_keep", counted)
    assert distill(folders, tmp_path / "a", "--cache", "3", "--steps", "12") == 0
    assert "3 windows go through the model once" in capsys.readouterr().out
    assert calls == [0, 1] * 3
    log = rows(tmp_path / "a")
    assert float(log[-1][1]) < 0.95 * float(log[1][1])
    # Done: nothing is computed for what has no step left.
    assert distill(folders, tmp_path / "a", "--cache", "3", "--steps", "12") == 0
    assert len(calls) == 6


def test_a_killed_run_loses_nothing(folders, tmp_path, monkeypatch):
    options = ("--cache", "5", "--save-every", "2")
    assert distill(folders, tmp_path / "whole", *options) == 0
    step = _train._step

    def killed(model, corpus, given, at, *more):
        if at == 3:
            raise KeyboardInterrupt
        return step(model, corpus, given, at, *more)

    with monkeypatch.context() as patch:
        patch.setattr(_train, "_step", killed)
        assert distill(folders, tmp_path / "part", *options) == cli.INTERRUPTED
    assert distill(folders, tmp_path / "part", *options) == 0
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")
    name = "attn_gate_weights.safetensors"
    assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_form_of_gate(folders, tmp_path):
    form = ("--gate", "Qmaxavg_Kmaxminavg", "--gate-dim", "128")
    assert distill(folders, tmp_path, "--cache", "2", "--steps", "2", *form) == 0
    model, _ = _train.open_model(str(folders / "model"), "cpu")
    seer_hf.load_gates(model, tmp_path)
    config = seer_hf.gates(model)[0].config
    assert (config.name, config.gate_dim) == ("Qmaxavg_Kmaxminavg", 128)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--cache", "-1"), "--cache: expected at least 0, got -1."),
        (("--cache", "2", "--train-all"), "--cache: expected none with --train-all, got 2."),
        (("--cache", str(10**12)), f"--cache: expected memory for {10**12} windows of "),
        (("--gate", "Qmean_Kmax"), "--gate, --gate-dim: seer::SeerConfig: gate: expected one of"),
        (("--gate-dim", "0"), "--gate, --gate-dim: "),
        (("--gate", "Qmax_Kmax", "--gates", "x"), "--gate, --gate-dim: expected none with --gates"),
    ],
)
def test_what_cannot_be_used_is_one_line(options, message, folders, tmp_path, capsys):
    assert distill(folders, tmp_path / "a", *options) == cli.USAGE
    printed = capsys.readouterr().err
    assert printed.startswith(f"seer-cuda: {message}") and printed.count("\n") == 1


def test_several_processes_are_refused(folders, tmp_path, monkeypatch, capsys):
    @contextmanager
    def joined(device):
        yield _ranks.Ranks(0, 2)

    monkeypatch.setattr(_train, "joined", joined)
    assert distill(folders, tmp_path / "a", "--cache", "2") == cli.USAGE
    assert "--cache: expected one process with it, got 2." in capsys.readouterr().err
