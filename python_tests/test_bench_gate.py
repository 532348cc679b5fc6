# SPDX-License-Identifier: Apache-2.0
"""The gate's benchmark cases without a GPU: problems, judge, peers' mathematics, rows, tables."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch

from bench import gate, report
from bench.cases import GATE_OPS, Case, all_cases, case_of
from bench.gate import GateProblem, captured
from bench.peers import all_peers, fa3, flex, gate_compile, gate_eager, sdpa_flash, takes_part
from bench.report import OURS
from bench.runner import row_of, run_cases
from bench.timing import Schedule, Timing

SMALL = Case(
    op="gate_mask", mask="threshold", heads_q=4, heads_kv=2, head_dim=32, rows_q=1024, rows_kv=1024
)
POOLED = dataclasses.replace(SMALL, op="pool_gate", mask="none", pools="maxminavg")
SELECT = dataclasses.replace(SMALL, op="gate_select", mask="density", density=0.3)
PREFILL = dataclasses.replace(SMALL, op="sparse_prefill", mask="density", density=0.3)
CASES = {
    "mask": SMALL,
    "ragged mask": dataclasses.replace(SMALL, rows_q=1000, rows_kv=1000),
    "pool k": POOLED,
    "pool q": dataclasses.replace(POOLED, pools="avg"),
    "select": SELECT,
    "prefill": PREFILL,
}


@pytest.fixture(autouse=True)
def _rule_for_16_blocks(monkeypatch):
    monkeypatch.setattr(gate, "THRESHOLD", 0.05)


@pytest.fixture(params=CASES)
def problem(request) -> GateProblem:
    return GateProblem.build(CASES[request.param], "cpu")


def test_our_answers_are_accepted(problem):
    out = problem.ours()()
    problem.check(out)
    again = GateProblem.build(problem.case, "cpu")
    assert torch.equal(again.ours()(), out)
    assert captured(problem.ours(), "cpu")().equal(out)


def test_faults_are_refused(problem):
    out = problem.ours()()
    with pytest.raises(ValueError, match="wrong"):
        problem.check(out[:, :-1])
    broken = out.clone()
    if out.dtype == torch.int32:  # the last row keeps its weakest block instead of its strongest
        broken[:, :, -1] = ~broken[:, :, -1] & 0xFFFF
    else:
        broken = out.roll(1, dims=2)
    with pytest.raises(ValueError, match="wrong"):
        problem.check(broken)


def test_another_head_s_mask_is_refused():
    for case in (SMALL, SELECT):
        problem = GateProblem.build(case, "cpu")
        with pytest.raises(ValueError, match="wrong result"):
            problem.check(problem.ours()().roll(1, dims=1))


def test_the_judge_leaves_little_undecided(problem):
    if problem.case.op == "pool_gate":
        return
    for _, rows, must, may in problem._decisions:
        assert must.any() and (may & ~must).sum() < 0.2 * len(rows) * problem.case.blocks_kv
        assert must[may].float().mean() > 0.5


@pytest.mark.parametrize("peer", [gate_eager, gate_compile], ids=lambda peer: peer.NAME)
def test_peers_do_the_same_work(peer, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name in ("mask", "pool k", "pool q"):
        # The CPU's avg_pool3d takes no bf16.
        problem = GateProblem.build(dataclasses.replace(CASES[name], dtype="float32"), "cpu")
        assert peer.supports(problem.case)
        problem.check(peer.build(problem)())
    assert not peer.supports(SELECT) and not peer.supports(PREFILL)
    ragged = GateProblem.build(dataclasses.replace(CASES["ragged mask"], dtype="float32"), "cpu")
    if peer is gate_eager:
        ragged.check(peer.build(ragged)())
    else:
        assert not peer.supports(ragged.case)


def test_dense_attention_is_judged_without_the_mask():
    problem = GateProblem.build(PREFILL, "cpu")
    q, k, v = (x.float().transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    attend = torch.nn.functional.scaled_dot_product_attention
    dense = attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).bfloat16()
    problem.check(dense, dense=True)
    with pytest.raises(ValueError, match="wrong result"):
        problem.check(dense)
    assert 0 < problem.work < 0.75 * 4 * 32 * 1024**2 / 2 * 4


def test_bytes_are_those_that_must_move():
    q = 2 * 4 * 1024 * 32
    k, weight, embedding = q // 2, 2 * 4 * 96 * 32, 2 * 16 * 4 * 32
    work = {name: GateProblem.build(CASES[name], "cpu").work for name in CASES}
    assert work["pool q"] == q + embedding
    assert work["pool k"] == k + weight + embedding
    assert work["mask"] == q + k + weight + 4 * 4 * 16
    assert work["select"] == 0
    copy = GateProblem.build(SMALL, "cpu").copy()
    assert (
        2 * copy().numel() == int(work["mask"]) and GateProblem.build(SELECT, "cpu").copy() is None
    )


def test_who_takes_part():
    cases = {case.name: case for case in all_cases("sm90") if case.op in GATE_OPS}
    names = {
        name: {peer.NAME for peer in all_peers() if takes_part(peer, case)}
        for name, case in cases.items()
    }
    both = {"gate_eager", "gate_compile"}
    assert names == {
        "sm90-pool_gate-32k-avg": both,
        "sm90-pool_gate-32k-maxminavg": both,
        "sm90-gate_mask-8k-threshold": {"gate_compile"},
        "sm90-gate_mask-32k-threshold": both,
        "sm90-gate_mask-128k-threshold": both,
        "sm90-gate_select-128k-threshold": set(),
        "sm90-gate_select-128k-density-d0.1": set(),
        "sm90-sparse_prefill-32k-density-d0.1": {"sdpa_flash", "fa3"},
    }
    dense = Case(arch="sm90", rows_q=32768, rows_kv=32768, mask="dense")
    assert takes_part(fa3, dense) and takes_part(sdpa_flash, dense)
    assert not takes_part(flex, cases["sm90-sparse_prefill-32k-density-d0.1"])


class Clock:
    """Two ms for everyone; the copy takes one."""

    idle = sm_mhz = lambda self, *_: None

    def __init__(self):
        self.turn = 0

    def time_launches(self, launch, warm, timed):
        launch()
        return [2.0] * timed

    def host_ms(self, launch, count):
        return 0.1


def test_rows_of_a_run():
    peer = SimpleNamespace(
        NAME="gate_eager",
        OPS=gate_eager.OPS,
        available=lambda: "",
        supports=gate_eager.supports,
        build=gate_eager.build,
    )
    wrong = SimpleNamespace(
        NAME="wrong",
        OPS=GATE_OPS,
        available=lambda: "",
        supports=lambda case: case.op == "pool_gate",
        build=lambda problem: lambda: torch.zeros(1, 16, 4, 32),
    )
    cases = [dataclasses.replace(x, dtype="float32") for x in (POOLED, SMALL, SELECT, PREFILL)]
    said: list[str] = []
    later = time.monotonic() + 60
    results = run_cases(
        cases, "sm80", [peer, wrong], Clock(), Schedule(rounds=1), later, said.append, "cpu"
    )
    pooled, mask, select, prefill = results.rows
    assert list(results.failures) == [f"{cases[0].name}: wrong"]
    assert "copy" not in pooled["peers"] and pooled["copy_gbps"] == pooled["gbps"] > 0
    assert pooled["pools"] == "maxminavg" and case_of(pooled) == cases[0]
    assert mask["gbps"] > 0 and "tflops" not in mask and case_of(mask) == cases[1]
    assert "gbps" not in select and select["ms"] == 2.0
    assert "tflops" in prefill and "copy_gbps" not in prefill
    assert [line.split()[0] for line in said] == [case.name for case in cases]


def test_tables_show_the_gate_beside_attention():
    def timing(ms: float) -> Timing:
        return Timing(ms, ms, 0.0, 0.01)

    rows = [
        row_of(
            Case(op="pool_gate", mask="none", pools="avg", rows_q=32768, rows_kv=32768),
            272e6,
            {OURS: timing(0.08), "copy": timing(0.064), "gate_compile": timing(0.1)},
        ),
        row_of(
            Case(op="sparse_prefill", mask="density", density=0.1, rows_q=32768, rows_kv=32768),
            440e9,
            {OURS: timing(1.5), "fa3": timing(13.3)},
        ),
        row_of(Case(op="gate_select", mask="threshold"), 0.0, {OURS: timing(0.1)}),
    ]
    assert report.row_line(rows[0]).endswith("  1.25x  gate_compile 0.100 ms  80% of a copy")
    assert report.row_line(rows[1]).endswith("   8.87x  fa3 13.300 ms")
    table = report.gate_table(rows)
    assert table[0].endswith("| of a copy | FlashAttention-3 | torch.compile |")
    assert table[2:] == [
        "| `pool_gate` | 32k | avg | 0.080 | 3400 | 80% | - | 0.100 |",
        "| `sparse_prefill` | 32k | density, 10% kept | 1.500 | - | - | 13.300 | - |",
        "| `gate_select` | 8k | threshold | 0.100 | - | - | - | - |",
    ]
    assert report.gate_table([]) == []


def inputs_of(problem: GateProblem) -> list[torch.Tensor]:
    """What a launch of the case reads and another sign of which changes the answer."""
    if problem.case.op == "gate_select":
        return [problem.embeddings[0]]
    return [problem.side.x if problem.case.op == "pool_gate" else problem.gate_q]


def test_a_launch_reads_its_inputs_anew(problem):
    launch = problem.ours()
    before = launch().clone()
    for x in inputs_of(problem):
        x.neg_()
    assert not torch.equal(launch(), before) and torch.equal(launch(), problem.ours()())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_captured_launches_answer_on_a_gpu(name):
    case = dataclasses.replace(CASES[name], head_dim=128)
    problem = GateProblem.build(case)
    launch = captured(problem.ours(), "cuda")
    before = launch().clone()
    problem.check(before)
    with torch.no_grad():
        for x in inputs_of(problem):
            x.neg_()  # a replay reads the inputs anew
    after = launch().clone()
    assert not torch.equal(after, before)
    assert torch.equal(after, problem.ours()())


@pytest.mark.gpu
def test_a_replay_keeps_what_its_launch_reads():
    def launch_on_its_own_tensor():
        x = torch.ones(1 << 22, device="cuda")
        return lambda: x + 1

    replay = captured(launch_on_its_own_tensor(), "cuda")
    torch.full((1 << 22,), 7.0, device="cuda")  # takes the memory of a tensor that nobody holds
    assert bool((replay() == 2).all())
