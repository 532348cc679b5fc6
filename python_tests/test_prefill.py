# SPDX-License-Identifier: Apache-2.0
"""seer_cuda.gate_mask, sparse_prefill, GateKeyCache: prefill with a gate, whole and in chunks."""

import numerics
import pytest
import torch
from attention import DTYPES
from gates import capture, layer_inputs, make_gate

from seer_cuda import (
    GateKeyCache,
    Rule,
    block_sparse_attn,
    gate_mask,
    reference,
    sparse_prefill,
)

FORM = r"seer::\w+: \w+: expected .+, got .+\. \S.*\."
RULES = (
    Rule("threshold", 0.05, local=1),
    Rule("topk", 3, sink=1),
    Rule("density", 0.4, dense_last_rows=2),
    Rule("topp", 0.7),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.method)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_gate_mask_is_the_oracle_s_selection(device, rule, qk_norm, seed):
    gate = make_gate(device, seed=seed, qk_norm=qk_norm)
    q, k, *_ = layer_inputs(700, device, batch=2, seed=seed)
    mask = gate_mask(q, k, gate, rule).validate()
    assert mask.shape == (2, 4, 11, 11) and (mask.rows_q, mask.rows_kv) == (700, 700)
    method = ("threshold", "topk", "density", "topp").index(rule.method)
    forced = {name: getattr(rule, name) for name in ("sink", "local", "dense_last_rows")}
    want = reference.select_blocks(
        gate(q, k).detach().double(), method=method, value=rule.value, **forced
    )
    # The decisions of fp32 scores and of the same scores in float64 differ at most at a boundary.
    assert (mask.to_dense() != want).sum() <= 1


def test_select_is_gate_mask_spelled_out(seed):
    gate = make_gate(seed=seed)
    q, k, *_ = layer_inputs(300, seed=seed)
    positions = torch.arange(300) + 1000
    mask = gate_mask(q, k, gate, Rule("topk", 2, sink=1, local=1, dense_last_rows=1), positions)
    same = gate.select(q, k, "topk", 2, positions, sink=1, local=1, dense_last_rows=1)
    assert torch.equal(mask.block_bits, same.block_bits)
    assert torch.equal(gate_mask(q, k, gate).block_bits, gate.select(q, k).block_bits)


@pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param(device, dtype, marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device, dtypes in DTYPES.items()
        for dtype in dtypes
    ],
)
def test_sparse_prefill_is_attention_under_the_mask(device, dtype, seed):
    gate = make_gate(device, dtype, seed)
    q, k, q_rope, k_rope, v = layer_inputs(300, device, dtype, seed=seed)
    rule = Rule("topk", 2, local=1)
    out, lse = sparse_prefill(q_rope, k_rope, v, q, k, gate, rule, scale=0.2, return_lse=True)
    mask = gate_mask(q, k, gate, rule)
    want = block_sparse_attn(q_rope, k_rope, v, mask, scale=0.2, return_lse=True)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    alone = sparse_prefill(q_rope, k_rope, v, q, k, gate, rule, scale=0.2)
    assert torch.equal(alone, out) and out.dtype == dtype and out.shape == q_rope.shape


@pytest.mark.parametrize("name", ["Qavg_Kmaxminavg", "Qmaxavg_Kmin"])
@pytest.mark.parametrize("chunks", [[256, 192, 152], [64, 536], [600]])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_chunked_prefill_gives_the_rows_of_the_whole(name, chunks, qk_norm, seed):
    """Every chunk pools its own keys and selects and attends as the whole prompt does."""
    gate = make_gate(seed=seed, name=name, qk_norm=qk_norm)
    q, k, q_rope, k_rope, v = layer_inputs(600, batch=2, seed=seed)
    rule = Rule("topk", 3, local=1)
    whole = gate_mask(q, k, gate, rule)
    out = sparse_prefill(q_rope, k_rope, v, q, k, gate, rule)
    cache = GateKeyCache(gate, 2, 600)
    start = 0
    for rows in chunks:
        end = start + rows
        cache.append(k[:, start:end])
        assert cache.rows == end
        mask = gate_mask(q[:, start:end], cache, gate, rule).validate()
        first = start // 64
        dense = whole.to_dense()[:, :, first : first + mask.blocks_q, : mask.blocks_kv]
        assert torch.equal(mask.to_dense(), dense)
        part = sparse_prefill(
            q_rope[:, start:end], k_rope[:, :end], v[:, :end], q[:, start:end], cache, gate, rule
        )
        torch.testing.assert_close(part, out[:, start:end], rtol=1e-5, atol=1e-5)
        start = end
    assert torch.equal(cache.keys, gate.embed(q, k)[1])


def test_the_next_turn_pools_the_last_short_block_again(seed):
    gate = make_gate(seed=seed)
    q, k, *_ = layer_inputs(500, seed=seed)
    cache = GateKeyCache(gate, 1, 512).append(k[:, :200])
    with pytest.raises(ValueError, match=r"rows: expected .+ Truncate to 192"):
        cache.append(k[:, 200:])
    cache.truncate(192).append(k[:, 192:])
    assert torch.equal(cache.keys, gate.embed_k(k)) and cache.rows == 500
    mask = gate_mask(q[:, 192:], cache, gate, Rule("topk", 2))
    whole = gate_mask(q, k, gate, Rule("topk", 2))
    assert torch.equal(mask.to_dense(), whole.to_dense()[:, :, 3:])


def test_positions_of_a_chunk(seed):
    gate = make_gate(seed=seed)
    q, k, *_ = layer_inputs(256, seed=seed)
    at = 3 * torch.arange(256) + 700
    cache = GateKeyCache(gate, 1, 256)
    cache.append(k[:, :128], at[:128]).append(k[:, 128:], at[128:])
    rule = Rule("topk", 2)
    mask = gate_mask(q[:, 128:], cache, gate, rule, at[128:])
    assert torch.equal(mask.to_dense(), gate_mask(q, k, gate, rule, at).to_dense()[:, :, 2:])
    q_gate, k_gate = gate.embed(q, k, at)
    assert torch.equal(gate.embed_q(q, at), q_gate) and torch.equal(gate.embed_k(k, at), k_gate)
    assert torch.equal(gate.embed(q[:, 128:], k, at)[0], q_gate[:, 2:])
    with torch.no_grad():
        assert torch.equal(gate.embed(q[:, 128:], k, at)[0], q_gate[:, 2:])
    at_zero = gate.embed_q(q[:, 128:], torch.arange(128, 256))
    assert torch.equal(gate.embed_q(q[:, 128:], first=128), at_zero)


def test_a_cache_of_another_dtype_and_its_sizes(seed):
    gate = make_gate(seed=seed)
    cache = GateKeyCache(gate, 3, 130, dtype=torch.bfloat16)
    assert cache.keys.shape == (3, 0, 4, 64) and cache.keys.dtype == torch.bfloat16
    q, k, *_ = layer_inputs(130, dtype=torch.bfloat16, batch=3, seed=seed)
    cache.append(k)
    assert cache.keys.shape == (3, 3, 4, 64) and not cache.keys.requires_grad
    want = gate_mask(q, k, gate, Rule("topk", 1))
    assert torch.equal(gate_mask(q, cache, gate, Rule("topk", 1)).block_bits, want.block_bits)
    double = make_gate(name="Qmaxavg_Kmin")
    assert GateKeyCache(double, 1, 64).append(layer_inputs(64)[1]).keys.shape == (1, 1, 2, 64)


def test_a_cache_that_grows_keeps_its_keys(seed):
    gate = make_gate(seed=seed)
    _, k, *_ = layer_inputs(500, batch=2, seed=seed)
    cache = GateKeyCache(gate, 2, 64).append(k[:, :64])
    with pytest.raises(ValueError, match="at most 0 more rows"):
        cache.append(k[:, 64:])
    assert cache.reserve(10).reserve(65).append(k[:, 64:128]).rows == 128
    cache.reserve(500).append(k[:, 128:])
    assert torch.equal(cache.keys, gate.embed_k(k))


def test_a_cache_that_grew_in_inference_mode_grows_outside(seed):
    gate = make_gate(seed=seed)
    _, k, *_ = layer_inputs(192, seed=seed)
    cache = GateKeyCache(gate, 1, 64).append(k[:, :64])
    with torch.inference_mode():
        cache.reserve(192).append(k[:, 64:128])
    assert torch.equal(cache.append(k[:, 128:]).keys, gate.embed_k(k))


def test_wrong_calls_are_explained(seed):
    gate = make_gate(seed=seed)
    q, k, *_ = layer_inputs(256, seed=seed)
    full = GateKeyCache(gate, 1, 256).append(k)
    wrong = (
        lambda: GateKeyCache(gate, -1, 64),
        lambda: full.append(k),
        lambda: GateKeyCache(gate, 1, 256).append(k.bfloat16()),
        lambda: GateKeyCache(gate, 2, 256).append(k),
        lambda: GateKeyCache(gate, 1, 256).append(k[0]),
        lambda: GateKeyCache(gate, 1, 256).append(k, torch.arange(10)),
        lambda: GateKeyCache(gate, 1, 256).append(q),
        lambda: full.truncate(100),
        lambda: full.truncate(320),
        lambda: gate_mask(torch.cat([q, q], 1), full, gate),
        lambda: gate_mask(q[:, :100], full, gate),
        lambda: gate.embed_q(q, first=10),
        lambda: gate.embed_k(k, first=-64),
        lambda: Rule("nearest"),
        lambda: Rule("topk", 0),
        lambda: Rule(local=-1),
    )
    for call in wrong:
        with pytest.raises(ValueError, match=FORM):
            call()


def test_a_rule_is_no_string(seed):
    q, k, *_ = layer_inputs(128, seed=seed)
    with pytest.raises(TypeError, match=r"seer::gate_mask: select: expected .+, got 'topk'\. "):
        gate_mask(q, k, make_gate(seed=seed), "topk")


def test_a_cache_of_another_gate_is_refused(seed):
    gate, other = make_gate(seed=seed), make_gate(seed=seed + 1)
    q, k, *_ = layer_inputs(128, seed=seed)
    cache = GateKeyCache(gate, 1, 128).append(k)
    assert cache.gate is gate
    with pytest.raises(ValueError, match=r"seer::gate_mask: gate: expected .+, got another one\."):
        gate_mask(q, cache, other)


def test_a_cache_without_memory_to_grow_is_as_before(seed):
    gate = make_gate(seed=seed)
    k = layer_inputs(256, seed=seed)[1]
    cache = GateKeyCache(gate, 1, 128).append(k[:, :128])
    before = cache.keys.clone()
    with pytest.raises(RuntimeError):  # more bytes than there are addresses
        cache.reserve(2**50)
    with pytest.raises(ValueError, match=r"k: expected at most 0 more rows, got 128\."):
        cache.append(k[:, 128:])
    assert torch.equal(cache.keys, before)
    assert cache.reserve(256).append(k[:, 128:]).rows == 256


@pytest.mark.parametrize("name, rows_q, rows_kv", [("k_rope", 100, 128), ("q_rope", 90, 100)])
def test_attention_gets_the_rows_of_the_gate(name, rows_q, rows_kv, seed):
    """Also where the numbers of blocks agree: a padded KV cache would move the diagonal."""
    gate = make_gate(seed=seed)
    q, k, q_rope, k_rope, v = layer_inputs(256, seed=seed)
    form = rf"seer::sparse_prefill: {name}: expected .+, got .+\. \S.*\."
    cache = GateKeyCache(gate, 1, 128).append(k[:, :100])
    for keys in (k[:, :100], cache):
        with pytest.raises(ValueError, match=form):
            sparse_prefill(
                q_rope[:, :rows_q], k_rope[:, :rows_kv], v[:, :rows_kv], q[:, :100], keys, gate
            )
    with pytest.raises(ValueError, match=r"seer::sparse_prefill: q_rope: expected \[batch, 100,"):
        sparse_prefill(q_rope[0], k_rope, v, q[:, :100], k[:, :100], gate)


@pytest.mark.parametrize("made_in, used_in", [(True, False), (False, True), (True, True)])
def test_a_cache_in_and_out_of_inference_mode(device, made_in, used_in, seed):
    gate = make_gate(device, seed=seed)
    q, k, *_ = layer_inputs(128, device, seed=seed)
    with torch.inference_mode(made_in):
        cache = GateKeyCache(gate, 1, 128).append(k[:, :64])
    with torch.inference_mode(used_in):
        cache.append(k[:, 64:])
        mask = gate_mask(q, cache, gate, Rule("topk", 1))
    assert torch.equal(mask.block_bits, gate_mask(q, k, gate, Rule("topk", 1)).block_bits)


def test_compiles_whole(seed):
    torch._dynamo.reset()
    gate = make_gate(seed=seed)
    args = layer_inputs(300, seed=seed)

    def prefill(q, k, q_rope, k_rope, v):
        return sparse_prefill(q_rope, k_rope, v, q, k, gate, Rule("topk", 2, local=1))

    compiled = torch.compile(prefill, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), prefill(*args), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4096, 1000])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.method)
def test_one_graph_serves_changing_masks(rule, rows, qk_norm, seed):
    """Captured once; other inputs give other masks, and the bits that eager calls give."""
    dtype = torch.bfloat16
    gate = make_gate("cuda", dtype, seed, width=128, qk_norm=qk_norm)
    static = layer_inputs(rows, "cuda", dtype, width=128, seed=seed)

    def prefill():
        q, k, q_rope, k_rope, v = static
        mask = gate_mask(q, k, gate, rule)
        return mask.block_bits, *sparse_prefill(
            q_rope, k_rope, v, q, k, gate, rule, return_lse=True
        )

    graph, results = capture(prefill)
    # A longer prompt makes longer tables; the graph must go on reading its own.
    long = layer_inputs(3 * rows, "cuda", dtype, width=128, seed=seed)[:2]
    gate_mask(*long, gate, rule)
    masks = []
    for repeat in (1, 2, 3):
        for to, x in zip(
            static,
            layer_inputs(rows, "cuda", dtype, width=128, seed=seed + 10 * repeat),
            strict=True,
        ):
            to.copy_(x)
        for x in results:
            x.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        for name, a, b in zip(("bits", "out", "lse"), results, prefill(), strict=True):
            numerics.assert_bitwise(name, a, b)
        masks.append(results[0].clone())
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


@pytest.mark.gpu
def test_no_host_synchronisation(seed):
    gate = make_gate("cuda", torch.bfloat16, seed, width=128)
    q, k, q_rope, k_rope, v = layer_inputs(1000, "cuda", torch.bfloat16, width=128, seed=seed)
    cache = GateKeyCache(gate, 1, 1000, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rule in RULES:
            sparse_prefill(q_rope, k_rope, v, q, k, gate, rule)
            cache.truncate(0).append(k)
            gate_mask(q, cache, gate, rule)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_chunk_in_a_graph(seed):
    """Append and use of a chunk's keys, captured together."""
    gate = make_gate("cuda", torch.bfloat16, seed, width=128)
    q, k, q_rope, k_rope, v = layer_inputs(1024, "cuda", torch.bfloat16, width=128, seed=seed)
    cache = GateKeyCache(gate, 1, 1024).append(k[:, :512])
    rule = Rule("topk", 3, local=1)

    def second():
        cache.truncate(512).append(k[:, 512:])
        return sparse_prefill(q_rope[:, 512:], k_rope, v, q[:, 512:], cache, gate, rule)

    graph, out = capture(second)
    want = sparse_prefill(q_rope, k_rope, v, q, k, gate, rule)[:, 512:]
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
