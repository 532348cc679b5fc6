# SPDX-License-Identifier: Apache-2.0
"""What a call costs beside its kernel: the host's time, and the latency of small problems."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.problem import Problem
from bench.runner import ours
from bench.timing import Launch

# Small enough that a kernel does not hide its launch, and as large as a layer's short prompt.
PROBLEMS = {
    "tiny": Case(heads_q=8, heads_kv=2, rows_q=256, rows_kv=256),
    "middle": Case(rows_q=4096, rows_kv=4096, density=0.2),
}
CALLS = 200
GRAPH_LAUNCHES = 50


def _microseconds(action: Callable[[], object], calls: int, wait: Callable[[], object]) -> float:
    """Median wall time of `action`, each begun after `wait`."""
    times = []
    for _ in range(calls):
        wait()
        began = time.perf_counter()
        action()
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times)


def _kernel_us(launch: Launch) -> float:
    """Device time per launch where no host is in the way: in a CUDA graph of many of them."""
    cuda = torch.cuda
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        for _ in range(GRAPH_LAUNCHES):
            launch()
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    times = []
    for _ in range(8):
        start.record()
        graph.replay()
        end.record()
        cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / GRAPH_LAUNCHES)
    return statistics.median(times)


def launch_cost(launch: Launch) -> dict[str, float]:
    """Times of one call in microseconds. `launch` must be capturable in a CUDA graph.

    call_us: from the Python call until the device is done and the host knows; kernel_us: the
    device's part; overhead_us: their difference; host_us: until the call returns; stream_us: per
    call of many enqueued back to back.
    """
    wait = torch.cuda.synchronize

    def call() -> None:
        launch()
        wait()

    def stream() -> None:
        for _ in range(CALLS):
            launch()
        wait()

    stream()  # warm
    costs = {
        "call_us": _microseconds(call, CALLS, wait),
        "kernel_us": _kernel_us(launch),
        "host_us": _microseconds(launch, CALLS, wait),
        "stream_us": _microseconds(stream, 5, wait) / CALLS,
    }
    costs["overhead_us"] = costs["call_us"] - costs["kernel_us"]
    return {name: round(value, 2) for name, value in costs.items()}


def yardsticks() -> dict[str, Launch]:
    """What torch itself takes on this host: its smallest op, and its attention of a tiny prompt.

    Host and synchronisation have a floor that differs between machines by more than ops do.
    """
    counter = torch.zeros(64, device="cuda")
    tiny = PROBLEMS["tiny"]
    x = torch.ones(1, tiny.heads_q, tiny.rows_q, tiny.head_dim, device="cuda", dtype=torch.bfloat16)
    return {
        "torch add_": lambda: counter.add_(1),
        "torch attention": lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    }


def launch_costs() -> dict[str, dict[str, float]]:
    """launch_cost of our call for every problem of PROBLEMS, and of the `yardsticks`."""
    launches = {name: ours(Problem.build(case)) for name, case in PROBLEMS.items()}
    return {name: launch_cost(launch) for name, launch in (launches | yardsticks()).items()}
