# SPDX-License-Identifier: Apache-2.0
"""Output that suits where it goes: live progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from seer_cuda.demo.train import Advance

#: Columns of output that goes to a file: wide enough that no table row wraps.
_FILE_WIDTH = 110
#: Share of the steps between two lines where no bar can be drawn.
_LINE_SHARE = 0.25


def make_console() -> Console:
    """A console on stdout that writes neither colours nor cursor movements into files."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH)


@contextmanager
def stage(console: Console, name: str, steps: int) -> Iterator[Advance]:
    """Progress of one stage: yields a function to call after every step, with a short note.

    Prints how long the stage took at its end.
    """
    start = time.perf_counter()
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

            def advance(note: str) -> None:
                bars.update(task, advance=1, **({"note": note} if note else {}))

            yield advance
    else:
        yield _printer(console, name, steps)
    console.print(f"{name}: done in {time.perf_counter() - start:.0f} s")


def _printer(console: Console, name: str, steps: int) -> Advance:
    """A line at every `_LINE_SHARE` of the steps."""
    done, latest = 0, ""
    due = _LINE_SHARE

    def advance(note: str) -> None:
        nonlocal done, latest, due
        done, latest = done + 1, note or latest
        if due < 1 and done >= due * steps:
            due += _LINE_SHARE
            console.print(f"{name}: {done}/{steps} {latest}".rstrip())

    return advance
