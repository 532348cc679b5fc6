# SPDX-License-Identifier: Apache-2.0
"""python -m seer_cuda distill and eval: a run, a run that is killed, what is refused."""

import numpy as np
import pytest
import torch
from hf_models import make_model
from hf_runs import distill, make_folders, rows

from seer_cuda import cli

pytest.importorskip("transformers")

from seer_cuda.integrations.transformers import _log, _ranks, _train
from seer_cuda.integrations.transformers._corpus import RunError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("hf"))


def test_a_run_and_its_evaluation(folders, tmp_path, capsys):
    assert distill(folders, tmp_path / "a") == 0
    assert "step 6/6  loss " in capsys.readouterr().out
    log = rows(tmp_path / "a")
    assert log[0][:2] == ["step", "loss"] and [row[0] for row in log[1:]] == list("123456")
    assert float(log[-1][1]) < float(log[1][1])
    common = ["--model", folders / "model", "--gates", tmp_path / "a", "--text", folders / "text"]
    common = ["eval", *map(str, common), "--context", "300", "--windows", "2", "--device", "cpu"]
    assert cli.main([*common, "--method", "density", "--value", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0].split()[2]) == pytest.approx(float(lines[1].split()[2]), rel=1e-3)
    assert lines[2] == "kept blocks        100.0% of the visible ones"
    assert cli.main([*common, "--method", "topk", "--value", "1"]) == 0
    kept = float(capsys.readouterr().out.splitlines()[2].split()[2].rstrip("%"))
    assert 33 < kept < 70  # of 5 x 5 blocks: 1 or 2 of each row's 1 to 5


@pytest.mark.parametrize("after", [2, 3, 5])
def test_a_killed_run_loses_nothing(after, folders, tmp_path, monkeypatch, capsys):
    """Killed in the middle of a step, started again: the same gates and log, bit for bit."""
    assert distill(folders, tmp_path / "whole", "--save-every", "2") == 0
    step = _train._step

    def killed(model, corpus, options, at, *more):
        if at == after:
            raise KeyboardInterrupt
        return step(model, corpus, options, at, *more)

    with monkeypatch.context() as patch:
        patch.setattr(_train, "_step", killed)
        assert distill(folders, tmp_path / "part", "--save-every", "2") == cli.INTERRUPTED
    assert distill(folders, tmp_path / "part", "--save-every", "2") == 0
    assert f"going on after step {after // 2 * 2} of" in capsys.readouterr().out
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")
    name = "attn_gate_weights.safetensors"
    assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Finished: nothing is left to do, and the result stays.
    assert distill(folders, tmp_path / "part") == 0
    assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_log_is_whole_while_the_first_step_runs(folders, tmp_path, monkeypatch):
    """A kill that runs no clean-up finds the rows of the run before."""
    assert distill(folders, tmp_path / "a", "--save-every", "2") == 0
    before = (tmp_path / "a" / "log.csv").read_text().splitlines()
    columns = before[0].split(",")
    log = _log.Log(tmp_path / "a" / "log.csv", columns, 4, 6)
    assert (tmp_path / "a" / "log.csv").read_text().splitlines() == before[:5]
    log.close()


def test_other_text_under_the_same_name_is_another_run(folders, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text((folders / "text" / "a.txt").read_text())
    assert distill(folders, tmp_path / "a", "--text", str(text)) == 0
    text.write_text(text.read_text().replace("squared", "doubled"))
    assert distill(folders, tmp_path / "a", "--text", str(text)) == cli.USAGE
    assert "--text: expected the tokens" in capsys.readouterr().err


def test_tokens_in_an_array_are_the_text(folders, tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders / "model")
    ids = np.array(tokenizer((folders / "text" / "a.txt").read_text())["input_ids"], np.uint16)
    np.save(tmp_path / "text.npy", ids)
    assert distill(folders, tmp_path / "a", "--steps", "2") == 0
    assert distill(folders, tmp_path / "b", "--steps", "2", "--text", f"{tmp_path}/text.npy") == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    for wrong in (ids + 300, ids.astype(np.float32), ids[None]):
        np.save(tmp_path / "wrong.npy", wrong)
        assert distill(folders, tmp_path / "c", "--text", f"{tmp_path}/wrong.npy") == cli.USAGE
    (tmp_path / "wrong.npy").write_text("no array")
    assert distill(folders, tmp_path / "c", "--text", f"{tmp_path}/wrong.npy") == cli.USAGE
    assert capsys.readouterr().err.count("--text: expected") == 4


def test_accumulation_is_a_larger_batch(folders, tmp_path):
    more = ["--steps", "1", "--batch", "4", "--accumulate", "1"]
    assert distill(folders, tmp_path / "a", "--steps", "1") == 0
    assert distill(folders, tmp_path / "b", *more) == 0
    a, b = (rows(tmp_path / name)[1] for name in "ab")
    assert [float(x) for x in a[1:4]] == pytest.approx([float(x) for x in b[1:4]], rel=1e-4)


def test_the_rate_rises_and_falls(folders):
    options = _train.Distill("m", "t", "o", steps=100, warm_up=10)
    rates = [_train.schedule(step, options) for step in range(100)]
    assert rates[0] < 0.11 and max(rates) > 0.95 and rates[-1] < 1e-3
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_what_cannot_be_used_is_one_line(folders, tmp_path, capsys):
    assert distill(folders, tmp_path / "a", "--steps", "1") == 0
    wrong = (
        ("--steps", "2"),
        ("--model", str(tmp_path)),
        ("--text", str(tmp_path / "none")),
        ("--context", "100000"),
        ("--batch", "0"),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--warm-up", "-1"),
        ("--seed", "99999999999999999999"),
        ("--seed", "-1"),
        ("--out", str(folders / "model")),
    )
    capsys.readouterr()
    for option in wrong:
        expected = "--text" if option[0] == "--context" else option[0]
        out = tmp_path / "a" if option[0] == "--steps" else tmp_path / "b"
        assert distill(folders, out, *option) == cli.USAGE
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and f"{expected}: expected" in lines[0]


def test_a_model_that_cannot_be_read_is_one_line(folders, tmp_path, capsys):
    (tmp_path / "config.json").write_text((folders / "model" / "config.json").read_text())
    assert distill(folders, tmp_path / "out", "--model", str(tmp_path)) == cli.USAGE
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    paths = ["--model", tmp_path, "--gates", tmp_path, "--text", folders / "text"]
    assert cli.main(["eval", *map(str, paths), "--device", "cpu"]) == cli.USAGE
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("seer-cuda: --model: expected") for line in lines) == 2


def test_gates_of_another_model_are_one_line(folders, tmp_path, capsys):
    assert distill(folders, tmp_path / "a", "--steps", "1") == 0
    make_model("qwen3", vocab_size=256, layers=3).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_text((folders / "model" / name).read_text())
    paths = ["--model", tmp_path / "model", "--gates", tmp_path / "a", "--text", folders / "text"]
    capsys.readouterr()
    assert cli.main(["eval", *map(str, paths), "--device", "cpu", "--context", "160"]) == cli.USAGE
    assert capsys.readouterr().err.startswith("seer-cuda: seer::load_gates: model.layers.2.")


def test_a_gradient_that_is_not_finite_reaches_no_weight(folders, tmp_path, monkeypatch, capsys):
    loss = _train.gate_loss

    def exploding(model):
        out = loss(model)
        out.register_hook(lambda grad: grad * float("inf"))
        return out

    monkeypatch.setattr(_train, "gate_loss", exploding)
    assert distill(folders, tmp_path / "a", "--save-every", "1") == cli.USAGE
    assert "expected a finite gradient, got" in capsys.readouterr().err
    assert not (tmp_path / "a" / "checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_stops_the_run(folders, tmp_path, monkeypatch, capsys):
    nan = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(_train, "gate_loss", lambda model: nan * 1)
    assert distill(folders, tmp_path / "a") == cli.USAGE
    assert "expected a finite loss, got nan in step 1" in capsys.readouterr().err
    assert not (tmp_path / "a" / "checkpoint.pt").exists()


def test_one_token_is_no_window(folders, tmp_path, capsys):
    assert distill(folders, tmp_path / "a", "--context", "1") == cli.USAGE
    assert "--context: expected at least 2, got 1." in capsys.readouterr().err


def test_a_weight_that_is_not_finite_is_not_saved(folders, tmp_path, monkeypatch, capsys):
    """In the last step no loss would show it any more."""

    def exploding(optimiser):
        for group in optimiser.param_groups:
            for weight in group["params"]:
                weight.data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", exploding)
    assert distill(folders, tmp_path / "a", "--steps", "1") == cli.USAGE
    assert "--lr: expected a finite weight, got nan in step 1." in capsys.readouterr().err
    assert not list((tmp_path / "a").glob("*.pt")) + list((tmp_path / "a").glob("*.safetensors"))


def test_processes_without_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RunError, match=r"LOCAL_RANK: expected .+, got .+"), _ranks.joined("cuda"):
        pass
