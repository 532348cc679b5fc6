# SPDX-License-Identifier: Apache-2.0
"""Wall times of a few calls, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping

import torch


def median_ms(
    calls: Mapping[Hashable, Callable[[], object]], repeats: int, at_once: int = 1
) -> dict[Hashable, float]:
    """Median wall time of each call in milliseconds, `at_once` calls timed together.

    The calls take turns, so that whatever else the machine does meets all of them alike.
    """
    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            _wait_for_device()
            start = time.perf_counter()
            for _ in range(at_once):
                call()
            _wait_for_device()
            times[name].append(1e3 * (time.perf_counter() - start) / at_once)
    # The first round warms up.
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
