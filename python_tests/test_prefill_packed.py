# SPDX-License-Identifier: Apache-2.0
"""AttnGate.embed, gate_mask and sparse_prefill of packed sequences: every sequence as if alone."""

from itertools import accumulate, pairwise

import inputs
import numerics
import pytest
import torch
from gates import capture, make_gate
from test_prefill import FORM, RULES

from seer_cuda import GateKeyCache, Rule, block_sparse_attn, gate_mask, sparse_prefill

LENGTHS = [300, 0, 64, 1, 190]
MOST = 300


def spans(lengths):
    return [slice(a, b) for a, b in pairwise([0, *accumulate(lengths)])]


def packed_layer(lengths, device="cpu", dtype=torch.float32, *, width=64, seed=0):
    """q, k before RoPE and q_rope, k_rope, v of packed sequences, and their cu_seqlens."""
    gen = inputs.generator(seed)
    shapes = [(sum(lengths), heads, width) for heads in (4, 2, 4, 2, 2)]
    draws = [torch.randn(*shape, generator=gen).to(device, dtype) for shape in shapes]
    return draws, inputs.packed(lengths).to(device)


def both(cu, most=MOST):
    return {"cu_seqlens_q": cu, "cu_seqlens_kv": cu, "max_rows_q": most, "max_rows_kv": most}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.method)
@pytest.mark.parametrize("name", ["Qavg_Kmaxminavg", "Qmaxavg_Kmin"])
@pytest.mark.parametrize("config", [{}, {"qk_norm": True}, {"rotary_dim": 0}], ids=str)
def test_every_sequence_as_if_alone(device, rule, name, config, seed):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    gate = make_gate(device, dtype, seed=seed, name=name, **config)
    (q, k, q_rope, k_rope, v), cu = packed_layer(LENGTHS, device, dtype, seed=seed)
    mask = gate_mask(q, k, gate, rule, **both(cu, MOST + 40))
    assert mask.shape == (5, 4, 6, 6) and (mask.rows_q, mask.rows_kv) == (MOST + 40, MOST + 40)
    dense = mask.to_dense()
    out, lse = sparse_prefill(
        q_rope, k_rope, v, q, k, gate, rule, **both(cu, MOST + 40), return_lse=True
    )
    want = block_sparse_attn(q_rope, k_rope, v, mask, **both(cu, MOST + 40), return_lse=True)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    for n, at in enumerate(spans(LENGTHS)):
        blocks = -(-LENGTHS[n] // 64)
        assert not dense[n, :, blocks:].any() and not dense[n, ..., blocks:].any()
        if not blocks:
            continue
        alone = gate_mask(q[None, at], k[None, at], gate, rule)
        assert torch.equal(dense[n, None, :, :blocks, :blocks], alone.to_dense())
        part = sparse_prefill(q_rope[None, at], k_rope[None, at], v[None, at], q[None, at],
                              k[None, at], gate, rule)  # fmt: skip
        torch.testing.assert_close(out[at], part[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_different_sequences(device, dtype, given, seed):
    """The queries of each sequence are its last rows; the longest of both sides are two."""
    gate = make_gate(device, dtype, seed=seed)
    rows_kv, rows_q = [320, 100, 640, 64], [64, 100, 128, 64]
    gen = inputs.generator(seed)
    k = torch.randn(sum(rows_kv), 2, 64, generator=gen).to(device, dtype)
    q_all = torch.randn(sum(rows_kv), 4, 64, generator=gen).to(device, dtype)
    last = [slice(at.stop - n, at.stop) for at, n in zip(spans(rows_kv), rows_q, strict=True)]
    q = torch.cat([q_all[at] for at in last])
    positions = (3 * torch.arange(sum(rows_kv)) + 11).to(device) if given else None
    lengths = {"cu_seqlens_q": inputs.packed(rows_q).to(device), "max_rows_q": 130}
    lengths |= {"cu_seqlens_kv": inputs.packed(rows_kv).to(device), "max_rows_kv": 640}
    rule = Rule("topk", 2, local=1)
    dense = gate_mask(q, k, gate, rule, positions, **lengths).to_dense()
    for n, (at, own) in enumerate(zip(spans(rows_kv), last, strict=True)):
        where = None if positions is None else positions[at]
        alone = gate_mask(q_all[None, own], k[None, at], gate, rule, where)
        assert torch.equal(dense[n, None, :, : alone.blocks_q, : alone.blocks_kv], alone.to_dense())
        assert not dense[n, :, alone.blocks_q :].any()


def test_embed_and_select(seed):
    gate = make_gate(seed=seed)
    (q, k, *_), cu = packed_layer(LENGTHS, seed=seed)
    q_gate, k_gate = gate.embed(q, k, **both(cu))
    assert q_gate.requires_grad is False and k_gate.requires_grad
    with torch.no_grad():  # the launch for both
        pair = gate.embed(q, k, **both(cu))
    assert torch.equal(pair[0], q_gate) and torch.equal(pair[1], k_gate)
    for n, at in enumerate(spans(LENGTHS)):
        blocks = -(-LENGTHS[n] // 64)
        assert (q_gate[n, blocks:] == 0).all() and (k_gate[n, blocks:] == 0).all()
        if blocks:
            alone = gate.embed(q[None, at], k[None, at])
            assert torch.equal(q_gate[n, :blocks], alone[0][0])
            assert torch.equal(k_gate[n, :blocks], alone[1][0])
    chosen = gate.select(q, k, "topk", 2, local=1, **both(cu))
    assert torch.equal(
        chosen.block_bits, gate_mask(q, k, gate, Rule("topk", 2, local=1), **both(cu)).block_bits
    )


def test_positions_of_no_tokens():
    """Sequences without a token have no first one to look up."""
    q, k = torch.zeros(0, 4, 64), torch.zeros(0, 2, 64)
    cu = torch.zeros(3, dtype=torch.int32)
    made = make_gate().embed(q, k, torch.zeros(0, dtype=torch.int64), **both(cu, 130))
    assert [x.shape[:2] for x in made] == [(2, 3), (2, 3)]
    assert not any(x.any() for x in made)


def test_trains(seed):
    """The gradient of the gate's weights is the sum over the sequences."""
    gate = make_gate(seed=seed)
    (q, k, *_), cu = packed_layer(LENGTHS, seed=seed)
    weight = gate.mask_linear_k.weight
    draw = torch.randn(5, 5, 4, 64, generator=inputs.generator(seed))
    (made,) = torch.autograd.grad(gate.embed(q, k, **both(cu))[1], weight, draw)
    total = torch.zeros_like(weight)
    for n, at in enumerate(spans(LENGTHS)):
        blocks = -(-LENGTHS[n] // 64)
        if blocks:
            k_gate = gate.embed(q[None, at], k[None, at])[1]
            total += torch.autograd.grad(k_gate, weight, draw[n, None, :blocks])[0]
    torch.testing.assert_close(made, total, rtol=1e-4, atol=1e-4)


def test_compiles_whole(seed):
    torch._dynamo.reset()
    gate = make_gate(seed=seed)
    (q, k, q_rope, k_rope, v), cu = packed_layer(LENGTHS, seed=seed)

    def prefill(q, k, q_rope, k_rope, v, cu):
        return sparse_prefill(q_rope, k_rope, v, q, k, gate, Rule("topk", 2), **both(cu))

    compiled = torch.compile(prefill, backend="aot_eager", fullgraph=True)
    args = (q, k, q_rope, k_rope, v, cu)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), prefill(*args), rtol=1e-5, atol=1e-5)


def test_wrong_calls_are_explained(seed):
    gate = make_gate(seed=seed)
    (q, k, q_rope, k_rope, v), cu = packed_layer(LENGTHS, seed=seed)
    cache = GateKeyCache(gate, 1, 320)
    wrong = (
        lambda: gate.embed(q, k, cu_seqlens_q=cu, max_rows_q=MOST, max_rows_kv=MOST),
        lambda: gate_mask(q, k, gate, cu_seqlens_kv=cu, max_rows_q=MOST, max_rows_kv=MOST),
        lambda: gate_mask(q[None], k[None], gate, **both(cu)),
        lambda: gate_mask(q, k, gate),
        lambda: gate_mask(q, cache, gate, **both(cu)),
        lambda: gate_mask(q, k, gate, positions=torch.arange(10), **both(cu)),
        lambda: gate_mask(q, k, gate, positions=torch.zeros(2, len(k)), **both(cu)),
        lambda: sparse_prefill(q_rope[1:], k_rope, v, q, k, gate, **both(cu)),
        lambda: sparse_prefill(q_rope[None], k_rope, v, q, k, gate, **both(cu)),
    )
    for call in wrong:
        with pytest.raises(ValueError, match=FORM):
            call()
    for change in ({"max_rows_q": 0}, {"cu_seqlens_kv": cu.long()}, {"max_rows_kv": 100}):
        with pytest.raises(RuntimeError, match=FORM):
            gate_mask(q, k, gate, **(both(cu) | change))


# ----------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.method)
def test_one_graph_serves_other_lengths(rule, seed):
    """Captured once for max_rows; a replay reads the cu_seqlens that are there then."""
    dtype, most = torch.bfloat16, 1024
    gate = make_gate("cuda", dtype, seed, width=128)
    batches = ([1024, 300, 76], [100, 1000, 300], [1400 - 1024, 1024, 0])
    static, cu = packed_layer(batches[0], "cuda", dtype, width=128, seed=seed)

    def prefill():
        q, k, q_rope, k_rope, v = static
        mask = gate_mask(q, k, gate, rule, **both(cu, most))
        out = sparse_prefill(q_rope, k_rope, v, q, k, gate, rule, **both(cu, most))
        return mask.block_bits, out

    graph, results = capture(prefill)
    for repeat, lengths in enumerate(batches):
        fresh, edges = packed_layer(lengths, "cuda", dtype, width=128, seed=seed + repeat)
        for to, x in zip((*static, cu), (*fresh, edges), strict=True):
            to.copy_(x)
        for x in results:
            x.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        for name, a, b in zip(("bits", "out"), results, prefill(), strict=True):
            numerics.assert_bitwise(name, a, b)


@pytest.mark.gpu
def test_no_host_synchronisation(seed):
    gate = make_gate("cuda", torch.bfloat16, seed, width=128)
    (q, k, q_rope, k_rope, v), cu = packed_layer(LENGTHS, "cuda", torch.bfloat16, width=128)
    lengths = both(cu) | {"cu_seqlens_q": cu.clone()}  # two tensors: tables of their own
    positions = torch.arange(len(k), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rule in RULES:
            sparse_prefill(q_rope, k_rope, v, q, k, gate, rule, **both(cu))
            gate_mask(q, k, gate, rule, **lengths)
            gate_mask(q, k, gate, rule, positions, **lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
