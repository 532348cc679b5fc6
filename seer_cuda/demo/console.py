# SPDX-License-Identifier: Apache-2.0
"""Output that suits where it goes: live progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Columns of output that goes to a file: wide enough that no table row wraps.
_FILE_WIDTH = 110
#: Share of the steps between two lines where no bar can be drawn.
_LINE_SHARE = 0.25


def make_console() -> Console:
    """A console on stdout that writes neither colours nor cursor movements into files."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH)


@dataclass
class Stage:
    """Progress of one stage: call it after every step, with a short note or ""."""

    name: str
    steps: int
    show: Callable[[str], None]
    done: int = 0

    def __call__(self, note: str) -> None:
        self.done += 1
        self.show(note)


@contextmanager
def stage(console: Console, name: str, steps: int) -> Iterator[Stage]:
    """Shows the progress of a stage, and at its end how many steps were made in what time."""
    start = time.perf_counter()
    current = Stage(name, steps, lambda note: None)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(name, total=steps, note="")
            current.show = lambda note: bars.update(
                task, advance=1, **({"note": note} if note else {})
            )
            yield current
    else:
        current.show = _Lines(console, current)
        yield current
    seconds = time.perf_counter() - start
    short = "" if current.done >= steps else ", stopped by its time limit"
    console.print(f"{name}: {current.done} of {steps} steps in {seconds:.0f} s{short}")


class _Lines:
    """A line at every `_LINE_SHARE` of the steps but the last."""

    def __init__(self, console: Console, current: Stage) -> None:
        self.console, self.current = console, current
        self.due, self.note = _LINE_SHARE, ""

    def __call__(self, note: str) -> None:
        done, steps = self.current.done, self.current.steps
        self.note = note or self.note
        if done < steps and done >= self.due * steps:
            self.due = done / steps + _LINE_SHARE
            self.console.print(f"{self.current.name}: {done}/{steps} {self.note}".rstrip())
