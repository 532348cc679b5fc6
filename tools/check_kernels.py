# SPDX-License-Identifier: Apache-2.0
"""Print the compiler's report on every kernel; refuse spills, local memory and slow code.

    python tools/check_kernels.py [ptxas.json]      default: the newest of build/*/ptxas.json

The build leaves the report. A build without nvcc leaves none, which is said and accepted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def offenders(kernels: list[dict]) -> list[dict]:
    """Kernels that spill registers, use a stack frame, or lose performance in ptxas's own words."""
    faults = ("spill_stores", "spill_loads", "stack", "losses")
    return [kernel for kernel in kernels if any(kernel[fault] for fault in faults)]


def main(argv: list[str]) -> int:
    """Exit status 1 if a kernel is refused."""
    reports = (
        [Path(argv[0])]
        if argv
        else sorted((ROOT / "build").glob("*/ptxas.json"), key=lambda path: path.stat().st_mtime)
    )
    if not reports:
        print("No ptxas report: a build without nvcc has no kernels.")
        return 0
    kernels = json.loads(reports[-1].read_text())["kernels"]
    print(f"{'kernel':48} {'arch':8} {'registers':>9} {'spill bytes':>11} {'stack':>5}")
    for kernel in kernels:
        spilled = kernel["spill_stores"] + kernel["spill_loads"]
        print(
            f"{kernel['name']:48} {kernel['arch']:8} {kernel['registers']:9} {spilled:11} "
            f"{kernel['stack']:5}"
        )
    bad = offenders(kernels)
    for kernel in bad:
        why = "; ".join(kernel["losses"]) or "uses local memory"
        print(f"refused: {kernel['name']} ({kernel['arch']}): {why}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
