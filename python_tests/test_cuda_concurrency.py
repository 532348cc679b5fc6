# SPDX-License-Identifier: Apache-2.0
"""CUDA only: every op on two streams, from two host threads, in two processes, on two devices, and
in a graph whose mask changes between replays."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attention
import gates
import numerics
import pytest
import samples
import torch
from attention import make_bits, run_and_check, small, sparse_op

import seer_cuda

pytestmark = pytest.mark.gpu
FORMS = pytest.mark.parametrize("form", samples.FORMS)
TURNS = 20


def problems(form, seed, count=2, rows=500):
    """`count` different calls of a form, each with its results alone on the device."""
    calls = [samples.sample(form, "cuda", rows=rows, seed=seed + n) for n in range(count)]
    expected = [samples.as_tuple(op(*args, **kwargs)) for op, args, kwargs in calls]
    torch.cuda.synchronize()
    return calls, expected


def assert_same(name, results, expected):
    for n, (a, b) in enumerate(zip(results, expected, strict=True)):
        numerics.assert_bitwise(f"{name}, result {n}", a, b)


@FORMS
def test_two_streams(form, seed):
    """In turns on two streams, nothing waits: what one uses (workspaces, counters) is its own."""
    calls, expected = problems(form, seed)
    streams = [torch.cuda.Stream() for _ in calls]
    results = []
    for _ in range(TURNS):
        for n, (op, args, kwargs) in enumerate(calls):
            with torch.cuda.stream(streams[n]):
                results.append((n, samples.as_tuple(op(*args, **kwargs))))
    torch.cuda.synchronize()
    for n, result in results:
        assert_same(f"{form} on stream {n}", result, expected[n])


@FORMS
def test_two_threads(form, seed):
    """Each on a stream of its own, in a thread whose first CUDA calls these are."""
    calls, expected = problems(form, seed)

    def work(n):
        op, args, kwargs = calls[n]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [samples.as_tuple(op(*args, **kwargs)) for _ in range(TURNS)]
            stream.synchronize()
        return results

    with ThreadPoolExecutor(2) as pool:
        for n, results in enumerate(pool.map(work, range(2))):
            for result in results:
                assert_same(f"{form} in thread {n}", result, expected[n])


# Every form on the CPU's numbers, again and again; the results of the last turn go to a file.
WORK = """
import sys, time
sys.path[:0] = sys.argv[3:]
import samples, torch, seer_cuda
end = time.monotonic() + 5
while time.monotonic() < end:
    results = {}
    for form in samples.FORMS:
        op, args, kwargs = samples.sample(form, "cuda", rows=500, seed=int(sys.argv[1]))
        results[form] = [x.cpu() for x in samples.as_tuple(op(*args, **kwargs))]
torch.save(results, sys.argv[2])
"""


def start(code, *arguments):
    """A Python process that can import the package and the tests' own modules."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, *map(str, arguments), str(here.parent), str(here)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes(tmp_path, seed):
    """Two processes share the device, and this one holds a context beside them."""
    files = [tmp_path / f"{n}.pt" for n in range(2)]
    running = [start(WORK, seed + n, file) for n, file in enumerate(files)]
    for process in running:
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text
    for n, file in enumerate(files):
        for form, found in torch.load(file).items():
            op, args, kwargs = samples.sample(form, "cuda", rows=500, seed=seed + n)
            alone = samples.as_tuple(op(*args, **kwargs))
            assert_same(f"{form} in process {n}", found, [x.cpu() for x in alone])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
class TestSecondDevice:
    """Tensors on cuda:1 while cuda:0 is current. The plain forms: test_cuda_runtime.py."""

    @pytest.mark.parametrize("arch", attention.FAMILIES)
    def test_by_every_family(self, arch, seed):
        q, k, v = small("cuda:1", rows=(600, 600), head_dim=128, seed=seed)
        bits = make_bits("random_50", rows_q=600, rows_kv=600, seed=seed, device="cuda:1")
        run_and_check(q, k, v, bits, arch=arch)
        assert torch.cuda.current_device() == 0

    @FORMS
    def test_in_a_thread_and_on_a_stream(self, form, seed):
        """A thread's current device is cuda:0 until it says otherwise."""
        op, args, kwargs = samples.sample(form, "cuda:1", rows=500, seed=seed)
        expected = samples.as_tuple(op(*args, **kwargs))
        stream = torch.cuda.Stream("cuda:1")
        stream.wait_stream(torch.cuda.current_stream("cuda:1"))

        def work():
            assert torch.cuda.current_device() == 0
            plain = samples.as_tuple(op(*args, **kwargs))
            with torch.cuda.stream(stream):
                side = samples.as_tuple(op(*args, **kwargs))
            torch.cuda.synchronize("cuda:1")
            return plain, side

        with ThreadPoolExecutor(1) as pool:
            for results in pool.submit(work).result():
                assert_same(form, results, expected)

    def test_both_at_once(self, seed):
        """Calls in turns on both devices, no waiting in between."""
        per_device = [
            samples.sample("block_sparse_attn", f"cuda:{n}", rows=500, seed=seed) for n in (0, 1)
        ]
        results = []
        for _ in range(TURNS):
            results += [op(*args, **kwargs) for op, args, kwargs in per_device]
        for result in results:
            assert_same("in turns", [x.cpu() for x in result], [x.cpu() for x in results[0]])

    def test_prefill_with_a_gate(self, seed):
        """The whole chain, RoPE tables and selection included."""
        rule = seer_cuda.Rule("topk", 2, local=1)
        outs = []
        for device in ("cuda:0", "cuda:1"):
            gate = gates.make_gate(device, torch.bfloat16)
            q, k, q_rope, k_rope, v = gates.layer_inputs(500, device, torch.bfloat16, seed=seed)
            outs.append(seer_cuda.sparse_prefill(q_rope, k_rope, v, q, k, gate, rule))
            assert outs[-1].device == torch.device(device)
        assert torch.cuda.current_device() == 0
        numerics.assert_bitwise("out", outs[1].cpu(), outs[0].cpu())


MASKS = ("random_50", "nothing", "full", "single", "empty_rows", "last_column", "random_10")


@pytest.mark.parametrize("arch", attention.FAMILIES)
def test_a_mask_that_changes_between_replays(arch, seed):
    """From nothing to everything and back: the graph holds no trace of an earlier mask."""
    rows = 700
    q, k, v = small("cuda", rows=(rows, rows), head_dim=128, seed=seed)
    shape = {"rows_q": rows, "rows_kv": rows, "heads": 4, "seed": seed, "device": "cuda"}
    bits = make_bits("random_10", **shape)
    graph, results = gates.capture(lambda: sparse_op(q, k, v, bits, arch=arch))
    for pattern in MASKS:
        bits.copy_(make_bits(pattern, **shape))
        for x in results:
            x.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(pattern, results, sparse_op(q, k, v, bits, arch=arch))
        attention.check_attention(pattern, *results, q, k, v, bits)
