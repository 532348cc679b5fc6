# SPDX-License-Identifier: Apache-2.0
"""Runs cases: builds the problem, judges every contestant's answer, then times them in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType

import torch

from bench.cases import ATTENTION, ATTN_POOL, Case
from bench.gate import GateProblem, captured
from bench.peers import takes_part
from bench.pool import PoolProblem, extra_megabytes
from bench.problem import Problem, check
from bench.report import DENSE_PEERS, OURS, row_line
from bench.timing import Clock, Launch, Schedule, measure

# A device copy that is timed beside the gate; not a peer.
COPY = "copy"
# Our dense attention, timed beside attn_pool; not a peer either.
DENSE = "dense"


@dataclass
class Results:
    """Rows of the record, and what could not be measured: reasons by "peer" or "case: peer"."""

    rows: list[dict] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def ours(problem: Problem) -> Launch:
    """The launch of this package: what a user calls, mask made beforehand."""
    import seer_cuda

    case = problem.case
    mask = None
    if problem.mask is not None:
        mask = seer_cuda.BlockMask.from_dense(
            problem.mask, *case.block, rows_q=case.rows_q, rows_kv=case.rows_kv, causal=case.causal
        )
    block_q, block_kv = case.block
    return lambda: seer_cuda.block_sparse_attn(
        problem.q,
        problem.k,
        problem.v,
        mask,
        block_q=block_q,
        block_kv=block_kv,
        causal=case.causal,
    )


def ours_forced(problem: Problem) -> Launch:
    """The same by the kernels of the case's family, whichever the GPU runs by default."""
    import seer_cuda  # noqa: F401  (defines torch.ops.seer)

    case = problem.case
    bits = None if problem.mask is None else torch.ops.seer.pack_block_bits(problem.mask)
    block_q, block_kv = case.block
    arch = int(case.arch.removeprefix("sm"))
    op = torch.ops.seer._block_sparse_attn_on
    return lambda: op(
        problem.q,
        problem.k,
        problem.v,
        bits,
        block_q=block_q,
        block_kv=block_kv,
        causal=case.causal,
        arch=arch,
    )[0]


def reason_of(error: Exception) -> str:
    """First line of an error, short enough for a record."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _contestants(
    problem: Problem, family: str, peers: Iterable[ModuleType], results: Results
) -> dict[str, Launch]:
    """Launches of everyone who answers the problem rightly; ours must, a peer may fail.

    A case of the GPU's default family is timed as users call it, peers beside it. Equal bits show
    that the family is what ran: a family's results are the same from run to run.
    """
    case = problem.case
    launch = ours_forced(problem)
    out = launch()
    check(problem, out)
    if case.arch != family:
        return {OURS: launch}
    launches = {OURS: ours(problem)}
    if not torch.equal(launches[OURS](), out):
        raise RuntimeError(f"the default call gives other bits than the kernels of {case.arch}")
    del out
    for peer in peers:
        if not takes_part(peer, case):
            continue
        answers = getattr(peer, "answers", lambda same: same)
        try:
            launch = peer.build(problem)
            check(answers(problem), launch())
            launches[peer.NAME] = launch
        except Exception as error:  # whatever a peer raises is its own reason, not our end
            results.failures[f"{case.name}: {peer.NAME}"] = reason_of(error)
    return launches


def _gate_contestants(
    problem: GateProblem, peers: Iterable[ModuleType], results: Results
) -> dict[str, Launch]:
    """The same for a case of the gate, as CUDA graphs, with a copy of as many bytes beside them."""
    case, device = problem.case, problem.gate_q.device
    launches = {OURS: captured(problem.ours(), device)}
    problem.check(launches[OURS]())
    if copy := problem.copy():
        launches[COPY] = captured(copy, device)
    for peer in peers:
        if not takes_part(peer, case):
            continue
        try:
            launch = captured(peer.build(problem), device)
            problem.check(launch(), dense=peer.NAME in DENSE_PEERS)
            launches[peer.NAME] = launch
        except Exception as error:  # whatever a peer raises is its own reason, not our end
            results.failures[f"{case.name}: {peer.NAME}"] = reason_of(error)
    return launches


def _pool_contestants(
    problem: PoolProblem, peers: Iterable[ModuleType], results: Results
) -> dict[str, Launch]:
    """The same for attn_pool, with our dense attention beside it."""
    case = problem.case
    launches = {OURS: problem.ours(), DENSE: problem.dense()}
    for launch in launches.values():
        problem.check(launch())
    for peer in peers:
        if not takes_part(peer, case):
            continue
        answers = getattr(peer, "answers", lambda same: same)
        try:
            launch = peer.build(problem)
            answers(problem).check(launch())
            launches[peer.NAME] = launch
        except Exception as error:  # whatever a peer raises is its own reason, not our end
            results.failures[f"{case.name}: {peer.NAME}"] = reason_of(error)
    return launches


def _rates(case: Case, work: float, timings: dict) -> dict[str, float]:
    """The rate fields of a row: TFLOP/s of attention, GB/s of what moves bytes, with that of a
    copy of as many bytes in the same run."""
    ms = timings[OURS].ms
    if case.op in (ATTENTION, ATTN_POOL, "sparse_prefill"):
        rates = {"tflops": round(work / ms / 1e9, 1)}
        if DENSE in timings:
            rates["dense_ms"] = round(timings[DENSE].ms, 4)
        return rates
    if not work:
        return {}
    rates = {"gbps": round(work / ms / 1e6, 1)}
    if COPY in timings:
        rates["copy_gbps"] = round(work / timings[COPY].ms / 1e6, 1)
    return rates


def row_of(
    case: Case, work: float, timings: dict, extra_mb: dict[str, float] | None = None
) -> dict:
    """A row of the record: the case, our times in ms and our rate (of `work`, FLOP or bytes), the
    peers' times in ms; where measured, memory beyond the results, in MB."""
    mine = timings[OURS]
    peers = {name: timing for name, timing in timings.items() if name not in (OURS, COPY, DENSE)}
    memory = {}
    if extra_mb:
        of_peers = {name: round(extra_mb[name], 1) for name in peers}
        memory = {"extra_mb": round(extra_mb[OURS], 1), "peers_extra_mb": of_peers}
    return {
        "op": case.op,
        "arch": case.arch,
        "batch": case.batch,
        "heads_q": case.heads_q,
        "heads_kv": case.heads_kv,
        "head_dim": case.head_dim,
        "rows_q": case.rows_q,
        "rows_kv": case.rows_kv,
        "dtype": case.dtype,
        "causal": case.causal,
        "block": list(case.block),
        "density": case.density,
        "mask": case.mask,
        **({"pools": case.pools} if case.pools else {}),
        "ms": round(mine.ms, 4),
        "ms_burst": round(mine.ms_burst, 4),
        "host_ms": round(mine.host_ms, 4),
        **_rates(case, work, timings),
        **memory,
        "spread": round(mine.spread, 4),
        "sm_mhz": mine.sm_mhz,
        "peers": {name: round(timing.ms, 4) for name, timing in peers.items()},
        "peers_burst": {name: round(timing.ms_burst, 4) for name, timing in peers.items()},
        "peers_host": {name: round(timing.host_ms, 4) for name, timing in peers.items()},
    }


def run_cases(
    cases: Iterable[Case],
    family: str,
    peers: Iterable[ModuleType],
    clock: Clock,
    schedule: Schedule,
    deadline: float,
    say: Callable[[str], None] = print,
    device: str = "cuda",
) -> Results:
    """Measures `cases` until `deadline` (time.monotonic seconds); the rest is put down as such.

    `family`: the kernel family that the GPU runs by default.
    """
    results = Results()
    usable = []
    for peer in peers:
        try:
            reason = peer.available()
        except Exception as error:  # a broken installation
            reason = reason_of(error)
        if reason:
            results.unavailable[peer.NAME] = reason
        else:
            usable.append(peer)
    for case in cases:
        if time.monotonic() > deadline:
            results.failures[case.name] = "not measured: out of time"
            continue
        try:
            extra_mb = None
            if case.op == ATTENTION:
                problem = Problem.build(case, device)
                contestants = _contestants(problem, family, usable, results)
            elif case.op == ATTN_POOL:
                problem = PoolProblem.build(case, device)
                contestants = _pool_contestants(problem, usable, results)
                if torch.device(device).type == "cuda":
                    extra_mb = {name: extra_megabytes(call) for name, call in contestants.items()}
            else:
                problem = GateProblem.build(case, device)
                contestants = _gate_contestants(problem, usable, results)
            timings = measure(contestants, clock, schedule)
        except Exception as error:  # the record keeps the rows there are, and the reason
            results.failures[case.name] = reason_of(error)
            say(f"{case.name}: FAILED {reason_of(error)}")
            continue
        row = row_of(case, problem.work, timings, extra_mb)
        results.rows.append(row)
        say(row_line(row))
    return results
