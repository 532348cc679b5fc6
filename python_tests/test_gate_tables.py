# SPDX-License-Identifier: Apache-2.0
"""RoPE tables that AttnGate keeps: right, made once, and there as long as a graph reads them."""

import copy
import pickle

import pytest
import torch
from gates import capture, layer_inputs, make_gate

from seer_cuda import AttnGate, Rule, gate_mask


@pytest.mark.parametrize("rotary_dim", [None, 32, 0])
def test_kept_tables_are_those_of_the_positions(device, rotary_dim, seed):
    """Default positions go by tables that are kept; they never go stale or change a bit."""
    gate = make_gate(device, seed=seed, rotary_dim=rotary_dim)
    for rows in (70, 5000, 300, 9000, 5000):
        q, k, *_ = layer_inputs(rows, device, seed=seed)
        want = gate.embed(q, k, torch.arange(rows, device=device))
        for a, b in zip(gate.embed(q, k), want, strict=True):
            assert torch.equal(a, b)


def test_tables_are_made_once(monkeypatch, seed):
    gate = make_gate(seed=seed)
    made = []
    make = AttnGate._rope_at
    monkeypatch.setattr(AttnGate, "_rope_at", lambda *args: made.append(1) or make(*args))
    for rows in (1000, 1000, 64, 5000, 5000, 300):
        q, k, *_ = layer_inputs(rows, seed=seed)
        gate_mask(q, k, gate)
    assert len(made) == 2


def test_conversions_leave_what_graphs_read(device, monkeypatch, seed):
    """Only a move to another device makes new frequencies and tables."""
    gate = make_gate(device, seed=seed)
    q, k, *_ = layer_inputs(300, device, seed=seed)
    want = gate_mask(q, k, gate).block_bits
    frequencies = gate.inv_freq
    made = []
    make = AttnGate._rope_at
    monkeypatch.setattr(AttnGate, "_rope_at", lambda *args: made.append(1) or make(*args))
    for convert in (
        lambda: gate.to(device),
        lambda: gate.half().float(),
        lambda: gate.to(device, torch.float64).float(),
    ):
        convert()
        gate_mask(q, k, gate)
        assert not made and gate.inv_freq is frequencies and frequencies.dtype == torch.float32
    gate.to("meta").to_empty(device=device)
    gate_mask(q, k, gate)
    assert len(made) == 1
    assert torch.equal(gate_mask(q, k, make_gate(device, seed=seed)).block_bits, want)


@pytest.mark.parametrize("made_in", [False, True], ids=["eager", "inference"])
@pytest.mark.parametrize("changed_in", [False, True], ids=["eager", "inference"])
def test_tables_follow_changed_frequencies(device, made_in, changed_in, seed):
    with torch.inference_mode(made_in):
        gate = make_gate(device, seed=seed)
    q, k, *_ = layer_inputs(300, device, seed=seed)
    at = torch.arange(300, device=device)

    def changed():
        with torch.inference_mode(changed_in):
            gate.inv_freq.mul_(0.5)

    def replaced():
        with torch.inference_mode(changed_in):
            gate.inv_freq = gate.inv_freq * 0.5

    before = None
    with torch.no_grad():
        for change in (lambda: None, changed, replaced, changed):
            change()
            got = gate.embed(q, k)
            for a, b in zip(got, gate.embed(q, k, at), strict=True):
                assert torch.equal(a, b)
            assert before is None or not torch.equal(got[1], before)
            before = got[1]
            assert len(gate._kept_tables._kept) == 1  # nor do changes pile tables up


def test_copies_of_a_gate_make_their_own_tables(device, seed):
    """A gate that was used can be copied and pickled."""
    gate = make_gate(device, seed=seed)
    q, k, *_ = layer_inputs(300, device, seed=seed)
    want = gate.embed(q, k)
    for copied in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        with torch.no_grad():
            gate_now = copied.inv_freq.mul_(0.5)
        assert not torch.equal(gate_now, gate.inv_freq)
        assert not torch.equal(copied.embed(q, k)[1], want[1])
        assert torch.equal(gate.embed(q, k)[1], want[1])


def test_tables_made_in_inference_serve_training(device, seed):
    gate = make_gate(device, seed=seed)
    q, k, *_ = layer_inputs(300, device, seed=seed)
    with torch.inference_mode():
        gate_mask(q, k, gate)
    gate(q, k).clamp_min(-1).sum().backward()
    assert gate.mask_linear_k.weight.grad.abs().sum() > 0


def test_rope_tables_move_with_the_gate(seed):
    gate = make_gate(seed=seed)
    q, k, *_ = layer_inputs(300, seed=seed)
    before = gate_mask(q, k, gate)
    gate.to("meta")
    assert gate_mask(q.to("meta"), k.to("meta"), gate).device.type == "meta"
    again = make_gate(seed=seed)
    assert torch.equal(gate_mask(q, k, again).block_bits, before.block_bits)


@pytest.mark.gpu
def test_another_stream_waits_for_the_tables(seed):
    """On the device: the host goes on, and what reads the tables runs after what makes them."""
    dtype, rule = torch.bfloat16, Rule("topk", 3)
    q, k, *_ = layer_inputs(1000, "cuda", dtype, width=128, seed=seed)
    want = gate_mask(q, k, make_gate("cuda", dtype, seed, width=128), rule).block_bits
    gate = make_gate("cuda", dtype, seed, width=128)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for stream in streams:  # loads kernels and fills the streams' memory pools, which may block
        with torch.cuda.stream(stream):
            gate_mask(q, k, make_gate("cuda", dtype, seed, width=128), rule)
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(10**9)  # about half a second
        slept = streams[0].record_event()
        gate_mask(q, k, gate, rule)
    with torch.cuda.stream(streams[1]):
        bits = gate_mask(q, k, gate, rule).block_bits
    assert not slept.query()
    streams[1].synchronize()
    assert slept.query() and torch.equal(bits, want)


@pytest.mark.gpu
def test_a_graph_survives_a_conversion(seed):
    """`.to` of the gate's own device and dtype frees nothing that a graph reads."""
    gate = make_gate("cuda", torch.bfloat16, seed, width=128)
    q, k, *_ = layer_inputs(1000, "cuda", torch.bfloat16, width=128, seed=seed)
    at = torch.arange(1000, device="cuda")
    gate_mask(q, k, gate)  # tables from this stream's memory, which the junk below takes from
    for positions in (None, at):
        graph, mask = capture(lambda at=positions: gate_mask(q, k, gate, Rule("topk", 3), at))
        want = mask.block_bits
        graph.replay()
        want = want.clone()
        gate.to("cuda", torch.bfloat16)
        # Takes what was freed, at the sizes of tables and frequencies.
        junk = [torch.full((size,), torch.nan, device="cuda") for size in (64, 64 * 64) * 64]
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(mask.block_bits, want)
        del junk


@pytest.mark.gpu
def test_first_call_inside_a_capture(seed):
    """Tables made during a capture are not kept: they hold nothing until the replay."""
    gate = make_gate("cuda", torch.bfloat16, seed, width=128)
    q, k, *_ = layer_inputs(1000, "cuda", torch.bfloat16, width=128, seed=seed)
    other = make_gate("cuda", torch.bfloat16, seed, width=128)
    want = gate_mask(q, k, other, Rule("topk", 3)).block_bits
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bits = gate_mask(q, k, gate, Rule("topk", 3)).block_bits
    eager = gate_mask(q, k, gate, Rule("topk", 3)).block_bits
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(eager, want) and torch.equal(bits, want)
