# SPDX-License-Identifier: Apache-2.0
"""The GPU tests and compute-sanitizer runs that a record carries, each in its own process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.source import ROOT

SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")


def count_tests(junit: Path) -> dict[str, int]:
    """{passed, failed, skipped} of a junit file that pytest wrote; an error counts as failed."""
    total = failed = skipped = 0
    for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def run_gpu_tests(timeout: float) -> dict[str, int | str]:
    """Runs `pytest -m gpu`, its output shown. {passed, failed, skipped} and, where the run did not
    come to a normal end, `note` (counted as one failure)."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        try:
            code = subprocess.run(
                [*command, f"--junitxml={junit}"], cwd=ROOT, timeout=timeout, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {"passed": 0, "failed": 1, "skipped": 0, "note": f"stopped after {timeout:.0f}s"}
        if not junit.exists():
            return {"passed": 0, "failed": 1, "skipped": 0, "note": f"pytest exit status {code}"}
        counts: dict[str, int | str] = dict(count_tests(junit))
    if code not in (0, 1):
        counts["failed"] = int(counts["failed"]) + 1
        counts["note"] = f"pytest exit status {code}"
    elif counts["passed"] == counts["failed"] == 0:
        counts["failed"] = 1
        counts["note"] = "no GPU test ran"
    return counts


def sanitizer_errors(tool: str, text: str) -> int | None:
    """Errors (racecheck: hazards, warnings included) in a tool's log, None without a summary.

    A process tree has one summary per process; they are added up.
    """
    if tool == "racecheck":
        found = re.findall(r"RACECHECK SUMMARY: (\d+) hazards? displayed", text)
    else:
        found = re.findall(r"ERROR SUMMARY: (\d+) errors?", text)
    return sum(int(count) for count in found) if found else None


def run_sanitizer(deadline: float) -> dict[str, int | str] | None:
    """{tool: errors} of every tool over `pytest -m "gpu and reduced"`, or {tool: why there is no
    number}; None where compute-sanitizer is not installed.

    Only kernels of ours are instrumented. The tools run side by side: nothing here is timed.
    `deadline`: time.monotonic seconds.
    """
    binary = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(binary).exists():
        print("compute-sanitizer is not installed: no sanitizer run", flush=True)
        return None
    with ThreadPoolExecutor(len(SANITIZER_TOOLS)) as side_by_side:
        runs = {
            tool: side_by_side.submit(_run_tool, binary, tool, deadline - time.monotonic())
            for tool in SANITIZER_TOOLS
        }
        return {tool: run.result() for tool, run in runs.items()}


def _run_tool(binary: str, tool: str, timeout: float) -> int | str:
    if timeout < 10:
        return "not run: out of time"
    # The allocator's cache would hide an access behind the end of a tensor from memcheck.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        command = [binary, "--tool", tool, "--kernel-name", "kns=seer", "--log-file", str(log)]
        if tool != "memcheck":  # the Hopper kernel has 133 or 268 barriers per thread block
            command += ["--num-cuda-barriers", "65536"]
        command += [sys.executable, "-m", "pytest", "-m", "gpu and reduced", "-q"]
        command += ["-p", "no:cacheprovider"]
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=timeout, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout:.0f} s"
        text = log.read_text() if log.exists() else ""
    errors = sanitizer_errors(tool, text)
    if errors is None:
        return f"no summary, exit status {code}"
    if errors:
        print("\n".join(text.splitlines()[:40]), flush=True)
    elif code != 0:
        return f"pytest exit status {code}"
    return errors
