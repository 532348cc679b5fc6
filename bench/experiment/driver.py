# SPDX-License-Identifier: Apache-2.0
"""All stages in order, each a process of its own on the first GPU that is free.

A stage that is done leaves a mark with its seconds; started again, a run does what is left. So
does a stage that was killed in the middle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.experiment.evaluate import groups
from bench.experiment.settings import Settings

_POLL_SECONDS = 0.3
_TRIES = 2


@dataclass(frozen=True)
class Job:
    """One stage: its name, its arguments, what it waits for.

    Attributes:
        gpu: "none", "first" or "last" (that one alone), or "any".
    """

    name: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()
    gpu: str = "any"


def jobs(settings: Settings, prefill: bool = True) -> list[Job]:
    """Every stage, those first that should start first."""
    found = [
        Job("corpus", ("corpus",), gpu="none"),
        Job("train", ("train",), ("corpus",), gpu="first"),
    ]
    if prefill:
        # Needs nothing: on another GPU while the model trains, or while the corpus is read.
        found.append(Job("prefill", ("prefill",), gpu="last"))
    # What matters most first, should the time end: a seed, all baselines, the other gates.
    first = str(settings.seeds[0])
    gates = {str(seed): ("--seed", str(seed)) for seed in settings.seeds}
    gates |= {name: ("--seed", first, "--gate", name) for name in settings.variants}
    for group in groups(settings):
        needs = "train"
        if group in gates:
            needs = f"distil_{group}"
            found.append(Job(needs, ("distil", *gates[group]), ("train",)))
        found.append(Job(f"eval_{group}", ("eval", "--group", group), (needs,)))
    return found


class Driver:
    """Starts jobs as they become possible.

    Args:
        folder: Of the run.
        todo: The jobs, those first that should start first.
        gpus: Names for CUDA_VISIBLE_DEVICES; "1@480" may be used from 480 s after the start on.
        options: Given to every stage.
        collect: Called after every stage, so that a run whose time ends leaves what it has found.
    """

    def __init__(
        self,
        folder: Path,
        todo: Sequence[Job],
        gpus: Sequence[str],
        options: Sequence[str],
        collect: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.options, self.collect = folder, list(options), collect
        self.todo = list(todo)
        known = [gpu.partition("@") for gpu in gpus]
        self.order = [name for name, _, _ in known]
        self.later = {name: float(seconds) for name, _, seconds in known if seconds}
        self.free = list(self.order)
        self.running: dict[subprocess.Popen, tuple[Job, str | None, float]] = {}
        self.tries: dict[str, int] = {}
        self.began = time.monotonic()
        for name in ("done", "log"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def done(self, name: str) -> bool:
        """Whether a stage is finished, now or in a run before."""
        return (self.folder / "done" / f"{name}.json").is_file()

    def run(self) -> list[str]:
        """Runs everything that is left; names of the stages that are not done at the end."""
        while True:
            for job in list(self.todo):
                if self.done(job.name):
                    self.todo.remove(job)
                elif all(map(self.done, job.after)):
                    gpu = None if job.gpu == "none" else self._gpu_for(job)
                    if gpu is not None or job.gpu == "none":
                        self.todo.remove(job)
                        self._start(job, gpu)
            if not self.running and not self._waits():
                return [job.name for job in self.todo] + sorted(
                    name for name in self.tries if not self.done(name)
                )
            time.sleep(_POLL_SECONDS)
            for process in [process for process in self.running if process.poll() is not None]:
                self._finish(process)

    def _gpu_for(self, job: Job) -> str | None:
        """A GPU that may be used now."""
        wanted = {"first": self.order[:1], "last": self.order[-1:]}.get(job.gpu, self.order)
        now = time.monotonic() - self.began
        return next(
            (gpu for gpu in wanted if gpu in self.free and now >= self.later.get(gpu, 0.0)), None
        )

    def _waits(self) -> bool:
        """Whether something can start once a GPU may be used."""
        now = time.monotonic() - self.began
        ready = any(all(map(self.done, job.after)) for job in self.todo)
        return ready and any(now < seconds for seconds in self.later.values())

    def _start(self, job: Job, gpu: str | None) -> None:
        if gpu is not None:
            self.free.remove(gpu)
        self.tries[job.name] = self.tries.get(job.name, 0) + 1
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
        if gpu is not None and gpu != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", "bench.experiment", *job.arguments]
        command += ["--folder", str(self.folder), *self.options]
        with (self.folder / "log" / f"{job.name}.txt").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.running[process] = (job, gpu, time.monotonic())
        self.say(f"{job.name}: started" + ("" if gpu is None else f" on GPU {gpu}"))

    def _finish(self, process: subprocess.Popen) -> None:
        job, gpu, began = self.running.pop(process)
        seconds = time.monotonic() - began
        if gpu is not None:
            self.free.append(gpu)
        if process.returncode == 0:
            mark = self.folder / "done" / f"{job.name}.json"
            mark.write_text(json.dumps({"seconds": round(seconds, 1), "gpu": gpu}))
            self.say(f"{job.name}: done in {seconds:.0f} s")
            self.collect()
            return
        self.say(f"{job.name}: status {process.returncode} after {seconds:.0f} s")
        if self.tries[job.name] < _TRIES:
            self.todo.insert(0, job)

    def say(self, text: str) -> None:
        """One line with the time since the start, to stdout and progress.txt."""
        line = f"[{time.monotonic() - self.began:6.1f} s] {text}"
        print(line, flush=True)
        with (self.folder / "progress.txt").open("a") as file:
            file.write(line + "\n")

    def stop(self) -> None:
        """Ends what runs."""
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait()


def run(
    folder: Path,
    settings: Settings,
    gpus: Sequence[str],
    options: Sequence[str],
    *,
    prefill: bool = True,
    collect: Callable[[], None] = lambda: None,
) -> int:
    """Everything; the exit status. `collect` runs after every stage, and at the end in any case."""
    driver = Driver(folder, jobs(settings, prefill), gpus, options, collect)
    try:
        missing = driver.run()
    finally:
        driver.stop()
    collect()
    driver.say(f"not done: {', '.join(missing)}" if missing else "all done")
    return 1 if missing else 0
