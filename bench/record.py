# SPDX-License-Identifier: Apache-2.0
"""The GPU record: tests, sanitizer and benchmarks of one source state on one GPU, as JSON.

    python -m bench.record               run everything, write bench/results/<gpu>.json
    python -m bench.record --sanitize    with compute-sanitizer over the reduced GPU tests
    python -m bench.record --check       is there a sound record of the present sources? (no GPU,
                                         no torch needed; exit status 0 yes, 1 no)

The exit status of a run is 0 only if every test passed, every case of ours and the cost of a launch
were measured, and no sanitizer found anything; the record is written in any case and names what is
missing.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import functools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from bench.cases import MODELS, Case, all_cases, case_of, model_cases, newest_family
from bench.source import ROOT, source_hash

RESULTS = ROOT / "bench" / "results"
# Shares of the time limit after which a part yields to the next.
CHECKS_UNTIL = 0.5
CASES_UNTIL = 0.97


class OptionError(ValueError):
    """Options that choose nothing."""


def record_path(gpu: str) -> Path:
    """bench/results/<gpu>.json, e.g. nvidia_h200.json for "NVIDIA H200"."""
    name = "".join(c if c.isalnum() else "_" for c in gpu.lower())
    return RESULTS / f"{name}.json"


def faults(record: dict) -> list[str]:
    """What a record lacks or found wrong, one line each; none for a sound one.

    A run without compute-sanitizer may be sound; the line of `check_records` says that it was not
    run.
    """
    if "tests" not in record:
        return ["partial: it was made without the GPU tests"]
    found = []
    tests = record["tests"]
    if tests["failed"]:
        note = f" ({tests['note']})" if "note" in tests else ""
        found.append(f"{tests['failed']} GPU tests failed{note}")
    for tool, errors in (record.get("sanitizer") or {}).items():
        if errors:
            found.append(f"{tool}: {errors if isinstance(errors, str) else f'found {errors}'}")
    measured = {case_of(row).name for row in record["rows"]}
    reasons = record.get("failures", {})
    for case in all_cases(record["family"]):
        if case.name not in measured:
            found.append(f"{case.name}: {reasons.get(case.name, 'not measured')}")
    if "launch" not in record:
        found.append(f"launch: {reasons.get('launch', 'not measured')}")
    return found


def check_records(paths: list[Path], source: str) -> tuple[bool, str]:
    """Whether there are records of `source` (a hash) and all of them are sound, and the text that
    says so: a line per record of these sources, and below it one per fault."""
    newest, latest, lines, sound = None, "", [], True
    for path in sorted(paths):
        record = json.loads(path.read_text())
        line = f"{path.name} ({record['gpu']}, {record['date']}, source {record['source'][:12]})"
        if record["date"] >= latest:
            newest, latest = line, record["date"]
        if record["source"] != source:
            continue
        tests = record.get("tests", {})
        keys = [key for key in ("passed", "failed", "skipped") if key in tests]
        counts = ", ".join(f"{tests[key]} {key}" for key in keys) or "not run"
        tools = ", ".join(record.get("sanitizer") or ()) or "not run"
        lines.append(
            f"GPU record: {line} belongs to the present sources; tests: {counts}; "
            f"sanitizer: {tools}."
        )
        wrong = faults(record)
        lines.extend(f"  {fault}" for fault in wrong)
        sound = sound and not wrong
    if lines:
        return sound, "\n".join(lines)
    if newest is None:
        return False, "GPU record: none in bench/results; `make gpu-check` on a GPU writes it."
    return False, (
        f"GPU record: {newest} is of other sources, the present ones are {source[:12]}; "
        "`make gpu-check` on a GPU renews it."
    )


def environment() -> dict[str, str | None]:
    """gpu, family (the kernel family that calls run by default on it), driver, torch, cuda, date,
    source: what the numbers belong to."""
    import torch

    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        driver = told.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "gpu": torch.cuda.get_device_name(),
        "family": newest_family(torch.cuda.get_device_capability()),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "source": source_hash(),
    }


def write_record(record: dict, path: Path) -> None:
    """JSON with one benchmark row per line, so that a diff shows what moved."""
    head = {key: value for key, value in record.items() if key != "rows"}
    text = json.dumps(head, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in record["rows"])
    text = text[: text.rindex("\n")] + f',\n "rows": [\n{rows}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def succeeded(record: dict, ours_missing: list[str]) -> bool:
    """The exit status's rule (module docstring)."""
    tests = record.get("tests", {"failed": 0})  # a partial run has none
    sanitizer = record.get("sanitizer") or {}
    return not tests["failed"] and not ours_missing and not any(sanitizer.values())


def chosen_cases(options: argparse.Namespace, family: str) -> list[Case]:
    """The cases of a run; OptionError if there are none."""
    cases = all_cases(family)
    if options.models is not None:
        cases = model_cases(family, _models(options.models))
    if options.quick:
        cases = [case for case in cases if case.rows_kv <= 8192]
    if options.only:
        cases = [case for case in cases if fnmatch.fnmatch(case.name, options.only)]
    if not cases:
        raise OptionError(
            f"--only: expected a pattern of some case's name, got {options.only!r}, which no case "
            "of these options has. A run prints the names."
        )
    return cases


def chosen_peers(names: str | None) -> list[ModuleType]:
    """The peers of a run; OptionError if one of the names is no peer's."""
    from bench.peers import all_peers

    peers = all_peers()
    if names is None:
        return peers
    wanted = [name for name in names.split(",") if name]
    known = [peer.NAME for peer in peers]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise OptionError(
            f"--peers: expected some of {', '.join(known)}, got {', '.join(unknown)}. Pass '' for "
            "none."
        )
    return [peer for peer in peers if peer.NAME in wanted]


def run(options: argparse.Namespace) -> int:
    """Everything that needs the GPU.

    Raises:
        OptionError: options that choose no case, or a peer that there is not.
    """
    import torch

    if not torch.cuda.is_available():
        print("bench.record: no CUDA device; `--check` works without one.", file=sys.stderr)
        return 2

    from bench import checks, report
    from bench.launch import launch_costs
    from bench.runner import reason_of, run_cases
    from bench.timing import CudaClock, Schedule

    began = time.monotonic()
    record: dict = environment()
    chosen = options.models is not None or options.peers is not None
    partial = options.quick or options.only or chosen
    cases, peers = chosen_cases(options, record["family"]), chosen_peers(options.peers)
    # The tests and the sanitizer side by side, before anything is timed.
    checks_until = CHECKS_UNTIL * options.limit
    with ThreadPoolExecutor(1) as beside:
        if options.sanitize:
            sanitizer = beside.submit(checks.run_sanitizer, deadline=began + checks_until)
        if not (options.no_tests or partial):
            record["tests"] = checks.run_gpu_tests(timeout=checks_until)
        if options.sanitize:
            record["sanitizer"] = sanitizer.result()

    print(f"\n{record['gpu']}, driver {record['driver']}, torch {record['torch']}")
    print("\n".join(report.head_lines()), flush=True)
    results = run_cases(
        cases,
        record["family"],
        peers,
        CudaClock(),
        Schedule(rounds=1) if options.quick else Schedule(),
        deadline=began + CASES_UNTIL * options.limit,
        say=functools.partial(print, flush=True),
    )
    try:
        record["launch"] = launch_costs()
        print("\n".join(report.launch_lines(record["launch"])))
    except Exception as error:  # the rows are kept, and the reason
        results.failures["launch"] = reason_of(error)
    record["unavailable"] = results.unavailable
    record["failures"] = results.failures
    record["seconds"] = round(time.monotonic() - began)
    record["rows"] = results.rows

    for part in ("tests", "sanitizer", "unavailable", "failures", "seconds"):
        if record.get(part):
            print(f"{part}: {json.dumps(record[part])}")
    path = options.output
    if path is None and "tests" in record:
        path = record_path(record["gpu"])
    if path is not None:
        write_record(record, path)
        print(f"written: {path}")
    missing = [name for name in (*(c.name for c in cases), "launch") if name in results.failures]
    return 0 if succeeded(record, missing) else 1


def _models(names: str) -> list[str]:
    return [name for name in names.split(",") if name] or list(MODELS)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only judge the present record")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer too")
    parser.add_argument("--only", metavar="GLOB", help="cases by name, e.g. '*-32k-64x64-*'")
    parser.add_argument(
        "--models",
        metavar="NAMES",
        nargs="?",
        const="",
        help=f"instead: attention of models at 4k to 256k tokens; some of {', '.join(MODELS)}, "
        "separated by commas (default: all)",
    )
    parser.add_argument("--peers", metavar="NAMES", help="only these, e.g. fa3,fa4; '' for none")
    parser.add_argument("--quick", action="store_true", help="short lengths, one round")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks only")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds in all (480)")
    parser.add_argument(
        "--output",
        type=Path,
        help="where to write; without it a run of all parts writes bench/results/<gpu>.json, "
        "a partial one (--only, --models, --peers, --quick, --no-tests) prints only",
    )
    options = parser.parse_args(argv)
    if options.check:
        sound, text = check_records(list(RESULTS.glob("*.json")), source_hash())
        print(text)
        return 0 if sound else 1
    if options.models is not None:
        try:
            model_cases("", _models(options.models))
        except ValueError as error:
            parser.error(str(error))
    try:
        return run(options)
    except OptionError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
