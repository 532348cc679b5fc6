# SPDX-License-Identifier: Apache-2.0
"""Seeds, the GPU line of the header, and the count of what was skipped and why.

SEER_TEST_SEED=<int>  base of every test's seed (default 0)
SEER_SLOW=1           also run tests marked slow
SEER_REQUIRE_GPU=1    a run in which no gpu test was executed fails
"""

import os
import zlib
from collections import Counter

import attention
import hypothesis
import pytest
import torch

# The same examples in every run, and none kept on disk; --hypothesis-profile=more draws new ones.
hypothesis.settings.register_profile(
    "seer", max_examples=150, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("more", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("seer")

_executed_gpu = 0
_skips: Counter = Counter()


def pytest_report_header(config):
    lines = [f"seer: torch {torch.__version__}, SEER_TEST_SEED={_base_seed()}"]
    if torch.cuda.is_available():
        props = torch.cuda.get_device_properties(0)
        lines.append(
            f"seer: GPU {props.name}, sm_{props.major}{props.minor}, "
            f"{props.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, "
            f"{torch.cuda.device_count()} visible"
        )
    else:
        lines.append("seer: no CUDA device, gpu tests will be skipped and counted")
    return lines


def pytest_collection_modifyitems(config, items):
    slow = os.environ.get("SEER_SLOW") == "1" or "slow" in (config.option.markexpr or "")
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    no_slow = pytest.mark.skip(reason="slow, run with SEER_SLOW=1")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        elif item.get_closest_marker("slow") and not slow:
            item.add_marker(no_slow)


def pytest_runtest_logreport(report):
    global _executed_gpu
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skips[reason.removeprefix("Skipped: ")] += 1
    elif report.when == "call" and "gpu" in report.keywords:
        _executed_gpu += 1


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("seer")
    terminalreporter.line(f"gpu tests executed: {_executed_gpu}")
    for reason, count in _skips.most_common():
        terminalreporter.line(f"skipped {count}: {reason}")
    if _gpu_missing():
        terminalreporter.line("SEER_REQUIRE_GPU=1, but no gpu test was executed", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if _gpu_missing() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _gpu_missing() -> bool:
    return os.environ.get("SEER_REQUIRE_GPU") == "1" and _executed_gpu == 0


def _base_seed() -> int:
    return int(os.environ.get("SEER_TEST_SEED", "0"))


@pytest.fixture
def seed(request) -> int:
    """A seed of this test's own, the same in every run; printed with the line that repeats it."""
    value = (zlib.crc32(request.node.name.encode()) + _base_seed()) % 2**31
    print(f"seed {value}; SEER_TEST_SEED={_base_seed()} pytest '{request.node.nodeid}'")
    return value


@pytest.fixture(autouse=True)
def _full_precision_matmul():
    """The oracle and the baselines must not run through TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Runs the test on both devices."""
    return request.param


@pytest.fixture(
    params=[("cpu", 0)]
    + [pytest.param(("cuda", arch), marks=pytest.mark.gpu) for arch in attention.FAMILIES],
    ids=["cpu", *(f"cuda-sm{arch}" for arch in attention.FAMILIES)],
)
def sparse_device(request, monkeypatch) -> str:
    """Runs the test on the CPU and on CUDA by each kernel family of block_sparse_attn."""
    device, arch = request.param
    monkeypatch.setattr(attention, "default_arch", arch)
    return device
