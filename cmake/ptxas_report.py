# SPDX-License-Identifier: Apache-2.0
"""Turn the captured output of ``ptxas -v`` into a table of registers, spills and stack.

    python ptxas_report.py --json ptxas.json --inc kernel_resources.inc OBJECT.ptxas [...]

Writes one JSON row per kernel and architecture, and the same as C++ initialisers for the
``_core`` module. Warns of spills, local memory and what ptxas itself calls a loss of performance
(wgmma serialised, setmaxnreg ignored); tools/check_kernels.py fails on them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
LOSS = re.compile(r"Potential Performance Loss: (.*)")  # not always with the kernel's name


def parse(log: Path) -> list[dict]:
    """Rows of one log. ``name`` is the source's stem, ``symbol`` tells its kernels apart,
    ``losses`` are ptxas's remarks on any of them."""
    stem = log.name.split(".")[0]
    rows: list[dict] = []
    losses: list[str] = []
    for line in log.read_text().splitlines():
        if match := ENTRY.search(line):
            rows.append({"name": stem, "symbol": match[1], "arch": match[2]})
        elif rows and (match := FRAME.search(line)):
            stack, stores, loads = (int(group) for group in match.groups())
            rows[-1].update(stack=stack, spill_stores=stores, spill_loads=loads)
        elif rows and (match := USED.search(line)):
            rows[-1]["registers"] = int(match[1])
        elif match := LOSS.search(line):
            losses.append(match[1])
    for row in rows:
        row["losses"] = losses
    incomplete = [row for row in rows if "registers" not in row or "stack" not in row]
    if incomplete:
        raise SystemExit(f"{log}: could not read the resources of {incomplete[0]['symbol']}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--inc", type=Path, required=True)
    args = parser.parse_args()

    rows = [row for log in sorted(args.logs) for row in parse(log)]
    args.json.write_text(json.dumps({"kernels": rows}, indent=1) + "\n")
    args.inc.write_text(
        "".join(f'{{"{r["name"]}", "{r["arch"]}", {r["registers"]}}},\n' for r in rows)
    )
    for row in rows:
        if row["stack"] or row["spill_stores"] or row["spill_loads"] or row["losses"]:
            print(f"seer_cuda: slow code in {row['name']} ({row['arch']}): {row}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
