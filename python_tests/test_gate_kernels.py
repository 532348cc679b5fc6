# SPDX-License-Identifier: Apache-2.0
"""pool_gate, gate_scores and gate_select: long rows, infinities, one launch for q and k, results
that do not depend on the launch, and what runs without a compiled kernel."""

import math

import baselines
import inputs
import numerics
import pytest
import selection
import torch
from test_gate_ops import RULES, exact_gates, gates, rope, run_and_check_pool

from seer_cuda import _library, info, reference

OPS = ("pool_gate", "gate_scores", "gate_select")


@pytest.mark.parametrize("rule", ["topk_7", "topk_all", "density_10", "topp_30", "threshold"])
@pytest.mark.parametrize("shape", [(40, 3500), (18, 7000), (9, 16384)], ids=str)
def test_long_rows(device, rule, shape, seed):
    """Up to 1 M tokens in blocks of 64. Scores are small integers, so ties abound and nothing is
    rounded: the oracle's bits exactly. The ranks of so long rows are found a few rows at a time."""
    values = torch.randint(0, 4, shape, generator=inputs.generator(seed)).float()
    q, k = exact_gates(device, values)
    value = RULES[rule]["value"] if rule != "threshold" else 1.5 / shape[1]
    kw = {"scale": 1.0, "method": RULES[rule]["method"], "value": value, "sink": 1, "local": 2}
    bits = torch.ops.seer.gate_select(q, k, **kw)
    numerics.assert_bitwise(rule, bits, reference.gate_select(q, k, **kw))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "blocks", [(64, 64), (65, 65), (127, 300), (300, 127), pytest.param((1, 33), id="decode")]
)
@pytest.mark.parametrize("rule", ["threshold", "topk_7", "topp_90"])
def test_ragged_tiles(device, rule, blocks, causal, seed):
    q, k = gates(device, torch.float16, blocks=blocks, heads=(3, 3), gate_dim=128, seed=seed)
    kw = {"causal": causal, **RULES[rule]}
    bits = torch.ops.seer.gate_select(q, k, **kw)
    scores = reference.gate_scores(q, k, causal=causal)
    selection.check("gate_select", bits, scores, baselines.gate_score_error(q, k), **kw)


@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_scores(device, sign):
    """Two blocks of +inf share the mass; a row of nothing but -inf shares it among all."""
    q = torch.ones(1, 1, 1, 64, dtype=torch.float16, device=device)
    k = torch.zeros(1, 50, 1, 64, dtype=torch.float16, device=device)
    infinite = (3, 40) if sign > 0 else tuple(range(50))
    k[:, list(infinite), :, 5] = sign * math.inf
    count = len(infinite)

    def kept(**rule):
        bits = torch.ops.seer.gate_select(q, k, causal=False, **rule)
        return tuple(reference.unpack_block_bits(bits, 50)[0, 0, 0].nonzero()[:, 0].tolist())

    assert kept(method=0, value=0.99 / count) == infinite
    assert kept(method=0, value=1.01 / count) == ()
    assert kept(method=1, value=1) == infinite[:1]
    assert kept(method=3, value=0.9 / count) == infinite[:1]
    assert kept(method=3, value=1.5 / count) == infinite[:2]


@pytest.mark.parametrize("rule", [*RULES, "scores"])
def test_a_head_does_not_depend_on_the_others(device, rule, seed):
    """Another batch, another number of heads, another tile: the same bits."""
    heads = 280 if device == "cuda" else 12  # CUDA: enough for the larger tiles
    q, k = gates(
        device, torch.bfloat16, batch=2, blocks=(100, 130), heads=(heads, heads), seed=seed
    )

    def run(q, k):
        if rule == "scores":
            return torch.ops.seer.gate_scores(q, k)
        return torch.ops.seer.gate_select(q, k, **RULES[rule])

    together = run(q, k)
    for batch, head in ((0, 0), (1, heads // 2), (1, heads - 1)):
        alone = run(
            q[batch : batch + 1, :, head : head + 1], k[batch : batch + 1, :, head : head + 1]
        )
        numerics.assert_bitwise(rule, alone[0, 0], together[batch, head])


@pytest.mark.parametrize("heads", [2, 60])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_row_does_not_depend_on_the_length(device, dtype, heads, seed):
    """Up to 512 KV blocks another kernel selects by a threshold than from there on, and there the
    number of heads decides. Thresholds are probabilities of blocks, so that the last bit of a
    row's sum decides about theirs."""
    blocks, gate_dim = 600, 64 if dtype == torch.float16 else 128
    heads = heads if device == "cuda" else 2
    q, k = gates(
        device, dtype, blocks=(blocks, blocks), heads=(heads, heads), gate_dim=gate_dim, seed=seed
    )
    prob = reference.gate_scores(q, k)[0, 0].softmax(-1)
    count = 24 if device == "cuda" else 3
    for row in torch.randint(200, 512, (count,), generator=inputs.generator(seed)).tolist():
        kw = {"method": 0, "value": float(prob[row, row // 2])}
        bits = torch.ops.seer.gate_select(q, k, **kw)
        for n in (512, 509, 300, 64, 33):
            words = -(-n // 32)
            short = torch.ops.seer.gate_select(q[:, :n], k[:, :n], **kw)
            numerics.assert_bitwise(f"{n} blocks", short, bits[:, :, :n, :words])
            # The sequence of n blocks inside tensors of 600.
            length = inputs.packed([n * 64]).to(device)
            packed = torch.ops.seer.gate_select(q, k, length, length, **kw)
            numerics.assert_bitwise(f"{n} blocks, packed", packed[:, :, :n, :words], short)
            assert not packed[:, :, n:].any() and not packed[..., words:].any()


@pytest.mark.parametrize("weights", ["k", "both", "none"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (64, 48)], ids=["d64", "d128", "torch"])
def test_q_and_k_in_one_launch(device, weights, dims, seed):
    """The pair gives what two calls give, chunked prefill (fewer queries than keys) included."""
    head_dim, gate_dim = dims
    q, k, _ = inputs.qkv(
        "normal",
        rows_q=200,
        rows_kv=900,
        batch=2,
        heads_q=8,
        heads_kv=2,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        device=device,
        seed=seed,
    )
    gen = inputs.generator(seed)

    def weight(channels):
        return torch.randn(8, channels, gate_dim, generator=gen).to(device, torch.bfloat16) / 16

    weight_q = weight(head_dim) if weights == "both" else None
    weight_k = None if weights == "none" else weight(3 * head_dim)
    rope_q = rope(-(-200 // 64), head_dim // 4, device=device)
    rope_k = rope(-(-900 // 128), head_dim // 4, batch=2, block=128, device=device)
    pair = torch.ops.seer._pool_gate_pair(q, k, weight_q, weight_k, *rope_q, *rope_k, 64, 128, 4, 7)
    alone_q = torch.ops.seer.pool_gate(q, weight_q, *rope_q, block=64, pools=4)
    alone_k = torch.ops.seer.pool_gate(k, weight_k, *rope_k, block=128, pools=7)
    numerics.assert_bitwise("q", pair[0], alone_q)
    numerics.assert_bitwise("k", pair[1], alone_k)


def test_a_sequence_does_not_depend_on_the_others(device, seed):
    """Larger tiles, q and k in turns: the same bits."""
    batch = 140 if device == "cuda" else 3  # CUDA: enough for the largest tiles and for turns
    q, k, _ = inputs.qkv(
        "normal",
        rows_q=640,
        rows_kv=630,
        batch=batch,
        heads_q=4,
        heads_kv=2,
        head_dim=64,
        dtype=torch.bfloat16,
        device=device,
        seed=seed,
    )
    weight = torch.randn(4, 192, 64, generator=inputs.generator(seed)) / 14
    weight = weight.to(device, torch.bfloat16)
    no_rope = (None, None, None, None)
    pair = torch.ops.seer._pool_gate_pair(q, k, None, weight, *no_rope, 16, 16, 4, 7)
    for one in (0, batch // 2, batch - 1):
        here = slice(one, one + 1)
        alone_q = torch.ops.seer.pool_gate(q[here], block=16, pools=4)
        alone_k = torch.ops.seer.pool_gate(k[here], weight, block=16, pools=7)
        numerics.assert_bitwise("q", pair[0][here], alone_q)
        numerics.assert_bitwise("k", pair[1][here], alone_k)


def test_a_block_does_not_depend_on_its_neighbours(device, seed):
    """NaN in one block of one head reaches that block of that head alone."""
    x = inputs.qkv(
        "normal", rows_q=1, rows_kv=700, heads_kv=3, dtype=torch.bfloat16, device=device, seed=seed
    )[1]
    gen = inputs.generator(seed)
    weight = (torch.randn(6, 192, 64, generator=gen) / 14).to(device, torch.bfloat16)
    clean = torch.ops.seer.pool_gate(x, weight, pools=7)
    x = x.clone()
    x[0, 130, 1, 7] = math.nan
    hurt = torch.ops.seer.pool_gate(x, weight, pools=7)
    assert hurt[0, 2, 2:4].isnan().all()
    hurt[0, 2, 2:4] = clean[0, 2, 2:4]
    numerics.assert_bitwise("other blocks", hurt, clean)


UNSERVED = {
    "float32": (torch.float32, 64, 64, 0),
    "head_dim": (torch.bfloat16, 72, 64, 0),
    "gate_dim": (torch.bfloat16, 64, 80, 0),
    "unaligned": (torch.float16, 64, 64, 1),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_what_no_kernel_serves(device, case, seed):
    dtype, head_dim, gate_dim, offset = UNSERVED[case]
    gen = inputs.generator(seed)

    def draw(*shape):
        count = math.prod(shape)
        room = torch.randn(count + offset, generator=gen).to(device, dtype)
        return room[offset:].view(shape)

    x = draw(2, 150, 2, head_dim)
    run_and_check_pool(x, draw(4, 2 * head_dim, gate_dim) / 8, *rope(3, 8, device=device), pools=3)
    q, k = draw(2, 40, 4, gate_dim), draw(2, 40, 2, gate_dim)
    scores, error = reference.gate_scores(q, k), baselines.gate_score_error(q, k)
    numerics.compare("gate_scores", torch.ops.seer.gate_scores(q, k), scores, extra=error)
    for rule in RULES.values():
        bits = torch.ops.seer.gate_select(q, k, **rule)
        selection.check("gate_select", bits, scores, error, **rule)


@pytest.mark.gpu
def test_kernels_of_ours_run(seed):
    """The grid above goes through compiled kernels, and only what none serves through torch's."""
    q, k = gates("cuda", torch.bfloat16, seed=seed)
    x = q.contiguous()
    calls = {
        "pool_gate": lambda q: torch.ops.seer.pool_gate(x.to(q.dtype)),
        "gate_scores": lambda q: torch.ops.seer.gate_scores(q, k.to(q.dtype)),
        "gate_select": lambda q: torch.ops.seer.gate_select(q, k.to(q.dtype)),
    }
    for name, call in calls.items():
        for dtype in (torch.bfloat16, torch.float32):
            with torch.profiler.profile() as profile:
                call(q.to(dtype))
            ran = {event.name for event in profile.events()}
            assert f"seer::{name}" in ran
            assert (f"seer::_{name}_torch" in ran) == (dtype == torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_the_table_answers(op):
    core = _library.load_core()
    if core is None or not core.build_info()["cuda"]:
        pytest.skip("no compiled kernels in this build")
    assert op in info.OPS
    for row in (row for row in core.variants() if row["op"] == op):
        assert core.explain(op, 90, row["dtype"], row["head_dim"], 64, 64) == ""
        assert max(row["registers"].values()) <= 255
    refused = core.explain(op, 90, "float32", 64, 64, 64)
    assert "expected" in refused and "got float32" in refused
    assert "got bfloat16" in core.explain(op, 90, "bfloat16", 96, 64, 64)
    assert "sm_75" in core.explain(op, 75, "bfloat16", 128, 64, 64)
