# SPDX-License-Identifier: Apache-2.0
"""CUDA only: streams, graphs, synchronisation, devices, determinism, large tensors."""

import contextlib
import math
from threading import Thread

import attention
import baselines
import inputs
import numerics
import patterns
import pytest
import samples
import torch
from attention import make_bits, run_and_check, small, sparse_op

from seer_cuda import BlockMask, reference, select

pytestmark = pytest.mark.gpu
FORMS = pytest.mark.parametrize("form", samples.FORMS)


@FORMS
def test_runs_on_the_current_stream(form, seed):
    """Inputs that a side stream writes late, and results it reads at once: order must hold.

    A launch on any other stream would see zeros, because the copy waits behind a long sleep.
    """
    op, args, kwargs = samples.sample(form, "cuda", seed=seed)
    expected = samples.as_tuple(op(*args, **kwargs))
    late = [torch.zeros_like(x) if isinstance(x, torch.Tensor) else x for x in args]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        for to, x in zip(late, args, strict=True):
            if isinstance(x, torch.Tensor):
                to.copy_(x)
        results = [x.clone() for x in samples.as_tuple(op(*late, **kwargs))]
    torch.cuda.synchronize()
    for a, b in zip(results, expected, strict=True):
        numerics.assert_bitwise(form, a, b)


@contextlib.contextmanager
def no_synchronisation():
    """Any call that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@FORMS
def test_no_host_synchronisation(form, seed):
    op, args, kwargs = samples.sample(form, "cuda", seed=seed)
    op(*args, **kwargs)
    with no_synchronisation():
        op(*args, **kwargs)


@FORMS
def test_the_host_does_not_wait(form, seed):
    """The call returns while the device is still busy with work queued before."""
    op, args, kwargs = samples.sample(form, "cuda", seed=seed)
    op(*args, **kwargs)
    torch.cuda.synchronize()
    torch.cuda._sleep(600_000_000)
    busy = torch.cuda.Event()
    busy.record()
    op(*args, **kwargs)
    assert not busy.query(), "the device was idle when the call returned"
    torch.cuda.synchronize()


def test_block_mask_conversions_do_not_synchronise(seed):
    dense = patterns.pattern("random_50", 2, 4, 20, 30, seed).cuda()
    mask = BlockMask.from_dense(dense, 64, 64, 1230, 1900)
    with no_synchronisation():
        mask.to_dense()
        indices, counts = mask.to_indices()
        BlockMask.from_indices(indices, counts, 64, 64, 1230, 1900)
        BlockMask.from_flex(mask.to_flex())
        mask.density()
        mask.causal_visible()
        select.sink_local(1230, 1900, device="cuda")


@FORMS
def test_graph_replay_with_new_contents(form, seed):
    """Captured once; replayed after inputs and masks changed in place, it gives the new answer."""
    op, args, kwargs = samples.sample(form, "cuda", seed=seed)
    op(*args, **kwargs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = samples.as_tuple(op(*args, **kwargs))
    for repeat in (1, 2):
        _, new_args, new_kwargs = samples.sample(form, "cuda", seed=seed + repeat)
        leaves = torch.utils._pytree.tree_leaves
        for to, x in zip(leaves((args, kwargs)), leaves((new_args, new_kwargs)), strict=True):
            if isinstance(x, torch.Tensor):
                to.copy_(x)
        for x in results:
            x.fill_(math.nan if x.is_floating_point() else 1)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(results, samples.as_tuple(op(*new_args, **new_kwargs)), strict=True):
            numerics.assert_bitwise(form, a, b)


def test_graph_of_gate_select_and_attention(seed):
    """The whole chain in one graph: the mask is made and consumed on the device."""
    q, k, v = small("cuda", rows=(1000, 1000), batch=1, seed=seed)

    def chain():
        q_gate = torch.ops.seer.pool_gate(q)
        k_gate = torch.ops.seer.pool_gate(k)
        bits = torch.ops.seer.gate_select(q_gate, k_gate, method=1, value=4.0, local=1)
        return sparse_op(q, k, v, bits)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = chain()
    for x, new in zip(
        (q, k, v), small("cuda", rows=(1000, 1000), batch=1, seed=seed + 1), strict=True
    ):
        x.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    numerics.assert_bitwise("out", out, chain()[0])


@FORMS
def test_deterministic(form, seed):
    """20 runs, the same bits."""
    op, args, kwargs = samples.sample(form, "cuda", rows=500, seed=seed)
    first = samples.as_tuple(op(*args, **kwargs))
    for _ in range(19):
        for a, b in zip(first, samples.as_tuple(op(*args, **kwargs)), strict=True):
            numerics.assert_bitwise(form, b, a)


@pytest.mark.parametrize("pattern", ["random_10", "sink_local", "full", "empty_rows"])
def test_deterministic_when_the_device_is_full(pattern, seed):
    """Many tiles of unequal length: the order in which they finish must not matter."""
    q, k, v = inputs.qkv(
        "normal",
        rows_q=4096,
        rows_kv=4096,
        heads_q=16,
        heads_kv=4,
        head_dim=128,
        dtype=torch.bfloat16,
        device="cuda",
        seed=seed,
    )
    bits = make_bits(pattern, rows_q=4096, rows_kv=4096, heads=16, seed=seed, device="cuda")
    first = sparse_op(q, k, v, bits)
    for _ in range(19):
        for name, a, b in zip(("out", "lse"), sparse_op(q, k, v, bits), first, strict=True):
            numerics.assert_bitwise(name, a, b)


def test_a_sequence_does_not_depend_on_its_batch(seed):
    q, k, v = small("cuda", rows=(700, 700), heads=(8, 2), batch=3, head_dim=128, seed=seed)
    bits = make_bits(
        "random_50", rows_q=700, rows_kv=700, batch=3, heads=8, seed=seed, device="cuda"
    )
    out, lse = sparse_op(q, k, v, bits)
    alone = sparse_op(q[1:2], k[1:2], v[1:2], bits[1:2])
    numerics.assert_bitwise("out", alone[0], out[1:2])
    numerics.assert_bitwise("lse", alone[1], lse[1:2])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_host_thread_without_a_context(head_dim, seed):
    """The first CUDA call of a thread may be ours: its memory comes from torch's cache."""
    q, k, v = small("cuda", rows=(600, 600), head_dim=head_dim, seed=seed)
    expected = [x.clone() for x in sparse_op(q, k, v)]  # leaves blocks of the sizes it needs behind
    results = []
    thread = Thread(target=lambda: results.append(sparse_op(q, k, v)))
    thread.start()
    thread.join()
    assert results, "the call raised in its thread"
    assert all(torch.equal(x, y) for x, y in zip(results[0], expected, strict=True))


def test_two_threads_on_two_streams(seed):
    """Concurrent calls from several host threads give each its own right answer."""
    from concurrent.futures import ThreadPoolExecutor

    problems = []
    for n in range(4):
        q, k, v = small("cuda", rows=(600, 600), seed=seed + n)
        bits = make_bits("random_50", rows_q=600, rows_kv=600, heads=4, seed=n, device="cuda")
        problems.append((q, k, v, bits))
    expected = [sparse_op(*p)[0] for p in problems]
    torch.cuda.synchronize()

    def work(n):
        with torch.cuda.stream(torch.cuda.Stream()):
            outs = [sparse_op(*problems[n])[0] for _ in range(20)]
            torch.cuda.current_stream().synchronize()
            return outs

    with ThreadPoolExecutor(4) as pool:
        for n, outs in enumerate(pool.map(work, range(4))):
            for out in outs:
                numerics.assert_bitwise(f"thread {n}", out, expected[n])


@FORMS
def test_the_second_device(form, seed):
    """Tensors on cuda:1 while cuda:0 is current: runs there, and leaves the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    op, args, kwargs = samples.sample(form, "cuda:1", seed=seed)
    assert torch.cuda.current_device() == 0
    there = samples.as_tuple(op(*args, **kwargs))
    assert torch.cuda.current_device() == 0
    op, args, kwargs = samples.sample(form, "cuda:0", seed=seed)
    for a, b in zip(there, samples.as_tuple(op(*args, **kwargs)), strict=True):
        assert a.device == torch.device("cuda:1")
        numerics.assert_bitwise(form, a.cpu(), b.cpu())


def test_tensors_of_two_devices_are_refused():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    q, k, v = small("cuda:0")
    with pytest.raises(RuntimeError, match=r"seer::block_sparse_attn: k: expected .+, got .+"):
        sparse_op(q, k.to("cuda:1"), v)


BAD_CU = {
    "beyond the end": [0, 60, 4000],
    "descending": [0, 120, 60],
    "negative": [-500, 60, 150],
    "extreme": [-(2**31), 2**31 - 1, 150],
    "longer than max_rows": [0, 10, 150],
}


@pytest.mark.parametrize("name", BAD_CU)
@pytest.mark.parametrize("which", ["q", "kv"])
@pytest.mark.parametrize(
    "op", [pytest.param("block_sparse_attn", marks=pytest.mark.reduced), "attn_pool"]
)
def test_bad_cu_seqlens_are_clamped(name, which, op, seed):
    """Contents that make no sense are clamped on the device: no fault, no NaN, defined rows."""
    case = inputs.varlen(
        "normal",
        [60, 90],
        [60, 90],
        device="cuda",
        heads_q=4,
        heads_kv=2,
        dtype=torch.bfloat16,
        seed=seed,
    )
    case[f"cu_seqlens_{which}"] = torch.tensor(BAD_CU[name], dtype=torch.int32, device="cuda")
    out, lse, *pooled = getattr(torch.ops.seer, op)(**case)
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in (out, *pooled)) and not lse.isnan().any()
    attention.check_attention("clamped", out, lse, **case)


@pytest.mark.reduced
def test_hostile_bits_never_fault(seed):
    """Every bit pattern is a valid mask, in any number of words."""
    q, k, v = small("cuda", rows=(130, 200), seed=seed)
    for words in (1, 3):
        noise = torch.randint(
            -(2**31),
            2**31 - 1,
            (2, 4, 3, words),
            dtype=torch.int32,
            generator=inputs.generator(seed),
        ).cuda()
        run_and_check(q, k, v, noise)


@pytest.mark.slow
@pytest.mark.parametrize("block", [64, 128])
def test_more_than_2_31_output_elements(block, seed):
    """524352 query rows of 32 x 128 channels: offsets of q and out pass 2^31."""
    rows = 2**19 + 64
    q = torch.zeros(1, rows, 32, 128, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(1, 128, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    tail = torch.randn(1, 200, 32, 128, dtype=torch.bfloat16, device="cuda")
    q[:, -200:] = tail
    out, lse = sparse_op(q, k, v, causal=False, block_q=block, block_kv=block)
    check_tail(out[:, -200:], lse[:, :, -200:], tail, k, v)
    mean = v.float().mean(1).repeat_interleave(4, 1)
    torch.testing.assert_close(out[:, 5].float(), mean, atol=1e-2, rtol=1e-2)


@pytest.mark.slow
def test_strides_beyond_2_31(seed):
    """k and v whose last rows lie more than 2^31 elements behind the first."""
    rows = 256
    stride = 2**23 + 2**16
    room = torch.zeros(rows * stride, dtype=torch.bfloat16, device="cuda")
    k = room.as_strided((1, rows, 1, 128), (0, stride, 128, 1), 0)
    v = room.as_strided((1, rows, 1, 128), (0, stride, 128, 1), 4096)
    k.copy_(torch.randn(k.shape))
    v.copy_(torch.randn(v.shape))
    q = torch.randn(1, 200, 2, 128, dtype=torch.bfloat16, device="cuda")
    out, lse = sparse_op(q, k, v, causal=False)
    check_tail(out, lse, q, k.contiguous(), v.contiguous())


@pytest.mark.slow
def test_batch_stride_beyond_2_31(seed):
    """A batch entry that starts more than 2^31 elements behind the first."""
    stride = 2**31 + 2**20
    room = torch.zeros(stride + 2**20, dtype=torch.bfloat16, device="cuda")
    q, k, v = (
        room.as_strided((2, 150, 2, 128), (stride, 256, 128, 1), n * 2**16) for n in range(3)
    )
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape))
    out, lse = sparse_op(q, k, v)
    attention.check_attention("batch stride", out, lse, *(x.contiguous() for x in (q, k, v)))


def check_tail(out, lse, q, k, v):
    ref_out, ref_lse = reference.block_sparse_attn(q, k, v, causal=False)
    base = baselines.attention(q, k, v, causal=False)
    attention.judge_out("tail out", out, ref_out, base)
    attention.judge_lse("tail lse", lse, ref_lse, base)
