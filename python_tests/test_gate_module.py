# SPDX-License-Identifier: Apache-2.0
"""seer_cuda.AttnGate: the 49 gates, checkpoint names and shapes, RoPE, selection."""

import math

import inputs
import pytest
import torch

from seer_cuda import AttnGate, GateConfig, reference

POOL_SETS = ("max", "min", "avg", "maxmin", "maxavg", "minavg", "maxminavg")
NAMES = [f"Q{q}_K{k}" for q in POOL_SETS for k in POOL_SETS]
CONTRACT = r"seer::AttnGate: .+: expected .+, got .+"


def bits_of(name):
    return sum(bit for pool, bit in reference.POOLS if pool in name)


def literal_scores(gate, q, k, first_positions, theta=10000.0):
    """The gate's scores from the oracle's pieces: float64 pooling, projection, RoPE, product."""
    config = gate.config
    pools_q, pools_k = (bits_of(part) for part in config.name[1:].split("_K"))
    width = config.gate_dim
    angle = first_positions.double()[:, None] * theta ** -(
        torch.arange(width // 2, dtype=torch.float64) * 2 / width
    )
    rope = (angle.cos(), angle.sin())
    weights = dict(gate.named_parameters())
    q_gate = reference.pool_gate(q, weights.get("mask_linear_q.weight"), *rope, pools=pools_q)
    k_gate = reference.pool_gate(k, weights["mask_linear_k.weight"], *rope, pools=pools_k)
    return reference.gate_scores(q_gate, k_gate)


def model_inputs(config, rows=200, batch=1, seed=0, dtype=torch.float32):
    return inputs.qkv(
        "normal",
        rows_q=rows,
        rows_kv=rows,
        batch=batch,
        heads_q=config.heads_q,
        heads_kv=config.heads_kv,
        head_dim=config.head_dim,
        dtype=dtype,
        seed=seed,
    )[:2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("double", [False, True])
def test_the_49_gates(name, double, seed):
    """Parameter names and shapes of the released code, and the scores they lead to."""
    torch.manual_seed(seed)
    config = GateConfig(4, 2, 16, name=name, gate_dim=16, force_double=double)
    gate = AttnGate(config)
    q_set, k_set = name[1:].split("_K")
    n_q, n_k = len(q_set) // 3, len(k_set) // 3
    shapes = {key: tuple(x.shape) for key, x in gate.state_dict().items()}
    if n_q == 1 and not double:
        assert shapes == {"mask_linear_k.weight": (4, n_k * 16, 16)}
    else:
        assert shapes == {
            "mask_linear_q.weight": (4, n_q * 16, 16),
            "mask_linear_k.weight": (2, n_k * 16, 16),
        }
    q, k = model_inputs(config, seed=seed)
    scores = gate(q, k)
    want = literal_scores(gate, q, k, torch.tensor([0, 64, 128, 192]))
    assert scores.dtype == torch.float32 and scores.shape == (1, 4, 4, 4)
    torch.testing.assert_close(scores.double(), want, rtol=1e-4, atol=1e-5)


def test_a_narrow_gate_is_double(seed):
    gate = AttnGate(GateConfig(4, 2, 32, name="Qavg_Kavg", gate_dim=16))
    assert set(gate.state_dict()) == {"mask_linear_q.weight", "mask_linear_k.weight"}
    q, k = model_inputs(gate.config, seed=seed)
    want = literal_scores(gate, q, k, torch.tensor([0, 64, 128, 192]))
    torch.testing.assert_close(gate(q, k).double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "heads_q, heads_kv, shape",
    [
        (32, 8, [32, 384, 128]),
        (64, 8, [64, 384, 128]),
        (28, 4, [28, 384, 128]),
        (40, 8, [40, 384, 128]),
    ],
)
def test_shapes_of_the_released_checkpoints(heads_q, heads_kv, shape):
    gate = AttnGate(GateConfig(heads_q, heads_kv, 128), device="meta")
    assert {k: list(x.shape) for k, x in gate.state_dict().items()} == {
        "mask_linear_k.weight": shape
    }


def released(layers=2, heads=4, width=16, prefix="model.", dtype=torch.bfloat16, seed=0):
    gen = inputs.generator(seed)
    return {
        f"{prefix}layers.{i}.self_attn.attn_gate.mask_linear_k.weight": torch.randn(
            heads, 3 * width, width, generator=gen
        ).to(dtype)
        for i in range(layers)
    }


@pytest.mark.parametrize("prefix", ["model.", "", "module.model."])
def test_loads_a_released_checkpoint(prefix, seed):
    state = released(prefix=prefix, seed=seed)
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16), dtype=torch.bfloat16)
    gate.load_released_state_dict(state, layer=1)
    key = f"{prefix}layers.1.self_attn.attn_gate.mask_linear_k.weight"
    assert torch.equal(gate.mask_linear_k.weight, state[key])


def test_layer_1_is_not_layer_11(seed):
    state = released(layers=12, seed=seed)
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16)).load_released_state_dict(state, layer=1)
    key = "model.layers.1.self_attn.attn_gate.mask_linear_k.weight"
    assert torch.equal(gate.mask_linear_k.weight, state[key].float())


def test_wrong_checkpoints_are_explained():
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16))
    with pytest.raises(KeyError, match=CONTRACT):
        gate.load_released_state_dict(released(), layer=7)
    with pytest.raises(KeyError, match=CONTRACT):
        gate.load_released_state_dict(released())
    with pytest.raises(ValueError, match=CONTRACT):
        gate.load_released_state_dict(released(heads=2), layer=0)
    double = {
        "mask_linear_k.weight": torch.zeros(4, 48, 16),
        "mask_linear_q.weight": torch.zeros(4, 16, 16),
    }
    with pytest.raises(KeyError, match=CONTRACT):
        gate.load_released_state_dict(double)


def test_decode_checkpoints_are_named():
    """A decode gate of SeerAttention-R, under its present and its first names."""
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16))
    prefix = "model.layers.0.self_attn.attn_gate."
    states = [
        {"attngate_linear_q.weight": torch.zeros(2, 2, 16, 16)},
        {"attngate_qnorm.weight": torch.zeros(16)},
        {"mask_linear_k.weight": torch.zeros(2, 48, 16), "mask_qnorm.weight": torch.zeros(16)},
        {"mask_linear_q.weight": torch.zeros(2, 2, 16, 16)},
    ]
    for state in states:
        for layer, named in ((None, state), (0, {prefix + key: x for key, x in state.items()})):
            with pytest.raises(ValueError, match=CONTRACT + ".*prefill") as error:
                gate.load_released_state_dict(named, layer)
            assert "decode gate of SeerAttention-R" in str(error.value)


def test_loads_a_layer_of_a_whole_model(seed):
    state = released(seed=seed)
    others = ("layers.1.self_attn.q_norm.weight", "layers.1.mlp.up.weight", "embed.weight")
    whole = {f"model.{name}": torch.zeros(16) for name in others} | state
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16)).load_released_state_dict(whole, layer=1)
    key = "model.layers.1.self_attn.attn_gate.mask_linear_k.weight"
    assert torch.equal(gate.mask_linear_k.weight, state[key].float())


def test_meta_gates_take_the_checkpoint(seed):
    """Parameters without memory become copies of the checkpoint; the frequencies come along."""
    config = GateConfig(4, 2, 16, gate_dim=16)
    with torch.device("meta"):
        gate = AttnGate(config)
    assert gate.mask_linear_k.weight.is_meta and gate.inv_freq.is_meta
    state = released(seed=seed)
    gate.load_released_state_dict(state, layer=1)
    eager = AttnGate(config).load_released_state_dict(state, layer=1)
    assert gate.mask_linear_k.weight.requires_grad
    assert gate.mask_linear_k.weight.dtype == torch.float32
    q, k = model_inputs(config, seed=seed)
    assert torch.equal(gate(q, k), eager(q, k))
    same = AttnGate(config, device="meta", dtype=torch.bfloat16)
    same.load_released_state_dict(state, layer=1)
    with torch.no_grad():
        same.mask_linear_k.weight.zero_()
    assert all(x.any() for x in state.values())


def test_meta_checkpoints_and_frequencies_are_refused():
    config = GateConfig(4, 2, 16, gate_dim=16)
    state = {"mask_linear_k.weight": torch.zeros(4, 48, 16, device="meta")}
    with pytest.raises(ValueError, match=CONTRACT):
        AttnGate(config).load_released_state_dict(state)
    with pytest.raises(ValueError, match=CONTRACT):
        AttnGate(config, torch.zeros(8, device="meta"))


def test_frequencies_follow_the_default_device(device):
    with torch.device(device):
        gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16))
    assert gate.inv_freq.device == gate.mask_linear_k.weight.device
    assert gate.inv_freq.device.type == torch.device(device).type
    empty = AttnGate(gate.config, device="meta").to_empty(device=device)
    assert torch.equal(empty.inv_freq, gate.inv_freq)


def test_rope_is_taken_at_the_first_token(seed):
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16))
    q, k = model_inputs(gate.config, seed=seed)
    positions = torch.arange(200) * 3 + 1000
    want = literal_scores(gate, q, k, positions[::64])
    torch.testing.assert_close(gate(q, k, positions).double(), want, rtol=1e-3, atol=1e-4)


def test_scores_depend_on_relative_position_only(seed):
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16))
    q, k = model_inputs(gate.config, seed=seed)
    at = torch.arange(200)
    torch.testing.assert_close(gate(q, k, at), gate(q, k, at + 640), rtol=1e-3, atol=1e-4)


def test_frequencies_stay_exact_in_bf16():
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16))
    at = torch.tensor([131072 - 64])
    want = gate.rope_tables(at)
    for a, b in zip(gate.to(torch.bfloat16).rope_tables(at), want, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_frequencies_of_the_model_and_scaling():
    inv_freq = torch.tensor([1.0, 0.5, 0.25])
    config = GateConfig(2, 1, 16, gate_dim=16, rotary_dim=6, attention_scaling=1.5)
    cos, sin = AttnGate(config, inv_freq).rope_tables(torch.arange(130))
    assert cos.shape == sin.shape == (3, 3)
    torch.testing.assert_close(cos[1], 1.5 * (64 * inv_freq).cos())
    torch.testing.assert_close(sin[2], 1.5 * (128 * inv_freq).sin())


@pytest.mark.parametrize(
    "method, value", [("threshold", 0.05), ("topk", 2), ("density", 0.5), ("topp", 0.7)]
)
def test_select(method, value, seed):
    torch.manual_seed(seed)
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16, init_std=1.0))
    q, k = model_inputs(gate.config, rows=700, seed=seed)
    mask = gate.select(q, k, method, value, local=1)
    assert (mask.heads, mask.blocks_q, mask.blocks_kv) == (4, 11, 11)
    assert (mask.rows_q, mask.rows_kv, mask.block_q, mask.block_kv) == (700, 700, 64, 64)
    number = ("threshold", "topk", "density", "topp").index(method)
    want = reference.select_blocks(
        gate(q, k).detach().double(), method=number, value=value, local=1
    )
    # The decisions of fp32 scores and of the same scores in float64 differ at most at a boundary.
    assert (mask.to_dense() != want).sum() <= 1
    mask.validate()


def test_chunked_prefill_selects_the_last_rows(seed):
    """The last query rows with all keys select what the whole prompt selects for them."""
    torch.manual_seed(seed)
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16, init_std=1.0))
    q, k = model_inputs(gate.config, rows=640, seed=seed)
    whole = gate.select(q, k, "topk", 3).to_dense()
    chunk = gate.select(q[:, -256:], k, "topk", 3).to_dense()
    assert torch.equal(chunk, whole[:, :, -4:])


def test_a_last_short_block_in_a_chunk(seed):
    """A chunk that starts at a block and ends within one selects what the whole prompt selects."""
    torch.manual_seed(seed)
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16, init_std=1.0))
    q, k = model_inputs(gate.config, rows=600, seed=seed)
    whole = gate.select(q, k, "topk", 3, local=1)
    chunk = gate.select(q[:, 448:], k, "topk", 3, local=1).validate()
    assert torch.equal(chunk.to_dense(), whole.to_dense()[:, :, -3:])


def x(*shape):
    return torch.zeros(shape)


WRONG_INPUTS = {
    "heads of q": ("q", (x(1, 128, 2, 16), x(1, 128, 2, 16))),
    "heads of k": ("k", (x(1, 128, 4, 16), x(1, 128, 4, 16))),
    "head_dim of q": ("q", (x(1, 128, 4, 32), x(1, 128, 2, 16))),
    "head_dim of k": ("k", (x(1, 128, 4, 16), x(1, 128, 2, 32))),
    "packed q": ("q", (x(128, 4, 16), x(128, 2, 16))),
    "rows_kv": ("k", (x(1, 128, 4, 16), x(1, 64, 2, 16))),
    "positions": ("positions", (x(1, 64, 4, 16), x(1, 128, 2, 16), torch.arange(64))),
    "position": ("positions", (x(1, 64, 4, 16), x(1, 128, 2, 16), torch.tensor(3))),
    "chunk": ("rows_q", (x(1, 100, 4, 16), x(1, 128, 2, 16))),
    "decode": ("rows_q", (x(1, 1, 4, 16), x(1, 128, 2, 16))),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
@pytest.mark.parametrize("method", ["embed", "forward", "select"])
def test_inputs_are_refused(method, name):
    argument, args = WRONG_INPUTS[name]
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16))
    form = rf"seer::AttnGate: {argument}: expected .+, got .+\. \S.*\."
    with pytest.raises(ValueError, match=form):
        getattr(gate, method)(*args[:2], positions=args[2] if args[2:] else None)


def test_training_step(seed):
    torch.manual_seed(seed)
    gate = AttnGate(GateConfig(4, 2, 16, name="Qmaxavg_Kmaxminavg", gate_dim=16))
    q, k = model_inputs(gate.config, seed=seed)
    scores = gate(q, k)
    scores.masked_fill(scores.isinf(), 0.0).square().sum().backward()
    for name, weight in gate.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


WRONG = {
    "name": {"name": "Qavg_Kminmax"},
    "heads_kv": {"heads_kv": 3},
    "heads_q": {"heads_q": 0},
    "block": {"block": 0},
    "rotary_dim odd": {"rotary_dim": 7},
    "rotary_dim wide": {"rotary_dim": 256},
    "rotary_dim float": {"rotary_dim": 64.0},
    "head_dim float": {"head_dim": 128.0},
    "gate_dim text": {"gate_dim": "128"},
    "block bool": {"block": True},
    "rope_theta 0": {"rope_theta": 0.0},
    "rope_theta nan": {"rope_theta": math.nan},
    "attention_scaling inf": {"attention_scaling": math.inf},
    "attention_scaling 0": {"attention_scaling": 0},
    "attention_scaling text": {"attention_scaling": "1"},
    "init_std": {"init_std": -0.1},
    "init_std nan": {"init_std": math.nan},
    "norm_eps": {"norm_eps": -1e-6},
}


@pytest.mark.parametrize("name", WRONG)
def test_config_refuses(name):
    with pytest.raises(ValueError, match=CONTRACT):
        GateConfig(**({"heads_q": 4, "heads_kv": 2, "head_dim": 128} | WRONG[name]))
