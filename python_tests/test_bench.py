# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own logic, without a GPU: masks, work, timing protocol, judging, running."""

from __future__ import annotations

import dataclasses
import math
import time
from types import SimpleNamespace

import pytest
import torch

from bench import masks, record, runner
from bench.cases import (
    ATTENTION,
    DENSITIES,
    MODELS,
    Case,
    all_cases,
    model_cases,
    newest_family,
)
from bench.problem import Problem, check, exact_row
from bench.report import OURS
from bench.runner import run_cases
from bench.timing import CudaClock, Schedule, launches_within, measure

SMALL = Case(heads_q=4, heads_kv=2, head_dim=16, rows_q=512, rows_kv=512, density=0.5)
CHUNK = dataclasses.replace(SMALL, rows_q=200, rows_kv=450)  # ragged, and fewer queries than keys


def token_visible(case: Case, row: int, key: int) -> bool:
    return not case.causal or key <= row + case.rows_kv - case.rows_q


def literal_visible(case: Case, i: int, j: int) -> bool:
    rows = range(i * case.block[0], min((i + 1) * case.block[0], case.rows_q))
    keys = range(j * case.block[1], min((j + 1) * case.block[1], case.rows_kv))
    return any(token_visible(case, row, key) for row in rows for key in keys)


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_cases_have_unique_names_and_one_dense_row_per_shape(family):
    cases = all_cases(family)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.arch for case in cases} == {"sm80", family}
    mine = [case for case in cases if case.arch == family]
    # The rate of a peer without masks is taken from the dense row of the same shape.
    for case in mine:
        like = {field: getattr(case, field) for field in ("rows_kv", "head_dim", "dtype", "causal")}
        dense = [c for c in mine if c.mask == "dense" and c.op == ATTENTION]
        assert sum(dataclasses.replace(c, **like) == c for c in dense) == 1


def test_portable_cases_repeat_the_headline():
    names = {case.name for case in all_cases("sm90")}
    for block in ("64x64", "128x128"):
        for density in DENSITIES:
            same = f"-32k-{block}-random-d{density:g}"
            assert {"sm80" + same, "sm90" + same} <= names
    assert names >= {"sm90-128k-64x64-dense-d1", "sm90-8k-noncausal-64x64-dense-d1"}
    assert names >= {"sm90-32k-hd64-64x64-random-d0.1", "sm90-32k-float16-64x64-random-d0.2"}


def test_models_have_dense_and_sparse_cases_of_their_shapes():
    cases = model_cases("sm90")
    assert len({case.name for case in cases}) == len(cases)
    assert {(c.heads_q, c.heads_kv, c.head_dim) for c in cases} == set(MODELS.values())
    assert {case.rows_q // 1024 for case in cases} == {4, 8, 16, 32, 64, 128, 256}
    assert all(case.rows_q == case.rows_kv and case.causal for case in cases)
    one = model_cases("sm80", ["qwen2.5-7b", "qwen2.5-7b"])
    assert len(one) == 7 * 4 and {case.arch for case in one} == {"sm80"}
    assert {case.name for case in one} >= {
        "sm80-4k-h28-4-64x64-dense-d1",
        "sm80-256k-h28-4-64x64-random-d0.1",
    }
    with pytest.raises(ValueError, match=r"--models: expected some of .+, got llama-2\."):
        model_cases("sm90", ["llama-2"])


def test_unknown_models_are_refused_before_anything_runs(capsys):
    with pytest.raises(SystemExit):
        record.main(["--models", "llama-2"])
    assert "expected some of llama-3.1-8b" in capsys.readouterr().err


def test_newest_family_has_kernels_for_the_very_gpu(tmp_path, monkeypatch):
    table = tmp_path / "variants.json"
    monkeypatch.setattr("bench.cases.VARIANTS", table)
    table.write_text('{"kernels": [{"sm": 80}, {"sm": 90}]}')
    assert newest_family((9, 0)) == "sm90"
    assert {newest_family(c) for c in ((8, 0), (8, 9), (10, 0), (12, 0))} == {"sm80"}
    table.write_text('{"kernels": [{"sm": 80}]}')
    assert newest_family((9, 0)) == "sm80"


# ---------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.1, 0.01])
@pytest.mark.parametrize("base", [SMALL, CHUNK], ids=["square", "chunk"])
@pytest.mark.parametrize("kind", ["random", "kv_head", "structured"])
def test_mask_keeps_the_diagonal_and_the_asked_share(base, density, kind):
    case = dataclasses.replace(base, density=density, mask=kind)
    mask = masks.block_mask(case)
    heads = case.heads_kv if kind == "kv_head" else case.heads_q
    assert mask.shape == (1, heads, case.blocks_q, case.blocks_kv)
    for i in range(case.blocks_q):
        visible = [j for j in range(case.blocks_kv) if literal_visible(case, i, j)]
        wanted = max(1, round(density * len(visible)))
        for head in range(heads):
            kept = mask[0, head, i].nonzero().flatten().tolist()
            assert len(kept) == wanted
            assert visible[-1] in kept
            assert set(kept) <= set(visible)


def test_mask_depends_on_seed_and_head_only():
    mask = masks.block_mask(SMALL)
    assert torch.equal(mask, masks.block_mask(SMALL))
    assert not torch.equal(mask[0, 0], mask[0, 1])
    assert not torch.equal(mask, masks.block_mask(dataclasses.replace(SMALL, seed=1)))


def test_structured_mask_has_window_sink_and_shared_stripes():
    case = dataclasses.replace(SMALL, rows_q=4096, rows_kv=4096, mask="structured", density=0.25)
    mask = masks.block_mask(case)
    for i in range(32, 64):
        assert mask[0, :, i, i - masks.WINDOW + 1 : i + 1].all() and mask[0, :, i, 0].all()
    # Rows of a group differ in their windows and, as later rows keep more, in their last stripes.
    stripes = mask[0, :, 32:64, : 32 - masks.WINDOW].unflatten(1, (-1, masks.NEIGHBOURS))
    later_keep_all = stripes[:, :, :-1] <= stripes[:, :, 1:]
    assert later_keep_all.float().mean() > 0.98
    assert not torch.equal(stripes[:, 0], stripes[:, 1])


def test_block_mask_refuses_dense():
    with pytest.raises(ValueError, match="expected mask random, kv_head, structured"):
        masks.block_mask(dataclasses.replace(SMALL, mask="dense"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("base", [SMALL, CHUNK], ids=["square", "chunk"])
def test_visible_blocks_and_flops_follow_the_definition(base, causal):
    case = dataclasses.replace(base, causal=causal, block=(64, 32))
    mask = masks.block_mask(case)
    blocks = 0.0
    for i in range(case.blocks_q):
        seen = [literal_visible(case, i, j) for j in range(case.blocks_kv)]
        assert int(masks.visible_blocks(case)[i]) == sum(seen)
        first = i * case.block[0]
        for j in mask[0, :, i].nonzero()[:, 1].tolist():
            last_key = min((j + 1) * case.block[1], case.rows_kv) - 1
            blocks += 1.0 if token_visible(case, first, last_key) else 0.5
    assert masks.flops(case, mask) == 4 * case.head_dim * 64 * 32 * blocks


def test_dense_flops_are_half_the_square():
    exact = 4 * SMALL.head_dim * SMALL.heads_q * SMALL.rows_q**2 / 2
    assert masks.flops(SMALL, None) == exact
    full = dataclasses.replace(SMALL, density=1.0, mask="kv_head")
    assert masks.flops(full, masks.block_mask(full)) == exact


# --------------------------------------------------------------------------------------- timing


class ScriptedClock:
    """Tells times from a script and keeps what was asked of it."""

    def __init__(self, sustained: dict[str, list[float]], burst: float = 1.0):
        self.sustained = {name: iter(times) for name, times in sustained.items()}
        self.burst, self.log = burst, []

    def idle(self, ms):
        self.log.append(("idle", ms))

    def time_launches(self, launch, warm, timed):
        name = launch()
        self.log.append((name, warm, timed))
        if warm == 0:
            return [self.burst] * timed
        return [2.0] * timed if warm == 1 else [next(self.sustained[name])] * timed

    def host_ms(self, launch, count):
        assert count < 100
        return {"a": 0.25, "b": 0.5}[launch()]

    def sm_mhz(self):
        return 1500


def test_measure_takes_turns_and_reports_medians():
    clock = ScriptedClock({"a": [3.0, 1.0, 2.0], "b": [10.0, 10.0, 40.0]})
    result = measure({"a": lambda: "a", "b": lambda: "b"}, clock, Schedule(rounds=3))
    assert (result["a"].ms, result["a"].ms_burst, result["a"].sm_mhz) == (2.0, 1.0, 1500)
    assert result["a"].spread == 1.0
    assert result["b"].ms == 10.0
    assert (result["a"].host_ms, result["b"].host_ms) == (0.25, 0.5)
    turns = [entry[0] for entry in clock.log[2:] if entry[0] != "idle" and entry[1] > 1]
    assert turns == ["a", "b"] * 3
    # A burst follows an idle pause; a sustained time follows 150 ms of launches (2 ms each).
    for before, after in zip(clock.log, clock.log[1:], strict=False):
        if before[0] == "idle":
            assert before[1] == 200 and after[1] == 0
    assert {entry[1] for entry in clock.log[2:] if len(entry) == 3} == {0, 75}


@pytest.mark.gpu
def test_cuda_clock_times_launches_and_not_the_host():
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    clock = CudaClock()

    def slow_to_enqueue():
        time.sleep(2e-4)
        return a @ a

    slow_to_enqueue()
    # 17 GFLOP: at least 10 us on any GPU, and the 200 us of sleep are hidden behind the spin.
    (alone,) = clock.time_launches(slow_to_enqueue, 0, 1)
    assert 0.01 < alone < 5
    assert all(0 < ms < 5 for ms in clock.time_launches(lambda: a @ a, 2, 5))
    assert clock.host_ms(slow_to_enqueue, 5) > 0.2


def test_launches_within_is_bounded():
    assert launches_within(15, 100, 5) == 1
    assert launches_within(15, 5, 5) == 3
    assert launches_within(15, 0.0, 5) == 5


# -------------------------------------------------------------------------------------- judging


def exact_out(problem: Problem) -> torch.Tensor:
    case = problem.case
    out = torch.empty(case.batch, case.rows_q, case.heads_q, case.head_dim, dtype=torch.float64)
    for row in range(case.rows_q):
        for head in range(case.heads_q):
            out[0, row, head] = exact_row(problem, 0, head, row)
    return out


@pytest.fixture(scope="module", params=["random", "kv_head", "dense"])
def problem(request):
    case = dataclasses.replace(CHUNK, mask=request.param, heads_q=2, heads_kv=1)
    return Problem.build(case, "cpu")


def test_exact_row_agrees_with_torch(problem):
    case = problem.case
    keep = torch.ones(case.rows_q, case.rows_kv, dtype=torch.bool)
    keep = keep.tril(case.rows_kv - case.rows_q)[None, None].repeat(1, case.heads_q, 1, 1)
    if problem.mask is not None:
        wide = problem.head_mask().repeat_interleave(64, 2).repeat_interleave(64, 3)
        keep &= wide[:, :, : case.rows_q, : case.rows_kv]
    q, k, v = (x.double().transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, keep, enable_gqa=True)
    torch.testing.assert_close(exact_out(problem), wanted.transpose(1, 2))


def test_check_accepts_rounding_and_refuses_faults(problem):
    out = exact_out(problem)
    check(problem, out.bfloat16())
    with pytest.raises(ValueError, match="wrong shape"):
        check(problem, out.transpose(1, 2))
    with pytest.raises(ValueError, match="wrong result"):
        check(problem, out.roll(1, dims=1))
    poisoned = out.clone()
    poisoned[0, -1] = math.nan  # the last row is always among the sampled
    with pytest.raises(ValueError, match="wrong result"):
        check(problem, poisoned)


def test_check_sees_a_dropped_block():
    problem = Problem.build(dataclasses.replace(SMALL, density=1.0), "cpu")
    mask = problem.mask.clone()
    mask[:, :, :, 0] &= mask[:, :, :, 0].cumsum(-1) == 1  # block column 0 for the first row only
    faulty = exact_out(dataclasses.replace(problem, mask=mask))
    with pytest.raises(ValueError, match="wrong result"):
        check(problem, faulty)


# -------------------------------------------------------------------------------------- running


def peer(name, build, available=""):
    return SimpleNamespace(
        NAME=name, available=lambda: available, supports=lambda case: True, build=build
    )


def refuse(problem):
    raise RuntimeError("no kernel for this shape\nsecond line")


TWO_MS = SimpleNamespace(
    idle=lambda ms: None,
    time_launches=lambda launch, warm, timed: [2.0] * timed,
    host_ms=lambda launch, count: 0.125,
    sm_mhz=lambda: None,
)


@pytest.mark.parametrize("model", MODELS)
def test_shapes_of_models_run(model):
    """Built, computed and checked against float64; 512 rows stand for all lengths."""
    cases = [
        dataclasses.replace(case, rows_q=512, rows_kv=512)
        for case in model_cases("sm80", [model])[:4]
    ]
    later, said = time.monotonic() + 120, []
    results = run_cases(cases, "sm80", [], TWO_MS, Schedule(rounds=1), later, said.append, "cpu")
    assert results.failures == {} and len(results.rows) == len(said) == 4
    assert {row["heads_q"] for row in results.rows} == {MODELS[model][0]}


def test_a_failing_peer_costs_only_itself():
    case = dataclasses.replace(SMALL, heads_q=2, heads_kv=1, rows_q=256, rows_kv=256)
    peers = [
        peer("good", lambda problem: lambda: exact_out(problem).bfloat16()),
        peer("refuses", refuse),
        peer("wrong", lambda problem: lambda: torch.zeros_like(problem.q)),
        peer("absent", refuse, available="not installed"),
        SimpleNamespace(NAME="broken", available=lambda: refuse(None)),
    ]
    later = time.monotonic() + 60
    said = []
    schedule = Schedule(rounds=1)
    results = run_cases([case], "sm80", peers, TWO_MS, schedule, later, said.append, "cpu")
    (row,) = results.rows
    assert row["peers"] == {"good": 2.0} and OURS not in row["peers"]
    assert len(said) == 1 and said[0].startswith(case.name)
    assert row["host_ms"] == 0.125 and row["peers_host"] == {"good": 0.125}
    broken = "RuntimeError: no kernel for this shape"
    assert results.unavailable == {"absent": "not installed", "broken": broken}
    reasons = {key.split(": ")[1]: reason for key, reason in results.failures.items()}
    assert reasons["refuses"] == "RuntimeError: no kernel for this shape"
    assert reasons["wrong"].startswith("ValueError: wrong result")
    rate = masks.flops(case, masks.block_mask(case)) / 2.0 / 1e9
    assert row["tflops"] == pytest.approx(rate, abs=0.06)
    contract = "op arch batch heads_q heads_kv head_dim rows_q rows_kv dtype causal block density"
    contract += " mask ms ms_burst host_ms tflops peers"
    assert set(contract.split()) <= set(row)


def test_a_case_of_another_family_is_forced_and_timed_alone():
    case = dataclasses.replace(SMALL, heads_q=2, heads_kv=1, rows_q=256, rows_kv=256)
    later = time.monotonic() + 60
    peers = [peer("refuses", refuse)]
    results = run_cases([case], "sm90", peers, TWO_MS, Schedule(rounds=1), later, print, "cpu")
    assert results.failures == {} and results.rows[0]["peers"] == {}


def test_a_row_of_the_default_family_must_be_what_the_default_call_runs(monkeypatch):
    case = dataclasses.replace(SMALL, heads_q=2, heads_kv=1, rows_q=256, rows_kv=256)
    exact = runner.ours_forced
    monkeypatch.setattr(runner, "ours_forced", lambda p: lambda: exact(p)().nextafter(p.q))
    later = time.monotonic() + 60
    results = run_cases([case], "sm80", [], TWO_MS, Schedule(rounds=1), later, print, "cpu")
    assert results.rows == [] and "gives other bits" in results.failures[case.name]


def test_cases_past_the_deadline_are_named():
    results = run_cases([SMALL], "sm80", [], None, Schedule(), 0.0, lambda s: None, "cpu")
    assert results.rows == []
    assert results.failures == {SMALL.name: "not measured: out of time"}
