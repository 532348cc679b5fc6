# SPDX-License-Identifier: Apache-2.0
"""What a training run says: a CSV file, TensorBoard if asked for, and its progress."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


class Log:
    """Rows of a run, one for each step.

    On a terminal a progress bar on stderr; otherwise a line on stdout for each step.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        begin: int,
        steps: int,
        tensorboard: str | None = None,
    ) -> None:
        """columns: "step" first, "seconds" last. begin: steps that are done, whose rows stay."""
        self._steps, self._bar, self._board = steps, None, None
        # Rows after the checkpoint belong to steps that are done again.
        rows = list(csv.reader(path.open(newline=""))) if begin and path.is_file() else []
        rows = [row for row in rows[1:] if len(row) == len(columns) and int(row[0]) <= begin]
        # Whole before it takes the old one's place: a first step may last minutes.
        part = path.with_name(f".{path.name}.part")
        with part.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        part.replace(path)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        #: That the run has taken, in all its parts.
        self.seconds = float(rows[-1][-1]) if rows else 0.0
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(tensorboard, purge_step=begin + 1 if begin else None)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=begin, unit="step", dynamic_ncols=True)

    def row(self, values: dict[str, float]) -> None:
        """A step's values by column."""
        step, seconds = int(values["step"]), values["seconds"]
        texts = {name: f"{value:.6g}" for name, value in values.items()}
        exact = {name: str(value) for name, value in values.items() if isinstance(value, int)}
        self._writer.writerow(texts | exact | {"seconds": f"{seconds:.1f}"})
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(name, value, step)
            self._board.flush()
        losses = {name: f"{value:.5f}" for name, value in values.items() if "loss" in name}
        if self._bar is not None:
            self._bar.set_postfix(losses, refresh=False)
            self._bar.update()
        else:
            shown = "  ".join(f"{name} {text}" for name, text in losses.items())
            left = seconds / step * (self._steps - step)
            print(f"step {step}/{self._steps}  {shown}  {left:.0f} s left", flush=True)

    def close(self) -> None:
        """Files closed, the bar's line ended."""
        self._file.close()
        for other in (self._board, self._bar):
            if other is not None:
                other.close()


def check_tensorboard() -> None:
    """ImportError with the remedy where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("--tensorboard needs tensorboard: pip install tensorboard")
