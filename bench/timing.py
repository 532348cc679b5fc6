# SPDX-License-Identifier: Apache-2.0
"""The timing protocol (docs/benchmarks.md).

Two times are taken of every contestant, because a power-bound GPU runs a launch after an idle
pause up to 15 % faster than one in a stream of launches:

- burst: the first launches after 200 ms of idleness;
- sustained: launches that follow 150 ms of back-to-back launches of the same contestant.

Contestants of one case run in one process in turns (A B C, A B C, ...), so that a drift of the
clocks meets all of them alike; a contestant's time is the median over the rounds of the medians
within a round. Times are those between two CUDA events around each launch. They are the kernel's
only where the host enqueues faster than the device runs: the host's time per launch is taken too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Launch = Callable[[], object]


@dataclass(frozen=True)
class Schedule:
    """How long and how often; times in ms. `burst_ms` and `sustained_ms` bound the timed part."""

    rounds: int = 3
    pause_ms: float = 200.0
    warm_ms: float = 150.0
    burst_ms: float = 15.0
    sustained_ms: float = 80.0
    max_launches: int = 100
    host_launches: int = 9


@dataclass(frozen=True)
class Timing:
    """Result for one contestant. `spread` is (slowest - fastest round) / median, sustained;
    `sm_mhz` the SM clock under load where the driver tells it; `host_ms` what the host needs to
    enqueue one launch."""

    ms: float
    ms_burst: float
    spread: float
    host_ms: float
    sm_mhz: int | None = None


class Clock(Protocol):
    """What the protocol needs of a device; tests replace it."""

    def idle(self, ms: float) -> None:
        """Waits until the device has finished, then `ms` longer."""

    def time_launches(self, launch: Launch, warm: int, timed: int) -> list[float]:
        """Runs `warm` and then `timed` launches back to back; ms of each of the timed ones."""

    def host_ms(self, launch: Launch, count: int) -> float:
        """What the host needs to enqueue one launch on an idle device: median of `count`, in ms."""

    def sm_mhz(self) -> int | None:
        """The SM clock while the last timed launches ran, or None."""


class CudaClock:
    """The clock of the current CUDA device and stream."""

    # A launch after a pause must find its kernel already enqueued: without something to wait
    # behind, the start event would fire at once and the host's own work would be timed. One
    # thread spinning for about half a millisecond is that something; it costs no power to speak of.
    _SPIN_CYCLES = 1_000_000

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._mhz: int | None = None

    def idle(self, ms: float) -> None:
        """Synchronises the device and sleeps."""
        self._torch.cuda.synchronize()
        time.sleep(ms / 1e3)

    def time_launches(self, launch: Launch, warm: int, timed: int) -> list[float]:
        """Times each of `timed` launches by a pair of events, without a gap after the warm ones."""
        cuda = self._torch.cuda
        pairs = [
            (cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(timed)
        ]
        if warm == 0:
            cuda._sleep(self._SPIN_CYCLES)
        for _ in range(warm):
            launch()
        for start, end in pairs:
            start.record()
            launch()
            end.record()
        # Read while the device is still at work: the clock falls as soon as it is idle.
        self._mhz = self._read_mhz()
        cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def host_ms(self, launch: Launch, count: int) -> float:
        """Times the host's calls, events included. `count` is small: a full queue would block."""
        cuda = self._torch.cuda
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        times = []
        cuda.synchronize()
        for _ in range(count):
            began = time.perf_counter()
            start.record()
            launch()
            end.record()
            times.append(1e3 * (time.perf_counter() - began))
        cuda.synchronize()
        return statistics.median(times)

    def sm_mhz(self) -> int | None:
        """Clock read during the last `time_launches`."""
        return self._mhz

    def _read_mhz(self) -> int | None:
        try:
            return int(self._torch.cuda.clock_rate())
        except Exception:  # pynvml is optional, and drivers refuse in several ways
            return None


def launches_within(budget_ms: float, one_ms: float, most: int) -> int:
    """Launches that fill `budget_ms`: between 1 and `most`."""
    return max(1, min(most, math.floor(budget_ms / max(one_ms, 1e-3))))


def measure(
    contestants: dict[str, Launch], clock: Clock, schedule: Schedule | None = None
) -> dict[str, Timing]:
    """Times every contestant by the protocol, in turns.

    Each must have run at least once before (compilation, allocation). Returns a Timing per name.
    """
    schedule = schedule or Schedule()
    estimate = {
        name: statistics.median(clock.time_launches(launch, 1, 3))
        for name, launch in contestants.items()
    }
    burst: dict[str, list[float]] = {name: [] for name in contestants}
    sustained: dict[str, list[float]] = {name: [] for name in contestants}
    mhz: dict[str, int | None] = {}
    for _ in range(schedule.rounds):
        for name, launch in contestants.items():
            few = launches_within(schedule.burst_ms, estimate[name], 5)
            clock.idle(schedule.pause_ms)
            burst[name].append(statistics.median(clock.time_launches(launch, 0, few)))
            warm = math.ceil(schedule.warm_ms / max(estimate[name], 1e-3))
            many = max(
                3, launches_within(schedule.sustained_ms, estimate[name], schedule.max_launches)
            )
            sustained[name].append(statistics.median(clock.time_launches(launch, warm, many)))
            mhz[name] = clock.sm_mhz()
    result = {}
    for name, launch in contestants.items():
        ms = statistics.median(sustained[name])
        result[name] = Timing(
            ms=ms,
            ms_burst=statistics.median(burst[name]),
            spread=(max(sustained[name]) - min(sustained[name])) / ms,
            sm_mhz=mhz[name],
            host_ms=clock.host_ms(
                launch, launches_within(schedule.sustained_ms, ms, schedule.host_launches)
            ),
        )
    return result
