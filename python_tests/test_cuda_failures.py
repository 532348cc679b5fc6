# SPDX-License-Identifier: Apache-2.0
"""CUDA only: no memory left, and a context that an earlier fault has spoilt. Every op then raises a
Python exception; nothing hangs, nothing ends the process, and freed memory makes it work again."""

import contextlib

import numerics
import pytest
import samples
import torch
from test_cuda_concurrency import start

pytestmark = pytest.mark.gpu


@contextlib.contextmanager
def no_memory():
    """Not a byte to be had from torch's allocator, new or cached."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    held = []
    try:
        for size in (2**24, 2**21, 2**20, 2**16, 2**12, 2**9):  # what is free inside segments
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        yield
    finally:
        del held
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("form", samples.FORMS)
def test_no_memory_left(form, seed):
    op, args, kwargs = samples.sample(form, "cuda", rows=500, seed=seed)
    expected = samples.as_tuple(op(*args, **kwargs))
    with no_memory(), pytest.raises(RuntimeError) as raised:
        op(*args, **kwargs)
    assert "memory" in str(raised.value)
    again = samples.as_tuple(op(*args, **kwargs))
    for a, b in zip(again, expected, strict=True):
        numerics.assert_bitwise(form, a, b)


# An index out of range makes a kernel of torch's assert on the device; the context is lost.
SPOIL = """
import sys
sys.path[:0] = sys.argv[1:]
import samples, torch, seer_cuda
calls = {form: samples.sample(form, "cuda") for form in samples.FORMS}
for op, args, kwargs in calls.values():
    op(*args, **kwargs)
torch.cuda.synchronize()
torch.zeros(4, device="cuda")[torch.tensor([99], device="cuda")]
for form, (op, args, kwargs) in calls.items():
    for _ in range(2):
        try:
            op(*args, **kwargs)
            torch.cuda.synchronize()
        except RuntimeError as error:
            text = " ".join(str(error).split())
            print("raised", form, "|", text[:200])
        else:
            print("NOTHING RAISED", form)
op, args, kwargs = samples.sample("block_sparse_attn", "cpu")
op(*args, **kwargs)
print("the CPU goes on")
"""


def test_a_spoilt_context(seed):
    process = start(SPOIL)
    text, _ = process.communicate(timeout=120)
    raised = [line for line in text.splitlines() if line.startswith("raised ")]
    assert len(raised) == 2 * len(samples.FORMS), text
    assert "NOTHING RAISED" not in text and "the CPU goes on" in text, text
    assert process.returncode == 0, text
