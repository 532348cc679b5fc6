# SPDX-License-Identifier: Apache-2.0
"""CUDA only: which kernel family of block_sparse_attn serves a call, and what a launch may rely on
in graphs, on several streams, with many tiny or very long sequences. By every family."""

import attention
import inputs
import numerics
import patterns
import pytest
import torch
from attention import FAMILIES, make_bits, run_and_check, small, sparse_op

from seer_cuda import reference

pytestmark = pytest.mark.gpu
BY_FAMILY = pytest.mark.parametrize("arch", FAMILIES)


def masked(seed, *, rows=(600, 600), heads=(4, 2), block=(64, 64), pattern="random_50", **kw):
    """(positional arguments, keyword arguments) of one masked call."""
    q, k, v = small("cuda", rows=rows, heads=heads, batch=1, seed=seed, **kw)
    bits = make_bits(
        pattern,
        rows_q=rows[0],
        rows_kv=rows[1],
        block_q=block[0],
        block_kv=block[1],
        heads=heads[0],
        seed=seed,
        device="cuda",
    )
    return (q, k, v, bits), {"block_q": block[0], "block_kv": block[1]}


def packed(seed, lengths=(100, 0, 64, 300)):
    """The same for packed sequences."""
    case = inputs.varlen(
        "normal",
        list(lengths),
        list(lengths),
        device="cuda",
        heads_q=4,
        heads_kv=2,
        head_dim=128,
        dtype=torch.bfloat16,
        seed=seed,
    )
    return (case.pop("q"), case.pop("k"), case.pop("v")), case


def assert_same(name, results, expected):
    for kind, a, b in zip(("out", "lse"), results, expected, strict=True):
        numerics.assert_bitwise(f"{name} {kind}", a, b)


# ---------------------------------------------------------------------------- choice of family


@pytest.mark.parametrize("block", attention.BLOCKS["cuda"])
@pytest.mark.parametrize("head_dim", attention.HEAD_DIMS["cuda"])
@pytest.mark.parametrize("dtype", attention.DTYPES["cuda"])
def test_the_newest_family_is_the_default(dtype, head_dim, block, seed):
    args, kw = masked(seed, block=block, dtype=dtype, head_dim=head_dim)
    case = {"dtype": dtype, "head_dim": head_dim, "block": block}
    newest = max(arch for arch in FAMILIES if attention.has_kernel("cuda", case, arch))
    assert_same("default", sparse_op(*args, **kw), sparse_op(*args, arch=newest, **kw))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("axis", ["batch", "row", "head"])
def test_expanded_inputs_are_served_by_the_portable_kernels(name, axis, seed):
    """TMA has no stride of 0: such a call is answered all the same, and family 90 refuses it."""
    tensors = dict(zip("qkv", small("cuda", rows=(200, 200), head_dim=128, seed=seed), strict=True))
    dim = ("batch", "row", "head").index(axis)
    whole = tensors[name]
    tensors[name] = whole.narrow(dim, 0, 1).expand_as(whole)
    args = tuple(tensors.values())
    assert_same("expanded", run_and_check(*args), sparse_op(*args, arch=80))
    with pytest.raises(RuntimeError, match="arch: expected a compiled kernel of family 90, got"):
        sparse_op(*args, arch=90)


def test_unknown_family_is_refused(seed):
    args, kw = masked(seed)
    with pytest.raises(RuntimeError, match=r"seer::block_sparse_attn: arch: expected .+, got .+"):
        sparse_op(*args, arch=70, **kw)


# ----------------------------------------------------------------------------------- launches


@BY_FAMILY
def test_graph_of_many_launches(arch, seed):
    """Seven calls in one graph, replayed after their inputs changed in place."""

    def calls(seed):
        blocks = ((64, 64), (128, 64), (64, 128), (128, 128))
        yield from (masked(seed + n, block=block) for n, block in enumerate(blocks))
        yield masked(seed + 4, rows=(70, 2000), pattern="random_10")
        yield masked(seed + 5, pattern="nothing")
        yield packed(seed + 6)

    captured = list(calls(seed))
    for args, kw in captured:
        sparse_op(*args, arch=arch, **kw)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [sparse_op(*args, arch=arch, **kw) for args, kw in captured]
    for repeat in range(1, 4):
        fresh = list(calls(seed + 10 * repeat))
        for (args, _), (new, _) in zip(captured, fresh, strict=True):
            for to, x in zip(args, new, strict=True):
                to.copy_(x)
        for _ in range(5):
            graph.replay()
        for n, (result, (args, kw)) in enumerate(zip(results, fresh, strict=True)):
            assert_same(f"call {n}", result, sparse_op(*args, arch=arch, **kw))


@BY_FAMILY
def test_two_streams(arch, seed):
    """Launches of unequal size that run side by side give the bits that they give alone."""
    problems = [
        masked(seed),
        masked(seed + 1, rows=(64, 4000), heads=(7, 1), block=(64, 128)),
        packed(seed + 2),
        masked(seed + 3, rows=(2000, 2000), heads=(8, 2), head_dim=128, pattern="random_10"),
        masked(seed + 4, block=(128, 128), dtype=torch.float16),
    ]
    alone = [sparse_op(*args, arch=arch, **kw) for args, kw in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for stream in streams:  # both queues fill up before the first kernel starts
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
    for launch in range(200):
        n = launch * 3 % len(problems)
        args, kw = problems[n]
        with torch.cuda.stream(streams[launch % 2]):
            results.append((n, sparse_op(*args, arch=arch, **kw)))
    torch.cuda.synchronize()
    for n, result in results:
        assert_same(f"problem {n}", result, alone[n])


@BY_FAMILY
def test_many_launches_in_a_row(arch, seed):
    """Nothing is left over from one launch to the next, whatever its memory held before."""
    args, kw = masked(seed, head_dim=128)
    out, lse = sparse_op(*args, arch=arch, **kw)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1500):
        again, again_lse = sparse_op(*args, arch=arch, **kw)
        wrong += (again != out).sum() + (again_lse != lse).sum()
        del again, again_lse
        torch.full((lse.numel() + 4,), -1, dtype=torch.int32, device="cuda")  # freed at once
    assert int(wrong) == 0


@BY_FAMILY
@pytest.mark.parametrize("form", ["masked", "dense", "packed"])
def test_no_memory_beyond_the_outputs(arch, form, seed):
    """A call asks the allocator for out, lse and a small constant."""
    args, kw = packed(seed) if form == "packed" else masked(seed, rows=(4096, 4096))
    args = args[:3] if form == "dense" else args
    sparse_op(*args, arch=arch, **kw)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out, lse = sparse_op(*args, arch=arch, **kw)
    used = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    size = sum(x.numel() * x.element_size() for x in (out, lse))
    assert size <= used <= size + 512, f"{used} bytes for outputs of {size}"


# ---------------------------------------------------------------------- tiny and long sequences


@BY_FAMILY
@pytest.mark.parametrize("block", [(64, 64), (128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["mixed", "all_empty", "one_of_64", "no_keys"])
def test_64_tiny_sequences(arch, kind, causal, block, seed):
    """Far more tiles than rows, most of them with nothing to do."""
    draw = torch.randint(0, 201, (2, 64), generator=inputs.generator(seed))
    draw[:, ::5] = 0
    if kind == "all_empty":
        draw[:] = 0
    if kind == "one_of_64":
        draw[:, torch.arange(64) != 37] = 0
        draw[:, 37] = 190
    if kind == "no_keys":
        draw[1] = 0
    case = inputs.varlen(
        "normal",
        *draw.tolist(),
        slack=inputs.SLACK["cuda"],
        device="cuda",
        heads_q=8,
        heads_kv=2,
        dtype=torch.bfloat16,
        seed=seed,
    )
    case |= {"max_rows_q": 200, "max_rows_kv": 200}
    shape = {"rows_q": 200, "rows_kv": 200, "block_q": block[0], "block_kv": block[1]}
    bits = make_bits("random_50", **shape, batch=64, heads=2, seed=seed, device="cuda")
    kw = {"block_q": block[0], "block_kv": block[1], "causal": causal}
    run_and_check(**case, block_bits=bits, arch=arch, **kw)


@BY_FAMILY
@pytest.mark.parametrize("rows_kv", [300_000, 1_000_000])
@pytest.mark.parametrize("block", [(64, 64), (128, 128)])
@pytest.mark.parametrize("causal", [True, False])
def test_long_kv(arch, rows_kv, block, causal, seed):
    """A few queries over up to a million keys; one KV block in 64, and the last ones."""
    rows_q, gen = 150, torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        torch.randn(1, rows, heads, 128, generator=gen, device="cuda", dtype=torch.bfloat16)
        for rows, heads in ((rows_q, 4), (rows_kv, 2), (rows_kv, 2))
    )
    blocks_q, blocks_kv = (
        attention.ceil_div(rows_q, block[0]),
        attention.ceil_div(rows_kv, block[1]),
    )
    kept = torch.rand(1, 4, blocks_q, blocks_kv, generator=inputs.generator(seed)) < 1 / 64
    kept[..., -2:] = True
    bits = patterns.with_stray_bits(reference.pack_block_bits(kept), blocks_kv).cuda()
    kw = {"block_q": block[0], "block_kv": block[1], "causal": causal}
    out, lse = attention.run_repeatedly(q, k, v, bits, arch=arch, **kw)
    attention.check_blocks("long", out, lse, q, k, v, bits, count=6, seed=seed, **kw)


@BY_FAMILY
def test_dense_over_many_keys(arch, seed):
    gen = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        torch.randn(1, rows, heads, 64, generator=gen, device="cuda", dtype=torch.float16)
        for rows, heads in ((70, 3), (300_000, 1), (300_000, 1))
    )
    out, lse = attention.run_repeatedly(q, k, v, arch=arch)
    attention.check_blocks("dense", out, lse, q, k, v, count=4, seed=seed)
