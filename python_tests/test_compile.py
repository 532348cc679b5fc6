# SPDX-License-Identifier: Apache-2.0
"""torch.compile (one graph, dynamic shapes) and torch.export give what eager mode gives."""

import attention
import inputs
import pytest
import samples
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import seer_cuda


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(expected, actual):
    for a, b in zip(samples.as_tuple(expected), samples.as_tuple(actual), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("form", samples.FORMS)
@torch.fx.experimental._config.patch(use_duck_shape=False)  # sizes that are equal by chance
def test_one_graph_for_all_lengths(device, form, seed):
    """Fullgraph, dynamic: the second and third length reuse the first compilation."""
    counter = CompileCounterWithBackend("aot_eager")
    op, args, kwargs = samples.sample(form, device, seed=seed)
    compiled = torch.compile(op, backend=counter, fullgraph=True, dynamic=True)
    assert_same(op(*args, **kwargs), compiled(*args, **kwargs))
    # Not always 1: dynamo starts over once when a float such as value=0.05 is an input.
    first = counter.frame_count
    for rows in (210, 333):
        _, args, kwargs = samples.sample(form, device, rows, seed=seed)
        assert_same(op(*args, **kwargs), compiled(*args, **kwargs))
    assert counter.frame_count == first, "another length was compiled again"


def gated_attention(gate, q, k, v):
    """What a model does in prefill: gate, select, attend."""
    mask = gate.select(q, k, "topk", 2, local=1)
    return seer_cuda.block_sparse_attn(q, k, v, mask)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gate_and_attention_in_one_graph(device, backend, seed):
    torch.manual_seed(seed)
    config = seer_cuda.GateConfig(4, 2, 64, gate_dim=64, init_std=1.0)
    gate = seer_cuda.AttnGate(config, device=device, dtype=torch.bfloat16)
    compiled = torch.compile(gated_attention, backend=backend, fullgraph=True)
    q, k, v = attention.small(device, rows=(200, 200), seed=seed)
    assert_same(gated_attention(gate, q, k, v), compiled(gate, q, k, v))


def test_a_block_mask_crosses_the_graph(device, seed):
    """BlockMask as input and output of a compiled function."""

    def widen(q, k, v, mask):
        wider = seer_cuda.BlockMask.from_dense(
            mask.to_dense() | mask.causal_visible(), 64, 64, mask.rows_q, mask.rows_kv
        )
        return wider, seer_cuda.block_sparse_attn(q, k, v, wider)

    q, k, v = attention.small(device, seed=seed)
    bits = attention.make_bits("random_10", rows_q=150, rows_kv=150, device=device, stray=False)
    mask = seer_cuda.BlockMask(bits, 64, 64, 150, 150)
    compiled = torch.compile(widen, backend="aot_eager", fullgraph=True)
    wider, out = widen(q, k, v, mask)
    other, same = compiled(q, k, v, mask)
    assert wider == other and torch.equal(out, same)


@pytest.mark.parametrize("form", samples.FORMS)
def test_export(device, form, seed):
    op, args, kwargs = samples.sample(form, device, seed=seed)

    class Call(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return op(*args, **kwargs)

    program = torch.export.export(Call(), args, kwargs)
    assert any("seer" in str(node.target) for node in program.graph.nodes)
    assert_same(op(*args, **kwargs), program.module()(*args, **kwargs))


def test_export_with_dynamic_rows(device, seed):
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.ops.seer.block_sparse_attn(q, k, v)[0]

    rows = torch.export.Dim("rows", min=2, max=4096)
    shape = {1: rows}
    args = attention.small(device, seed=seed)
    program = torch.export.export(Attend(), args, dynamic_shapes=(shape, shape, shape))
    longer = attention.small(device, rows=(321, 321), seed=seed)
    assert_same(Attend()(*longer), program.module()(*longer))


def test_gradients_through_compile(device, seed):
    """pool_gate and gate_scores train under torch.compile with eager's gradients."""

    def score(x, weight):
        gate = seer_cuda.pool_gate(x, weight, pools="maxminavg")
        scores = seer_cuda.gate_scores(gate, gate)
        return scores.masked_fill(scores.isinf(), 0.0).sum()

    x = inputs.qkv(
        "normal", rows_q=200, rows_kv=1, heads_q=2, dtype=torch.bfloat16, device=device, seed=seed
    )[0]
    grads = []
    for function in (score, torch.compile(score, backend="aot_eager", fullgraph=True)):
        a = x.clone().requires_grad_()
        w = torch.full((2, 192, 64), 0.01, dtype=x.dtype, device=device).requires_grad_()
        function(a, w).backward()
        grads.append((a.grad, w.grad))
    assert_same(*grads)


def test_repr_under_fake_mode():
    """repr of a mask of fake tensors reads no values."""
    with torch._subclasses.FakeTensorMode():
        mask = seer_cuda.BlockMask(torch.zeros(1, 1, 3, 1, dtype=torch.int32), 64, 64, 150, 150)
        assert "BlockMask" in repr(mask)
