# SPDX-License-Identifier: Apache-2.0
"""The benchmark cases of attn_pool without a GPU: judge, peers, rows, table."""

from __future__ import annotations

import dataclasses
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import bench.peers.seer_triton as seer_triton
from bench import report
from bench.cases import ATTN_POOL, Case, all_cases, case_of
from bench.peers import all_peers, takes_part
from bench.pool import PoolProblem
from bench.problem import Problem, check
from bench.report import OURS
from bench.runner import DENSE, row_of, run_cases
from bench.timing import Schedule, Timing

SMALL = Case(
    op=ATTN_POOL,
    mask="dense",
    pools="max",
    heads_q=4,
    heads_kv=2,
    head_dim=32,
    rows_q=256,
    rows_kv=256,
)
CASES = {
    "max": SMALL,
    "sum": dataclasses.replace(SMALL, pools="sum"),
    "rows": dataclasses.replace(SMALL, pools="per_token"),
    "ragged": dataclasses.replace(SMALL, rows_q=250, rows_kv=301),
    "wide": dataclasses.replace(SMALL, block=(128, 128)),
    "not causal": dataclasses.replace(SMALL, causal=False),
}


@pytest.fixture(params=CASES)
def problem(request) -> PoolProblem:
    return PoolProblem.build(CASES[request.param], "cpu")


def test_our_answers_are_accepted_and_faults_refused(problem):
    out, pooled = problem.ours()()
    problem.check((out, pooled))
    problem.check(problem.dense()())
    with pytest.raises(ValueError, match="wrong shape of the map"):
        problem.check((out, pooled[:, :, :-1]))
    with pytest.raises(ValueError, match="wrong result"):
        problem.check((out.roll(1, dims=1), pooled))
    for broken in (
        pooled * 1.01,
        pooled.roll(1, dims=1),
        pooled.masked_fill(pooled > 0, torch.nan),
    ):
        with pytest.raises(ValueError, match="wrong map"):
            problem.check((out, broken))


def test_who_takes_part():
    cases = [case for case in all_cases("sm90") if case.op == ATTN_POOL]
    names = {case.name: {p.NAME for p in all_peers() if takes_part(p, case)} for case in cases}
    assert names == {
        "sm90-attn_pool-8k-max": {"fa3", "seer_triton"},
        "sm90-attn_pool-32k-max": {"fa3", "seer_triton"},
        "sm90-attn_pool-128k-max": {"fa3"},
        "sm90-attn_pool-32k-sum": {"fa3"},
        "sm90-attn_pool-32k-per_token": {"fa3"},
        "sm90-attn_pool-32k-128x128-max": {"fa3"},
        "sm90-attn_pool-32k-hd64-max": {"fa3", "seer_triton"},
    }


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Files with names and signatures of SeerAttention's kernels, their mathematics in torch."""
    folder = tmp_path / "seer_attn" / "kernels"
    folder.mkdir(parents=True)
    (folder / "block_sparse_attn.py").write_text(
        "import torch\n"
        "def block_sparse_triton_fn(q, k, v, mask, scale):\n"
        "    assert q.is_contiguous() and k.shape == v.shape == q.shape\n"
        "    seen = mask.repeat_interleave(64, 2).repeat_interleave(64, 3).tril()\n"
        "    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale)\n"
    )
    (folder / "attn_pooling_kernel_2d.py").write_text(
        "import torch\n"
        "def attn_with_pooling(q, k, v, causal, scale, block):\n"
        "    scores = (q.float() @ k.float().mT * scale).bfloat16().float()\n"
        "    hidden = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()\n"
        "    p = scores.masked_fill(hidden, -torch.inf).softmax(-1)\n"
        "    tops = p.unflatten(2, (-1, block)).unflatten(-1, (-1, block)).amax((3, 5))\n"
        "    out = (p @ v.float()).to(q.dtype)\n"
        "    return out, (tops / tops.sum(-1, keepdim=True)).bfloat16()\n"
    )
    monkeypatch.setenv("SEER_BENCH_SEERATTENTION", str(tmp_path))
    seer_triton._module.cache_clear()
    yield
    seer_triton._module.cache_clear()


def test_the_reference_is_called_as_it_wants_and_judged_by_normalised_rows(checkout):
    problem = PoolProblem.build(SMALL, "cpu")
    assert seer_triton.supports(SMALL) and not seer_triton.supports(CASES["ragged"])
    out, pooled = seer_triton.build(problem)()
    seer_triton.answers(problem).check((out, pooled))
    with pytest.raises(ValueError, match="wrong map"):
        problem.check((out, pooled))
    with pytest.raises(ValueError, match="wrong map"):
        seer_triton.answers(problem).check((out, pooled * 1.1))
    sparse = dataclasses.replace(
        SMALL, op="block_sparse_attn", mask="random", pools="", density=0.5
    )
    problem = Problem.build(sparse, "cpu")
    assert seer_triton.answers(problem) is problem
    check(problem, seer_triton.build(problem)())


def test_a_missing_reference_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(seer_triton, "compiler_missing", lambda: "")
    monkeypatch.setenv("SEER_BENCH_SEERATTENTION", str(tmp_path / "nowhere"))
    assert "SEER_BENCH_SEERATTENTION" in seer_triton.available()
    monkeypatch.delenv("SEER_BENCH_SEERATTENTION")
    monkeypatch.setitem(sys.modules, "seer_attn", None)
    assert "not installed" in seer_triton.available()


def test_a_run_puts_dense_time_and_rate_into_the_row():
    clock = SimpleNamespace(
        idle=lambda ms: None,
        time_launches=lambda launch, warm, timed: [2.0] * timed,
        host_ms=lambda launch, count: 0.1,
        sm_mhz=lambda: None,
    )
    later = time.monotonic() + 60
    results = run_cases([SMALL], "sm80", [], clock, Schedule(rounds=1), later, [].append, "cpu")
    (row,) = results.rows
    assert not results.failures
    assert row["dense_ms"] == 2.0 and row["peers"] == {} and case_of(row) == SMALL
    flops = PoolProblem.build(SMALL, "cpu").work
    assert row["tflops"] == pytest.approx(flops / 2.0 / 1e9, abs=0.06)


def test_table_and_line():
    def timing(ms):
        return Timing(ms=ms, ms_burst=ms, spread=0.0, host_ms=0.01)

    case = Case(op=ATTN_POOL, arch="sm90", rows_q=32768, rows_kv=32768, mask="dense", pools="max")
    times = {
        OURS: timing(13.2),
        DENSE: timing(12.0),
        "fa3": timing(13.0),
        "seer_triton": timing(22.0),
    }
    extra = {OURS: 51.9, DENSE: 0.0, "fa3": 0.0, "seer_triton": 1363.2}
    row = row_of(case, 8.8e12, times, extra)
    assert row["extra_mb"] == 51.9 and row["peers_extra_mb"] == {"fa3": 0.0, "seer_triton": 1363.2}
    assert set(row["peers"]) == {"fa3", "seer_triton"}
    head, _, line = report.pool_table([row])
    assert "FlashAttention-3 (no map)" in head and "SeerAttention (Triton)" in head
    cells = "| `max` | 32k | 13.20 | 667 | 1.10x | 52 MB | 13.00 ms | 22.00 ms, 1363 MB |"
    assert line == cells
    assert "1.100x our dense" in report.row_line(row)
    assert report.pool_table([]) == []
    # It is no dense attention: tables and ratios of attention leave it out.
    assert (
        report.headline([row], "dense") == [] and report.dense_row(row | {"op": "x"}, [row]) is None
    )
