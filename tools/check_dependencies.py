# SPDX-License-Identifier: Apache-2.0
"""Hold the rules on who may include what (docs/design.md), and that public headers stand alone.

    python tools/check_dependencies.py      exit status 1 and one line per violation

- csrc/include: the C++ standard library, cuda_runtime_api.h and its own headers; each compiles
  alone, without torch or CUTLASS on the path.
- kernels, CPU kernels, C++ tests and bench/cpp: never torch, never pybind11.
- csrc/torch: of torch only the stable ABI; never CUTLASS, CuTe or device code (.cuh).
- csrc/python: never torch, never CUTLASS or CuTe.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SUFFIXES = (".h", ".hpp", ".cpp", ".cu", ".cuh", ".in")
INCLUDE = re.compile(r'^\s*#\s*include\s*(<[^>]+>|"[^"]+")', re.MULTILINE)

TORCH = re.compile(r"^(torch|ATen|c10|caffe2|pybind11|Python\.h)\b")
STABLE = re.compile(r"^torch/(csrc/stable/|headeronly/|csrc/inductor/aoti_torch/c/shim)")
DEVICE = re.compile(r"^(cutlass|cute)/|\.cuh$")
STANDARD = re.compile(r"^[a-z_]+$")  # <vector>; C headers of the platform have a suffix


def allowed(folder: str, header: str, quoted: bool) -> str:
    """Empty, or the rule that including `header` from csrc/`folder` breaks."""
    if folder == "include":
        public = header.startswith("seer/") if quoted else STANDARD.match(header)
        fine = bool(public) or header == "cuda_runtime_api.h"
        return "" if fine else "include/ uses std, cuda_runtime_api.h and seer/ only"
    if folder == "torch":
        if DEVICE.search(header):
            return "torch/ sees no CUTLASS, CuTe or device code"
        fine = not TORCH.match(header) or STABLE.match(header)
        return "" if fine else "torch/ uses the stable ABI only"
    if folder == "python":
        if header.startswith("pybind11/"):
            return ""
        fine = not TORCH.match(header) and not DEVICE.search(header)
        return "" if fine else "python/ uses pybind11, include/ and std only"
    return "kernels, tests and bench/cpp never see torch or pybind11" if TORCH.match(header) else ""


def violations() -> list[str]:
    """One line per forbidden #include."""
    found = []
    files = [*CSRC.rglob("*"), *(ROOT / "bench" / "cpp").rglob("*")]
    for path in sorted(p for p in files if p.suffix in SUFFIXES and p.is_file()):
        folder = path.relative_to(CSRC).parts[0] if path.is_relative_to(CSRC) else "bench"
        for match in INCLUDE.finditer(path.read_text()):
            quoted, header = match[1][0] == '"', match[1][1:-1]
            rule = allowed(folder, header, quoted)
            if rule:
                found.append(f"{path.relative_to(ROOT)}: #include {match[1]}: {rule}")
    return found


def toolkit_include() -> list[str]:
    """`-I` of the CUDA toolkit, for headers that use cuda_runtime_api.h; empty without one."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc:
        roots.insert(0, str(Path(nvcc).resolve().parent.parent))
    for root in roots:
        if root and (Path(root) / "include" / "cuda_runtime_api.h").exists():
            return ["-isystem", str(Path(root) / "include")]
    return []


def lone_headers() -> list[str]:
    """One line per public header that does not compile on its own."""
    compiler = os.environ.get("CXX", "g++")
    toolkit = toolkit_include()
    found = []
    for header in sorted((CSRC / "include").rglob("*.h")):
        uses_cuda = "cuda_runtime_api.h" in header.read_text()
        if uses_cuda and not toolkit:
            continue
        # Included, not compiled as the main file: `#pragma once` would warn there.
        name = header.relative_to(CSRC / "include").as_posix()
        command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
        command += ["-x", "c++", "-I", str(CSRC / "include"), *(toolkit if uses_cuda else []), "-"]
        source = f'#include "{name}"\n'
        done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        if done.returncode:
            first = done.stderr.strip().splitlines()[0]
            found.append(f"csrc/include/{name}: does not compile on its own: {first}")
    return found


def main() -> int:
    """Exit status 1 if a rule is broken."""
    found = violations() + lone_headers()
    print("\n".join(found) if found else "Includes keep the rules; public headers stand alone.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
