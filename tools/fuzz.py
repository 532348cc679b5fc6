# SPDX-License-Identifier: Apache-2.0
"""Random problems for every op, against the float64 oracle, for as long as you like.

    python tools/fuzz.py --minutes 60 --log fuzz.jsonl    on a GPU if there is one, else on the CPU
    python tools/fuzz.py --device cpu --seed 7 --case 42  one case again, with its whole report

Case N of a seed depends on nothing but the seed, N and the device: not on the cases before it,
nor on --op, which only leaves others out. Each failure prints the line that repeats it. The tests'
own python_tests/drawn_cases.py and drawn_checks.py draw and judge, so pytest must be installed.
Cases run in a child process: a crash or a hang is a failure like any other.

--log: one JSON object per line: what ran, each failure, one line a minute, and at the end a
summary. Exit status: 0 all cases agreed, 1 some did not, 2 wrong options.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python_tests")]

#: Longest sequences of the cases, in rows.
ROWS = {"cpu": 300, "cuda": 700}
#: Seconds until a case that is still running counts as hung.
PATIENCE = 300.0


def draw(seed: int, number: int, device: str) -> dict[str, Any]:
    """Case `number` of `seed`."""
    from drawn_cases import OPS, RandomSource
    from drawn_cases import draw as draw_case

    source = RandomSource(seed, number)
    return draw_case(source, source.pick(OPS), device, ROWS[device])


def judge(case: dict[str, Any]) -> str | None:
    """None where op and oracle agree, else what was found."""
    from drawn_checks import check

    try:
        check(case)
    except AssertionError as error:
        return str(error) or traceback.format_exc()
    except Exception:  # an op must give a result for every one of these problems
        return traceback.format_exc()
    return None


def serve(pipe, judge) -> None:
    """The child process: judges the cases it is sent."""
    for case in iter(pipe.recv, None):
        pipe.send(judge(case))


class Worker:
    """judge() in a process of its own, started again when a case has ended it."""

    def __init__(self, judge=judge, patience: float = PATIENCE):
        self.patience = patience
        self._judge, self._process = judge, None

    def __call__(self, case: dict[str, Any]) -> str | None:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, self._judge), daemon=True)
            process.start()
            theirs.close()
            self._process = process
        try:
            self._pipe.send(case)
            if not self._pipe.poll(self.patience):
                self.stop()
                return f"still running after {self.patience:.0f} s: stopped"
            found = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code, self._process = self._process.exitcode, None
            return f"the process ended with status {code} (a negative one is a signal)"
        if found and "CUDA error" in found:  # a faulted context fails every later case
            self.stop()
        return found

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


class Log:
    """JSON lines in a file, if one was named, each written at once."""

    def __init__(self, path: Path | None):
        self._file = path.open("a") if path else None

    def write(self, event: str, **fields: Any) -> None:
        if self._file:
            self._file.write(json.dumps({"event": event, **fields}) + "\n")
            self._file.flush()


def run(options: argparse.Namespace, worker=None) -> int:
    """Cases 0, 1, 2, ... until the time is over."""
    import torch

    from bench.source import source_hash

    worker = worker or Worker()
    log = Log(options.log)
    began = told = time.monotonic()
    what = {"seed": options.seed, "device": options.device, "torch": torch.__version__}
    if options.device == "cuda":
        what["gpu"] = torch.cuda.get_device_name()
    log.write("start", **what, source=source_hash(), first=options.first, op=options.op)
    print(", ".join(f"{key} {value}" for key, value in what.items()), flush=True)
    counts: Counter[str] = Counter()
    failed = number = 0
    try:
        for number in range(options.first, sys.maxsize):
            seconds = time.monotonic() - began
            if seconds > 60 * options.minutes:
                break
            if time.monotonic() - told > 60:
                told = time.monotonic()
                log.write("progress", cases=sum(counts.values()), failed=failed, seconds=seconds)
            case = draw(options.seed, number, options.device)
            if options.op and case["op"] != options.op:
                continue
            found = worker(case)
            counts[case["op"]] += 1
            if found:
                failed += 1
                again = repeat_line(options, number)
                print(f"\ncase {number}: {case}\n{found}\nagain: {again}", flush=True)
                log.write("failure", number=number, case=case, found=found, again=again)
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        worker.stop()
    seconds = time.monotonic() - began
    total = sum(counts.values())
    summary = {"cases": total, "failed": failed, "seconds": round(seconds), "next": number}
    log.write("summary", **what, **summary, ops=dict(counts))
    print(f"{total} cases in {seconds:.0f} s, {failed} failed: {dict(counts)}")
    return 1 if failed else 0


def repeat_line(options: argparse.Namespace, number: int) -> str:
    """The command that runs case `number` again."""
    return f"python tools/fuzz.py --device {options.device} --seed {options.seed} --case {number}"


def run_one(options: argparse.Namespace) -> int:
    """One case in this process, for a debugger."""
    case = draw(options.seed, options.case, options.device)
    print(f"case {options.case}: {json.dumps(case)}")
    found = judge(case)
    print(found or "agrees with the oracle")
    return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python tools/fuzz.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, help="default: a new one, printed")
    parser.add_argument("--case", type=int, metavar="N", help="run this case alone")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with this case")
    parser.add_argument("--op", help="only cases of this op")
    parser.add_argument("--log", type=Path, metavar="FILE", help="JSON lines, appended")
    options = parser.parse_args(argv)
    import torch
    from drawn_cases import OPS

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, got cuda. torch sees no CUDA device here.")
    if options.op and options.op not in OPS:
        parser.error(f"--op: expected one of {', '.join(OPS)}, got {options.op}.")
    if options.case is not None:
        if options.seed is None:
            parser.error("--case: expected --seed beside it, got none.")
        return run_one(options)
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**31)
    torch.backends.cuda.matmul.allow_tf32 = False
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
