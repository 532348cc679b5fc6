# SPDX-License-Identifier: Apache-2.0
"""bench.experiment on a CPU: the corpus' rules, training, resuming, the stages in order."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from bench.experiment import __main__ as command
from bench.experiment import corpus, driver, evaluate, prefill, results, summary, train
from bench.experiment.settings import FULL, TINY
from seer_cuda.integrations.transformers import _study

WORDS = ["alpha", "beta", "gamma", "delta", "value", "result", "index", "total", "count", "item"]


def source(seed, lines):
    """Python-like text."""
    draw = np.random.default_rng(seed)
    return "\n".join(
        f"def {WORDS[draw.integers(10)]}_{seed}_{n}(a_{WORDS[draw.integers(10)]}):\n    return {n}"
        for n in range(lines)
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of packages: some to train on, some to hold out, what does not count."""
    root = tmp_path_factory.mktemp("site")
    for at in range(8):
        (root / f"package{at}" / "inner").mkdir(parents=True)
        for part in range(4):
            text = source(10 * at + part, 200)
            (root / f"package{at}" / "inner" / f"part{part}.py").write_text(text)
        (root / f"package{at}" / "copy.py").write_text(source(999, 100))
    (root / "package0" / "_vendor").mkdir()
    (root / "package0" / "_vendor" / "other.py").write_text(source(1000, 100))
    (root / "package0" / "table.py").write_text("x = [" + "1, 2, 3, " * 500 + "]")
    (root / "package0" / "binary.py").write_bytes(b"\xff\xfe" * 300)
    (root / "package0-1.0.dist-info").mkdir()
    (root / "package0-1.0.dist-info" / "notes.py").write_text(source(1001, 100))
    return root


SETTINGS = replace(
    TINY, held_out_bytes=20_000, validation_bytes=20_000, package_bytes=(1000, 10**6)
)


def test_files_that_count(site):
    found = {package.name: package for package in corpus.packages([site])}
    assert sorted(found) == [f"package{at}" for at in range(8)]
    paths = [path for path, _ in found["package0"].files]
    assert paths == ["package0/copy.py"] + [f"package0/inner/part{at}.py" for at in range(4)]


def test_whole_packages_are_held_out_by_their_names(site):
    first, second = (corpus.split(corpus.packages([site]), SETTINGS) for _ in range(2))
    names = {part: [package.name for package in own] for part, own in first.items()}
    assert names == {part: [package.name for package in own] for part, own in second.items()}
    assert sorted(name for own in names.values() for name in own) == [
        f"package{at}" for at in range(8)
    ]
    assert all(names.values())
    for part, wanted in (("test", 20_000), ("validation", 20_000)):
        sizes = [package.size for package in first[part]]
        assert sum(sizes) >= wanted - 5000 and sum(sizes[:-1]) < wanted


def test_a_file_is_in_one_package_only_and_held_out_first(site):
    parts = corpus.split(corpus.packages([site]), SETTINGS)
    owners = [
        part
        for part, own in parts.items()
        for package in own
        for path, _ in package.files
        if path.endswith("copy.py")
    ]
    assert owners == ["test"]


def test_near_copies_of_held_out_files_are_not_trained_on(site, tmp_path):
    parts = corpus.split(corpus.packages([site]), SETTINGS)
    text = parts["test"][0].files[-1][1]
    (tmp_path / "other").mkdir()
    lines = text.splitlines()
    (tmp_path / "other" / "near.py").write_text("\n".join([*lines[:-40], source(77, 20)]))
    (tmp_path / "other" / "far.py").write_text("\n".join([*lines[:100], source(78, 200)]))
    found = corpus.packages([site, tmp_path])
    kept = {
        name: part
        for part, own in corpus.split(
            found, replace(SETTINGS, package_bytes=(20_000, 10**6))
        ).items()
        for package in own
        for name, _ in package.files
    }
    assert "other/near.py" not in kept and kept["other/far.py"] == "train"


@pytest.fixture(scope="module")
def folder(site, tmp_path_factory):
    """A corpus."""
    folder = tmp_path_factory.mktemp("run")
    corpus.run(folder, SETTINGS, [site], library=False)
    return folder


def test_tokens_are_the_files_in_order(site, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    report = json.loads((folder / "corpus.json").read_text())
    parts = corpus.split(corpus.packages([site]), SETTINGS)
    for name, found in parts.items():
        text = "".join(
            f"{corpus.FILE_TOKEN}# {path}\n{text}" for one in found for path, text in one.files
        )
        tokens = np.load(folder / f"{name}.npy")
        assert tokenizer.decode(tokens.tolist()) == text
        assert sum(row["tokens"] for row in report["splits"][name]) == tokens.size
    assert (tokens == 0).sum() == sum(len(one.files) for one in found)


def test_windows_lie_within_packages_and_do_not_overlap(folder):
    length = 512
    tokens = np.load(folder / "test.npy")
    rows = json.loads((folder / "corpus.json").read_text())["splits"]["test"]
    windows = corpus.windows(folder, "test", 1000, length)
    assert len(windows) == sum(row["tokens"] // length for row in rows)
    first, wanted = 0, []
    for row in rows:
        own = tokens[first : first + row["tokens"] // length * length]
        wanted.append(own.reshape(-1, length))
        first += row["tokens"]
    assert np.array_equal(windows, np.concatenate(wanted).astype(np.int64))
    few = corpus.windows(folder, "test", 3, length)
    assert np.array_equal(few[[0, -1]], windows[[0, -1]]) and len(few) == 3
    with pytest.raises(ValueError, match="expected a package of 10000000 tokens"):
        corpus.windows(folder, "test", 3, 10_000_000)


def test_a_row_of_windows_is_a_batch_of_them():
    """The loss and its gradients of the packed row against transformers' own model."""
    trainer = train.Trainer(TINY, 97, "cpu")
    windows = torch.randint(97, (3, 41), generator=torch.Generator().manual_seed(0))
    loss = trainer.loss(windows)
    own = torch.autograd.grad(loss, list(trainer.model.parameters()))
    trainer.model.set_attn_implementation("eager")
    want = trainer.model(windows[:, :-1]).logits
    want = torch.nn.functional.cross_entropy(want.flatten(0, 1), windows[:, 1:].flatten())
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(own, torch.autograd.grad(want, list(trainer.model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_schedule_follows_the_time():
    assert [train.context_at(at, FULL.phases) for at in (0.0, 0.34, 0.36, 0.59, 0.61, 1.0)] == [
        2048,
        2048,
        8192,
        8192,
        32768,
        32768,
    ]
    rates = [train.rate_at(at / 100, 1.0) for at in range(101)]
    assert rates[0] == 0 and max(rates) > 0.99 and 0.04 < rates[-1] < 0.06
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert sum(share for _, share in FULL.phases) == pytest.approx(1.0)


def test_training_goes_on_after_a_kill(folder, tmp_path, monkeypatch):
    for name in ("tokenizer", "train.npy"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.setattr(train, "_SAVE_SECONDS", 0.0)
    step = train.Trainer.step

    rates = []

    def killed(self, windows, rate):
        rates.append(rate)
        if len(rates) == 3:
            raise KeyboardInterrupt
        return step(self, windows, rate)

    settings = replace(TINY, minutes=0.1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "step", killed)
        train.run(tmp_path, settings, "cpu")
    state = torch.load(tmp_path / "train" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and state["seconds"] > 0
    said = []
    train.run(tmp_path, settings, "cpu", said.append)
    assert said[0].startswith(f"going on after step {state['step']}")
    rows = (tmp_path / "train" / "log.csv").read_text().splitlines()
    assert rows[0] == ",".join(train._COLUMNS) and sum(row == rows[0] for row in rows) == 1
    # Done: nothing is left to do.
    assert train.run(tmp_path, settings, "cpu") == tmp_path / "model"


def test_a_cut_line_is_measured_again_and_spoils_none(tmp_path, monkeypatch):
    path = tmp_path / "points_baselines_test.jsonl"
    path.write_text('{"window": 0, "points": []}\n{"window": 1, "poi')
    monkeypatch.setattr(evaluate, "model_with_gates", lambda *args: None)
    monkeypatch.setattr(corpus, "windows", lambda *args: np.zeros((3, 4), np.int64))
    measured = []
    monkeypatch.setattr(evaluate, "_calibrated", lambda *args: [])
    monkeypatch.setattr(_study, "measure", lambda *args, window: measured.append(window) or [])
    evaluate.run(tmp_path, SETTINGS, evaluate.BASELINES, "cpu", lambda text: None)
    assert measured == [0, 1, 2, 1, 2]  # validation, then what the test lacks
    assert [json.loads(line)["window"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_steps_that_are_done_again_are_logged_once(folder, tmp_path, monkeypatch):
    """Killed before the first checkpoint: the log then begins anew."""
    for name in ("tokenizer", "train.npy", "corpus.json"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "log.csv"
    path.write_text(",".join(train._COLUMNS) + "\r\n20,1.0,128,100,5.0,0.1,1.0\r\n40,2")
    train.run(tmp_path, replace(SETTINGS, minutes=0.01), "cpu", lambda text: None)
    lines = path.read_text().splitlines()
    steps = [int(line.split(",")[0]) for line in lines[1:]]
    assert lines[0] == ",".join(train._COLUMNS) and steps[0] == 1
    assert steps == sorted(set(steps))
    assert (tmp_path / "model" / "config.json").is_file()
    # Goes on after step 1: later rows are gone, a row that was cut off too.
    path.write_text("\n".join([lines[0], lines[1], "20,1.0,128,100,5.0,0.1,1.0", "40,2"]))
    assert train._log_until(path, 1).read_text().splitlines() == lines[:2]


def test_released_files_from_the_published_shapes_load(tmp_path):
    from hf_models import make_model

    from seer_cuda.integrations import transformers as seer_hf

    model = make_model("llama", heads=(4, 2), head_dim=64)
    prefill.released_adapter(tmp_path, layers=2, heads=4, head_dim=64)
    seer_hf.load_gates(model, tmp_path)
    rule = seer_hf.attached_config(model).rule
    assert (rule.method, rule.value, rule.dense_last_rows) == ("density", 0.1, 0)
    weights = torch.load(tmp_path / "attn_gate_weights.pth", weights_only=True)
    key = "model.layers.1.self_attn.attn_gate.mask_linear_k.weight"
    assert torch.equal(seer_hf.gates(model)[1].mask_linear_k.weight, weights[key].float())


class Stages:
    """Jobs that write their name, and may fail the first time."""

    def __init__(self, folder):
        self.folder = folder

    def job(self, name, after=(), gpu="any", fails=False):
        file = self.folder / f"{name}.ran"
        script = (
            "import os, sys, pathlib\n"
            f"path = pathlib.Path({str(file)!r}); again = path.exists()\n"
            "gpu = os.environ.get('CUDA_VISIBLE_DEVICES', '-')\n"
            "with path.open('a') as f: f.write(gpu + '\\n')\n"
            f"sys.exit(1 if {fails} and not again else 0)\n"
        )
        (self.folder / f"{name}.py").write_text(script)
        return driver.Job(name, (str(self.folder / f"{name}.py"),), after, gpu)

    def ran(self, name):
        return (self.folder / f"{name}.ran").read_text().split()


def run_driver(stages, todo, gpus, monkeypatch):
    started = driver.subprocess.Popen

    def popen(words, **options):
        return started([sys.executable, words[3]], **options)

    monkeypatch.setattr(driver.subprocess, "Popen", popen)
    monkeypatch.setattr(driver, "_POLL_SECONDS", 0.02)
    return driver.Driver(stages.folder, todo, gpus, []).run()


def test_the_driver_keeps_order_gpus_and_what_is_done(tmp_path, monkeypatch):
    stages = Stages(tmp_path)
    todo = [
        stages.job("b", after=("a",), gpu="first"),
        stages.job("a", gpu="none", fails=True),
        stages.job("c", after=("b",)),
        stages.job("d", after=("b",)),
    ]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run_driver(stages, todo, ["3", "5"], monkeypatch) == []
    assert stages.ran("a") == ["-", "-"] and stages.ran("b") == ["3"]
    assert sorted(stages.ran("c") + stages.ran("d")) == ["3", "5"]
    assert run_driver(stages, todo, ["3"], monkeypatch) == []
    assert len(stages.ran("b")) == 1


def test_a_gpu_that_comes_later_is_waited_for(tmp_path, monkeypatch):
    stages = Stages(tmp_path)
    todo = [stages.job("one", gpu="last"), stages.job("two", gpu="first")]
    began = driver.time.monotonic()
    assert run_driver(stages, todo, ["0", "1@1.5"], monkeypatch) == []
    assert driver.time.monotonic() - began >= 1.5
    assert stages.ran("one") == ["1"] and stages.ran("two") == ["0"]


def test_the_driver_says_what_is_left(tmp_path, monkeypatch):
    stages = Stages(tmp_path)
    bad = stages.job("bad")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    todo = [bad, stages.job("next", after=("bad",)), stages.job("other")]
    assert run_driver(stages, todo, ["0"], monkeypatch) == ["next", "bad"]
    assert "status 3" in (tmp_path / "progress.txt").read_text()
    assert stages.ran("other") == ["0"]


def test_every_stage_has_a_command():
    for job in driver.jobs(FULL):
        options = command.parser().parse_args([*job.arguments, *command._passed_on(_options())])
        assert options.stage == job.arguments[0]
    known = {job.name for job in driver.jobs(FULL)}
    assert all(set(job.after) <= known for job in driver.jobs(FULL))


def _options():
    return command.parser().parse_args(["all", "--minutes", "1", "--windows", "3"])


@pytest.mark.slow
def test_the_whole_experiment(site, tmp_path, monkeypatch):
    """Every stage on small sizes, twice: the second time does nothing but collect."""
    words = ["all", "--size", "tiny", "--folder", str(tmp_path), "--packages", str(site)]
    collected, collect = [], results.collect
    monkeypatch.setattr(results, "collect", lambda *args: collected.append(args) or collect(*args))
    assert command.main(words) == 0
    # After each of corpus, train, three distillations, four evaluations, and at the end.
    assert len(collected) == 10
    found = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert set(found["distil"]) == {"0", "1"} and found["train"]["steps"] > 0
    assert set(found["variants"]) == set(TINY.variants)
    gate = [row for row in found["eval"]["rows"] if row["method"] == "learned gate"]
    assert len(gate) == 3 * len(TINY.densities)  # a count and two adaptive rules
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in gate)
    other = summary.variant(TINY.variants[0])
    methods = {*_study.METHODS, other}
    for density in TINY.densities:
        own = [row for row in found["eval"]["adaptive"] if row["target"] == density]
        assert {row["method"] for row in own} == methods and len(own) == len(methods)
    for pairs in found["eval"]["paired"].values():
        assert len(pairs) == len(TINY.densities) * len(_study.BASELINES)
    assert evaluate.load_example(tmp_path / "out" / "example.pt").mask.heads == 2
    before = (tmp_path / "progress.txt").read_text()
    assert command.main(words) == 0
    assert (tmp_path / "progress.txt").read_text().removeprefix(before).count("\n") == 1
