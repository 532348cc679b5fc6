# SPDX-License-Identifier: Apache-2.0
"""Install built wheels in fresh environments, one per Python and torch, and call every operator.

    python tools/check_install.py dist/*.whl --python python3.11 python3.12 --torch 2.11.0 2.15.0

A wheel goes to the interpreters that its tag names. Each environment gets that torch from the
package index (gigabytes for a CUDA build; --keep DIR keeps the environments for the next time), the
wheel and its needs, nothing else, and runs outside the checkout. Prints a table; exit status 1 if
anything failed or a wheel found no interpreter.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Runs in the environment. Tolerances are coarse: whether it loads and computes; accuracy is for the
# tests.
CALLS = """
import json, sys, torch, seer_cuda
from seer_cuda import info
from seer_cuda import reference as ref
assert not seer_cuda.__file__.startswith(sys.argv[1]), seer_cuda.__file__
ops, ran = torch.ops.seer, []
for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, 200, h, 64, device=device, dtype=dtype) for h in (4, 2, 2))
    bits = ops.pack_block_bits(torch.rand(1, 4, 4, 4, device=device) < 0.5)
    assert torch.equal(ref.pack_block_bits(ops.unpack_block_bits(bits, 4)), bits)
    lists = torch.zeros(1, 4, 4, 2, dtype=torch.int32, device=device)
    ops.block_bits_from_indices(lists, lists[..., 0] + 1, 4)
    near = dict(atol=2e-2, rtol=2e-2)
    for op, args in (
        ("block_sparse_attn", (q, k, v, bits)),
        ("attn_pool", (q, k, v)),
        ("pool_gate", (q,)),
        ("gate_scores", (q, k)),
    ):
        found, want = getattr(ops, op)(*args), getattr(ref, op)(*args)
        found, want = (x if isinstance(x, tuple) else (x,) for x in (found, want))
        for a, b in zip(found, want):
            torch.testing.assert_close(a.double(), b.double(), **near)
    gate = seer_cuda.AttnGate(seer_cuda.GateConfig(4, 2, 64), device=device, dtype=dtype)
    rule = seer_cuda.Rule("topk", 2, local=1)
    seer_cuda.sparse_prefill(q, k, v, q, k, gate, rule)  # gate_select inside
    ran.append(device)
about = info.collect()
print(json.dumps({"ran": ran, "torch": torch.__version__, "core": about["build"] is not None}))
"""


def tag_of(wheel: Path) -> str:
    """The Python tag of a wheel's name, e.g. cp311."""
    return wheel.stem.split("-")[-3]


def python_tag(python: str) -> str:
    """cp311 for an interpreter of Python 3.11."""
    code = "import sys; print('cp%d%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout[
        :-1
    ]


def attempt(python: str, torch: str, wheel: Path, folder: Path) -> tuple[bool, str]:
    """Whether the wheel works there, and what it said."""
    own = folder / f"{python_tag(python)}-torch{torch}"
    mine = str(own / "bin" / "python")
    pip = [mine, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    root = str(Path(__file__).resolve().parent.parent)
    for command in (
        [python, "-m", "venv", str(own)],
        [*pip, f"torch=={torch}", "numpy"],
        [*pip, "--force-reinstall", "--no-deps", str(wheel.resolve())],
        [mine, "-I", "-c", CALLS, root],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            what = "calling the operators" if CALLS in command else " ".join(command)
            return False, f"{what}:\n{done.stdout}{done.stderr}"
    return True, done.stdout.strip().splitlines()[-1]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python tools/check_install.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PATH")
    parser.add_argument("--torch", nargs="+", default=["2.11.0"], metavar="VERSION")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the environments stay")
    options = parser.parse_args(argv)
    bad = 0
    with tempfile.TemporaryDirectory() as passing:
        folder = (options.keep or Path(passing)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for wheel in options.wheels:
            fitting = [python for python in options.python if python_tag(python) == tag_of(wheel)]
            if not fitting:
                print(f"{wheel.name}: no interpreter for {tag_of(wheel)} among --python")
                bad += 1
            for python in fitting:
                for torch in options.torch:
                    began = time.monotonic()
                    good, text = attempt(python, torch, wheel, folder)
                    bad += not good
                    word = "ok" if good else "FAILED"
                    seconds = time.monotonic() - began
                    where = f"{tag_of(wheel)} torch {torch}"
                    print(f"{where}: {word}, {seconds:.0f} s: {text}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
