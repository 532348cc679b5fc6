# SPDX-License-Identifier: Apache-2.0
"""python -m seer_cuda eval --out: every method at every density, against a plain definition."""

import json
import math

import pytest
import torch
from hf_models import BLOCK, attached, defined_logits, make_model, tokens

from seer_cuda import cli, select
from seer_cuda.integrations import transformers as seer_hf

pytest.importorskip("transformers")

from seer_cuda.integrations.transformers import _report, _study

ROWS = 9 * BLOCK + 5  # ten blocks, the last one short
DENSITIES = (0.6, 0.45)


@pytest.fixture(scope="module")
def model():
    return attached("llama", mode="dense")


@pytest.fixture(scope="module")
def window():
    return tokens(1, ROWS, seed=3)[0]


@pytest.fixture(scope="module")
def points(model, window):
    return _study.measure(model, window, _study.selections(DENSITIES, (0.05,)), window=2)


def prompts(model, window):
    """What every layer's attention is given."""
    seen = []
    with _study.choosing(model, seen.append):
        _study._losses(model, window)
    return seen


def nats(logits, window):
    return -logits[0, :-1].log_softmax(-1).gather(-1, window[1:, None])[:, 0]


def test_every_selection_has_a_point(points):
    assert [point.method for point in points[: 1 + len(_study.METHODS)]] == [
        "dense",
        *_study.METHODS,
    ]
    assert len(points) == 1 + 2 * len(_study.METHODS) + 1
    assert {point.window for point in points} == {2}
    assert points[-1].rule == "threshold" and points[-1].recall is None


def test_the_dense_loss_is_the_models_own(model, window, points):
    want = nats(defined_logits(model, window[None], lambda *_: None), window)
    assert points[0].loss == pytest.approx(want.mean().item(), rel=1e-5)
    assert points[0].late_loss == pytest.approx(want[len(want) // 2 :].mean().item(), rel=1e-5)


def test_losses_are_those_of_the_kept_blocks(model, window, points):
    """Sparse losses of two methods against a model in float64 with the same blocks."""
    own = {(point.method, point.value): point for point in points}
    n = -(-ROWS // BLOCK)

    def nearest(layer, q, k):
        k_kept = select.density_to_k(0.45, n)
        order = torch.arange(n).repeat(n, 1).float()
        order[:, 0], order = 100.0, order
        order = order.masked_fill(torch.eye(n, dtype=torch.bool), 200.0)
        order = order.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -1.0)
        kept = torch.zeros(n, n).scatter(1, order.topk(k_kept, 1).indices, 1.0).bool().tril()
        return kept.expand(1, 4, n, n), BLOCK

    want = nats(defined_logits(model, window[None], nearest), window).mean().item()
    assert own["sink + local", 0.45].loss == pytest.approx(want, rel=1e-4)

    def gate(layer, q, k):
        scores = seer_hf.gates(model)[layer](q, k)
        scores = scores.masked_fill(torch.eye(n, dtype=torch.bool), torch.inf)
        k_kept = select.density_to_k(0.45, n)
        kept = torch.zeros_like(scores).scatter(-1, scores.topk(k_kept, -1).indices, 1.0)
        return kept.bool().tril(), BLOCK

    want = nats(defined_logits(model, window[None], gate), window).mean().item()
    assert own["learned gate", 0.45].loss == pytest.approx(want, rel=1e-4)


def test_all_methods_keep_equally_many_blocks_in_every_row(model, window):
    for prompt in prompts(model, window):
        for density in DENSITIES:
            counts = [
                _study.choose(_study.Selection(method, "density", density), prompt)
                .to_dense()
                .expand(1, 4, -1, -1)
                .sum(-1)
                for method in _study.METHODS
            ]
            n = -(-ROWS // BLOCK)
            k = select.density_to_k(density, n)
            want = torch.arange(1, n + 1).clamp_max(k).expand(1, 4, n)
            assert all(torch.equal(count, want) for count in counts)


def test_recall_and_mass_against_their_definitions(model, window, points):
    own = {(point.method, point.value): point for point in points if point.rule == "density"}
    n = -(-ROWS // BLOCK)
    found = {"recall": 0.0, "mass": 0.0}
    layers = prompts(model, window)
    for prompt in layers:
        q, k = (x.double() for x in (prompt.q, prompt.k))
        k = k.repeat_interleave(2, 2)
        scores = torch.einsum("brhd,bchd->bhrc", q, k) * q.shape[-1] ** -0.5
        hidden = torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1)
        prob = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        kept = _study.choose(_study.Selection("random", "density", 0.45), prompt, 2).to_dense()
        best = _study.choose(_study.Selection("oracle", "density", 0.45), prompt).to_dense()
        row = torch.arange(n)
        counted = (row >= select.density_to_k(0.45, n))[:, None] & (row[:, None] != row)
        found["recall"] += (kept & best & counted).sum() / (best & counted).sum() / len(layers)
        at = torch.arange(ROWS) // BLOCK
        shares = (prob * kept[:, :, at][:, :, :, at]).sum(-1)
        # Each block of rows counts once, a short one too.
        blocks = [part.mean(-1) for part in shares.split(BLOCK, -1)]
        found["mass"] += torch.stack(blocks, -1).mean() / len(layers)
    point = own["random", 0.45]
    assert point.recall == pytest.approx(float(found["recall"]), abs=1e-6)
    assert point.mass == pytest.approx(float(found["mass"]), abs=1e-5)
    assert own["oracle", 0.45].recall == 1.0
    assert own["oracle", 0.45].kept == own["random", 0.45].kept


def test_density_one_is_the_dense_model(model, window):
    one = [_study.Selection("learned gate", "density", 1.0)]
    dense, whole = _study.measure(model, window, one)
    assert whole.loss == pytest.approx(dense.loss, rel=1e-5)
    assert (whole.kept, whole.mass) == (1.0, pytest.approx(1.0, abs=1e-6))


def test_the_model_is_as_before(model, window):
    assert seer_hf.attached_config(model).mode == "dense"
    before = model(window[None]).logits
    with pytest.raises(ZeroDivisionError), _study.choosing(model, lambda prompt: 1 / 0):
        _study._losses(model, window)
    assert seer_hf.attached_config(model).mode == "dense"
    assert torch.equal(model(window[None]).logits, before)


def test_ratios_are_paired():
    def point(window, method, loss):
        return _study.Point(window, method, "density", 0.5, loss, loss)

    pairs = [(0, 1.0, 1.1), (1, 3.0, 3.3)]
    points = [point(w, "dense", dense) for w, dense, _ in pairs]
    points += [point(w, "random", sparse) for w, _, sparse in pairs]
    _, row = _study.summarise(points)
    assert row["ratio"] == pytest.approx(math.exp(0.2))
    assert row["ratio_error"] == pytest.approx(math.exp(0.2) * 0.1)
    assert row["windows"] == 2


def test_layer_times_have_every_layer_and_density(model, window):
    rows = _study.layer_times(model, window, DENSITIES, repeats=1)
    assert [(row["layer"], row["density"]) for row in rows] == [
        (layer, density) for layer in (0, 1) for density in DENSITIES
    ]
    assert all(row[key] > 0 for row in rows for key in ("dense_ms", "gate_ms", "sparse_ms"))


def test_lines_that_were_not_measured_are_not_drawn():
    row = {"method": "random", "rule": "density", "kept": 0.5}
    assert _report.curves([{"method": "dense"}, row]) == {"random": [row]}


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    model = make_model("llama", vocab_size=256)
    model.save_pretrained(tmp_path / "model")
    attached("llama", model=model)
    seer_hf.save_gates(model, tmp_path / "gates")
    (tmp_path / "text.txt").write_text("\n".join(f"{n} and {n * n}." for n in range(900)))
    paths = ["--model", tmp_path / "model", "--gates", tmp_path / "gates"]
    paths += ["--text", tmp_path / "text.txt", "--out", tmp_path / "out"]
    command = ["eval", *map(str, paths), "--device", "cpu", "--context", "200", "--windows", "2"]
    assert cli.main([*command, "--densities", "0.5", "0.2", "0.5", "--thresholds", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "learned gate    threshold 0.1" in printed and "vertical-slash" in printed
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    adaptive = [row for row in result["rows"] if row["target"] is not None]
    assert len(result["rows"]) - len(adaptive) == 1 + 2 * len(_study.METHODS) + 1
    assert len(adaptive) == 2 * 2 * (len(_study.METHODS) - 2)  # all but sink + local and random
    assert "topp" in printed and "mean 0.2" in printed
    assert {row["windows"] for row in result["rows"]} == {2}
    for name in (_report.ACCURACY, _report.ADAPTIVE, _report.TIME, _report.MASK):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    assert cli.main([*command, "--method", "topk", "--value", "2"]) == cli.USAGE
    assert "--method: expected none with --out" in capsys.readouterr().err
    assert cli.main([*command, "--calibration", "-1"]) == cli.USAGE
    assert "--calibration: expected 0 or more" in capsys.readouterr().err
    assert cli.main([*command, "--densities", "1.5"]) == cli.USAGE
    assert "--densities: expected each density in (0, 1], got 1.5." in capsys.readouterr().err
    assert cli.main([*command, "--thresholds", "nan"]) == cli.USAGE
    assert "--thresholds: expected" in capsys.readouterr().err
    del command[command.index("--out") : command.index("--out") + 2]
    assert cli.main([*command, "--densities", "0.5"]) == cli.USAGE
    assert "expected --out" in capsys.readouterr().err
