# SPDX-License-Identifier: Apache-2.0
"""Gates, a layer's inputs, and graphs, for the tests of prefill."""

import inputs
import torch

from seer_cuda import AttnGate, GateConfig


def make_gate(device="cpu", dtype=torch.float32, seed=0, width=64, **config):
    torch.manual_seed(seed)
    config = GateConfig(4, 2, width, **({"gate_dim": width, "init_std": 0.3} | config))
    return AttnGate(config).to(device, dtype)


def layer_inputs(rows, device="cpu", dtype=torch.float32, *, batch=1, width=64, seed=0):
    """q, k before RoPE and q_rope, k_rope, v: independent, as far as the gate can tell."""
    options = {"rows_q": rows, "rows_kv": rows, "batch": batch, "heads_q": 4, "heads_kv": 2}
    options |= {"head_dim": width, "dtype": dtype, "device": device}
    q, k, _ = inputs.qkv("normal", **options, seed=seed)
    return q, k, *inputs.qkv("normal", **options, seed=seed + 1)


def capture(call):
    """(graph, its results): warmed up first, as torch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results
