# SPDX-License-Identifier: Apache-2.0
"""What cmake/*.cmake make of the build's options, in scripts of their own."""

import shutil
import subprocess
from pathlib import Path

import pytest

CMAKE = Path(__file__).resolve().parent.parent / "cmake"
PARTS = ["SEER_CUDA", "SEER_TORCH", "SEER_PYTHON", "SEER_BENCH"]

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or not CMAKE.is_dir(), reason="needs cmake and a checkout"
)


def run_script(tmp_path, module, tell, **options):
    """Includes one module under these options, then prints `tell`: (exit status, output)."""
    script = tmp_path / "script.cmake"
    lines = [f'set({name} "{value}")' for name, value in options.items()]
    lines += [f'include("{CMAKE / module}.cmake")', f'message("told {tell}")']
    script.write_text("\n".join(["cmake_minimum_required(VERSION 3.22)", *lines]))
    done = subprocess.run(["cmake", "-P", script], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_auto_on_or_off(tmp_path, part):
    options = dict.fromkeys(PARTS, "AUTO")
    code, out = run_script(tmp_path, "AutoParts", f"${{{part}}}", **options | {part: "off"})
    assert code == 0 and "told OFF" in out
    code, out = run_script(tmp_path, "AutoParts", "", **options | {part: "maybe"})
    assert code != 0
    assert f"seer_cuda: {part}: expected AUTO, ON or OFF, got 'MAYBE'." in out


@pytest.mark.parametrize(
    "named, compiled, lowest",
    [
        ("80;90a", "80-real;90-real;80-virtual", 80),
        ("90a;80", "80-real;90-real;80-virtual", 80),
        ("120;90;90a", "90-real;120-real;90-virtual", 90),
        ("90a", "90-real;90-virtual", 90),
    ],
)
def test_ptx_is_that_of_the_lowest_architecture(tmp_path, named, compiled, lowest):
    tell = "${portable_archs} from ${lowest_arch}"
    code, out = run_script(tmp_path, "Architectures", tell, SEER_ARCHS=named)
    assert code == 0 and f"told {compiled} from {lowest}\n" in out
