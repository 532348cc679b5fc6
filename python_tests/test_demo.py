# SPDX-License-Identifier: Apache-2.0
"""The demo's parts at sizes that take seconds: text, configuration, model, fairness, report."""

import dataclasses
import io
import json
import math
import re
import time

import pytest
import torch
from rich.console import Console

import seer_cuda
from seer_cuda.demo import config as configuration
from seer_cuda.demo import report, run, text
from seer_cuda.demo.config import LARGE, SMALL, ConfigError, make_config
from seer_cuda.demo.console import stage
from seer_cuda.demo.distil import cosine_factor, make_gates
from seer_cuda.demo.evaluate import (
    GATE,
    METHODS,
    ORACLE,
    RANDOM,
    SINK_LOCAL,
    Evaluator,
    Example,
    Quality,
    Results,
    Row,
    Scorer,
    keep,
)
from seer_cuda.demo.figure import draw
from seer_cuda.demo.model import CausalLM, dense_attention, next_byte_loss
from seer_cuda.demo.text import Corpus, TextError
from seer_cuda.demo.train import Pace, orthogonalised, rate_factor

TINY = dataclasses.replace(
    SMALL,
    model=dataclasses.replace(SMALL.model, layers=2, width=32, mlp=32, head_dim=16, context=640),
    train=dataclasses.replace(SMALL.train, steps=3, tokens=640, short_context=320, warm_up=1),
    distil=dataclasses.replace(SMALL.distil, steps=2, windows=1, warm_up=1),
    evaluation=dataclasses.replace(
        SMALL.evaluation, windows=2, windows_at_once=1, timing_repeats=1
    ),
    block=16,
)


def random_corpus(size=20_000):
    stream = torch.randint(97, 123, (size,), generator=torch.Generator().manual_seed(0)).byte()
    return Corpus("letters", stream, stream.flip(0), (1, 1))


# -------------------------------------------------------------------------------------- text


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def small_text(folder):
    for index in range(12):
        write(folder, f"{index}.txt", f"some words, file {index}\n".encode() * 300)
    return folder


def test_split_is_by_file_and_the_same_every_time(tmp_path):
    for index in range(20):
        write(tmp_path, f"part{index % 3}/{index}.txt", f"file {index} ".encode() * 100)
    first, second = (text.load(tmp_path, 100, 100) for _ in range(2))
    assert torch.equal(first.train, second.train) and torch.equal(first.held_out, second.held_out)
    assert sum(first.files) == 20
    names = [
        {int(part.split()[1]) for part in bytes(stream.tolist()).decode().split("\0")}
        for stream in (first.train, first.held_out)
    ]
    assert not names[0] & names[1] and names[0] | names[1] == set(range(20))
    share = first.held_out.numel() / (first.held_out.numel() + first.train.numel())
    assert 0.09 < share < 0.2


def test_a_single_file_is_cut_at_a_line(tmp_path):
    write(tmp_path, "a.txt", b"".join(b"line %d\n" % i for i in range(1000)))
    corpus = text.load(tmp_path / "a.txt", 100, 100)
    whole = (tmp_path / "a.txt").read_bytes()
    assert bytes(corpus.train.tolist()) + bytes(corpus.held_out.tolist()) == whole
    assert bytes(corpus.train[-1:].tolist()) == b"\n"
    assert corpus.held_out.numel() / len(whole) == pytest.approx(0.1, abs=0.01)


def test_what_is_not_text_is_left_out(tmp_path):
    write(tmp_path, "good.txt", b"words " * 1000)
    write(tmp_path, "latin1.txt", b"\xe9" * 1000)
    write(tmp_path, "binary.bin", b"a\0b" * 1000)
    write(tmp_path, "empty.txt", b" \n")
    write(tmp_path, ".hidden/x.txt", b"secret " * 1000)
    assert text.load(tmp_path, 10, 10).files == (1, 1)
    assert b"secret" not in bytes(text.load(tmp_path, 10, 10).train.tolist())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file or folder"),
        (b"", "no text found"),
        (b"short\n" * 50, "too little text"),
    ],
)
def test_text_errors_say_what_is_needed(tmp_path, content, expected):
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=expected):
        text.load(path, SMALL.train_bytes, SMALL.held_out_bytes)


def test_default_text_suffices_for_every_size():
    corpus = text.load(None, LARGE.train_bytes, LARGE.held_out_bytes)
    assert "standard library" in corpus.name and min(corpus.files) > 1


def test_windows_are_consecutive_bytes():
    stream = torch.arange(200, dtype=torch.uint8)
    corpus = Corpus("counting", stream, stream, (1, 1))
    windows = corpus.held_out_windows(4, 50)
    assert windows.flatten().tolist() == list(range(200))
    sampled = corpus.sample(8, 30, torch.Generator().manual_seed(0))
    assert (sampled.diff() == 1).all()
    with pytest.raises(TextError, match="held-out windows"):
        corpus.held_out_windows(5, 50)


# ------------------------------------------------------------------------------ configuration


def test_sizes_are_consistent():
    for config in configuration.SIZES.values():
        model, train = config.model, config.train
        assert model.context % config.block == 0 and config.blocks >= configuration.LEAST_BLOCKS
        assert train.tokens % model.context == 0 and train.tokens % train.short_context == 0
        for density in config.evaluation.densities:
            assert seer_cuda.select.density_to_k(density, config.blocks) >= 2
        assert config.gate().single_linear


def test_overrides_replace_one_number_each():
    config = make_config("small", "cpu", seed=3, steps=7, distil_steps=5, windows=2, context=4096)
    assert (config.seed, config.train.steps, config.distil.steps) == (3, 7, 5)
    assert (config.evaluation.windows, config.model.context) == (2, 4096)
    assert config.train.warm_up == 7 and config.train.tokens == 4096
    assert config.train.seconds is None and config.distil.seconds is None
    assert config.model.width == SMALL.model.width


def test_cuda_gets_blocks_that_its_kernels_have():
    config = make_config("small", "cuda")
    assert config.block == 64 and config.blocks == SMALL.blocks and config.dtype is torch.bfloat16
    assert make_config("large", "cuda").block == LARGE.block


@pytest.mark.parametrize("name", ["steps", "distil_steps", "windows", "context"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: expected at least 1"):
        make_config("small", "cpu", **{name: 0})


def test_schedules_start_low_and_end_at_zero():
    for config, factor in ((SMALL.train, rate_factor), (SMALL.distil, cosine_factor)):
        factors = [factor(step, step / config.steps, config) for step in range(config.steps)]
        assert factors[0] == pytest.approx(1 / config.warm_up) and max(factors) > 0.9
        assert 0 < factors[-1] < 0.01


def test_a_slow_machine_stops_at_the_time_limit_with_rates_at_zero(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    pace, step, rates = Pace(1000, 20.0), 0, []
    while (progress := pace(step)) < 1:
        rates.append(rate_factor(step + 20, progress, SMALL.train))
        step += 1
    assert step == 19 and rates[0] == 1 and rates[-1] == pytest.approx(0.1)
    assert Pace(4, None)(3) == 0.75


# ------------------------------------------------------------------------- model and optimiser


def test_the_model_is_causal():
    torch.manual_seed(0)
    model = CausalLM(TINY.model)
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.randint(256, (1, 64))
    changed = tokens.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


def test_an_untrained_key_is_the_query_of_the_token_before():
    inputs = []
    model = CausalLM(TINY.model)
    model(torch.randint(256, (1, 9)), lambda x: (inputs.append(x), dense_attention(x))[1])
    x = inputs[0]
    first_of_group = x.q[:, :, :: x.q.shape[2] // x.k.shape[2]]
    torch.testing.assert_close(x.k[:, 1:], first_of_group[:, :-1])


def test_an_untrained_model_is_uniform():
    tokens = torch.randint(256, (2, 33))
    losses = next_byte_loss(CausalLM(TINY.model)(tokens[:, :-1]), tokens)
    assert losses.mean().item() == pytest.approx(math.log(256), abs=1e-4)


def test_orthogonalised_keeps_directions_and_evens_out_sizes():
    generator = torch.Generator().manual_seed(0)
    for shape in [(2, 8, 24), (2, 24, 8)]:
        matrices = torch.randn(shape, generator=generator)
        result = orthogonalised(matrices)
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        sizes = torch.linalg.svdvals(result)
        assert (sizes > 0.6).all() and (sizes < 1.3).all()
        middle = u.mT @ result @ vh.mT
        assert torch.allclose(middle, torch.diag_embed(middle.diagonal(dim1=1, dim2=2)), atol=1e-3)


# -------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def tiny_run():
    """Results of an evaluation of an untrained model, and every mask that was asked for."""
    torch.manual_seed(0)
    model = CausalLM(TINY.model).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    gates = make_gates(TINY).requires_grad_(False)
    evaluator = Evaluator(TINY, model, gates, random_corpus())
    notes = []
    return evaluator, evaluator.run(notes.append), notes


def test_every_method_keeps_the_diagonal_and_equally_many_blocks(tiny_run):
    evaluator, _, _ = tiny_run
    inputs = []

    def attention(x):
        inputs.append(x)
        return dense_attention(x)

    evaluator.model(evaluator.batches[0][:, :-1], attention)
    score = Scorer(TINY, evaluator.gates)
    row = torch.arange(TINY.blocks)
    for density in TINY.evaluation.densities:
        k = seer_cuda.select.density_to_k(density, TINY.blocks)
        for method in METHODS:
            mask = keep(score(method, inputs[1], 0), density, TINY).validate().to_dense()
            assert (mask.sum(-1) == (row + 1).clamp_max(k)).all(), method
            assert mask.diagonal(dim1=-2, dim2=-1).all(), method
    window = keep(score(SINK_LOCAL, inputs[1], 0), 0.25, TINY).to_dense()[0, 0]
    k = seer_cuda.select.density_to_k(0.25, TINY.blocks)
    assert window[30].nonzero().flatten().tolist() == [0, *range(30 - k + 2, 31)]


def test_results_are_consistent(tiny_run):
    evaluator, results, notes = tiny_run
    assert len(notes) == evaluator.steps
    assert len(results.rows) == len(METHODS) * len(TINY.evaluation.densities)
    for density in TINY.evaluation.densities:
        oracle = results.row(ORACLE, density)
        assert oracle.recall == 1
        for method in METHODS:
            row = results.row(method, density)
            assert row.kept == pytest.approx(oracle.kept)
            assert 0 <= row.recall <= 1 and 0 < row.mass <= 1 + 1e-6
            assert row.ratio == pytest.approx(row.perplexity / results.dense_perplexity)
    assert 0 <= results.free_diagonal <= 1


def test_the_free_diagonal_counts_rows_with_a_choice():
    quality = Quality(TINY, None)
    assert quality.free_diagonal() == 1
    # The first block is best everywhere, so the diagonal is last: no row with a choice keeps it.
    worst = torch.arange(TINY.blocks, 0.0, -1).expand(1, 1, TINY.blocks, TINY.blocks)
    quality._note_diagonal(worst)
    assert quality.free_diagonal() == 0


def test_dense_perplexity_is_that_of_torch_attention(tiny_run):
    evaluator, results, _ = tiny_run
    with torch.no_grad():
        losses = [next_byte_loss(evaluator.model(b[:, :-1]), b) for b in evaluator.batches]
    expected = torch.cat(losses).double().mean().exp().item()
    assert results.dense_perplexity == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------ report


def synthetic(gate=(1.0, 1.02, 1.05), window=(1.02, 1.1, 1.3)):
    """Results with chosen perplexity ratios."""
    results = Results(4.0, 3.5, dense_ms=10.0, gate_ms=1.0, free_diagonal=0.97)
    densities = (0.5, 0.25, 0.1)
    ratios = {ORACLE: (1.0, 1.01, 1.04), GATE: gate, SINK_LOCAL: window, RANDOM: (1.3, 1.6, 2.0)}
    for method, values in ratios.items():
        for density, ratio in zip(densities, values, strict=True):
            parts = (density, 4 * ratio, ratio, 3.5 * ratio, ratio)
            row = Row(method, density, *parts, recall=0.8, mass=0.9, attention_ms=10 * density)
            results.rows.append(row)
    true = torch.rand(64, 64)
    results.example = Example(1, 2, 0.25, true, true > 0.5)
    return results


def test_findings_follow_from_the_numbers():
    lines = report.findings(synthetic())
    assert "the same perplexity as dense attention" in lines[0]
    assert "5 % more perplexity" in lines[2] and "sink + local +30.0 %" in lines[2]
    assert "beats sink + local at every density and beats random at every density" in lines[3]
    # log(1.3 / 1.05) / log(1.3 / 1.04) = 0.957; at 25 % it is 0.885, the least.
    assert "closes at least 88 % of the gap" in lines[3] and "(at 25 %)" in lines[3]
    assert "1.7x at 50 %, 2.9x at 25 %, 5.0x at 10 %" in lines[4]
    assert "97 % of the rows" in lines[5]
    assert "oracle +0.0 %" in report.findings(synthetic(gate=(0.9, 1, 1)))[0]


def test_findings_do_not_hide_a_defeat():
    partly = synthetic(gate=(1.0, 1.2, 1.4))
    assert "beats sink + local at 50 % only" in report.findings(partly)[3]
    assert report.beaten(partly, SINK_LOCAL) == [0.5]
    lost = synthetic(gate=(1.03, 1.2, 1.4))
    assert "beats sink + local at no density" in report.findings(lost)[3]


def test_table_and_figure_show_every_row(tmp_path):
    config = make_config("small", "cpu")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table(config, synthetic()))
    printed = console.export_text()
    assert all(printed.count(method) == 3 for method in METHODS)
    assert "5.200" in printed and "1.3000" in printed and "10.0x" in printed
    draw(config, synthetic(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_output_into_a_file_has_no_control_characters(capsys):
    with stage(Console(), "work", 8) as advance:
        for _ in range(8):
            advance("note")
    printed = capsys.readouterr().out
    lines = ["work: 2/8 note", "work: 4/8 note", "work: 6/8 note", "work: 8 of 8 steps in 0 s"]
    assert printed.splitlines() == lines
    assert "\x1b" not in printed and "\r" not in printed


def test_a_terminal_gets_bars_that_go_away():
    console = Console(force_terminal=True, color_system=None, file=io.StringIO(), width=100)
    with stage(console, "work", 2) as advance:
        advance("note")
        advance("")
    last = console.file.getvalue().splitlines()[-1]
    assert re.sub(r"\x1b\[\d*[A-Z]", "", last).startswith("work: 2 of 2 steps")


def test_a_whole_run_writes_what_it_says(tmp_path, capsys):
    source = small_text(tmp_path / "text")
    out = tmp_path / "new" / "folder"
    results = run.run(TINY, source, out)
    printed = capsys.readouterr().out
    assert "At equal cost the learned gate" in printed and "\x1b" not in printed
    data = json.loads((out / "results.json").read_text())
    assert data["dense"]["perplexity"] == results.dense_perplexity
    assert len(data["rows"]) == len(results.rows)
    assert data["steps_made"] == {"train": TINY.train.steps, "distil": TINY.distil.steps}
    assert data["config"]["model"]["context"] == TINY.model.context
    assert (out / "figure.png").stat().st_size > 10_000


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    source = small_text(tmp_path / "text")
    config = dataclasses.replace(
        TINY, evaluation=dataclasses.replace(TINY.evaluation, densities=(0.25,))
    )
    first, second = (run.run(config, source, tmp_path / "out") for _ in range(2))
    for a, b in zip(first.rows, second.rows, strict=True):
        assert (a.perplexity, a.recall, a.mass) == (b.perplexity, b.recall, b.mass)


@pytest.mark.gpu
def test_a_whole_run_on_the_gpu(tmp_path):
    config = make_config("small", "cuda", steps=3, distil_steps=2, windows=2)
    results = run.run(config, None, tmp_path)
    assert results.dense_perplexity < 1000
    assert all(math.isfinite(row.perplexity) and row.mass > 0 for row in results.rows)
