# SPDX-License-Identifier: Apache-2.0
"""The gate's gradients in float64, the norm of its embeddings, and what the backward allocates."""

import inputs
import pytest
import torch
from attention import DTYPES
from test_gate_kl import PeakMemory

from seer_cuda import AttnGate, GateConfig, _gate_math, _gate_pooling, reference

GPU = [pytest.mark.gpu]


def draw(seed, *shape):
    return torch.randn(*shape, generator=inputs.generator(seed), dtype=torch.float64)


def rope_tables(blocks, width):
    angle = torch.arange(blocks, dtype=torch.float64)[:, None] * 0.3 ** torch.arange(width)
    return angle.cos(), angle.sin()


def assert_exact(grads, wanted):
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pools", range(1, 8))
@pytest.mark.parametrize("heads_out", [None, 2, 6])
@pytest.mark.parametrize("rows", [7, 32, 75])
@pytest.mark.parametrize("rotary", [0, 3])
def test_pool_gate_backward_is_the_oracle_s(pools, heads_out, rows, rotary, seed):
    """To x and weight: whole and ragged blocks, every set of pools, groups, a part rotated."""
    width = 8 * pools.bit_count()
    x = draw(seed, 2, 2, rows, 8).transpose(1, 2).requires_grad_()  # not contiguous
    weight = None if heads_out is None else draw(seed + 1, heads_out, width, 10).requires_grad_()
    tables = rope_tables(-(-rows // 16), rotary) if rotary else (None, None)
    out = reference.pool_gate(x, weight, *tables, block=16, pools=pools)
    grad = draw(seed + 2, *out.shape)
    leaves = [x] if weight is None else [x, weight]
    wanted = torch.autograd.grad(out, leaves, grad)
    with torch.no_grad():
        made = _gate_math.pool_gate_backward(grad, x, weight, *tables, block=16, pools=pools)
        assert_exact(made[: len(leaves)], wanted)
        only_x = _gate_math.pool_gate_backward(
            grad, x, weight, *tables, block=16, pools=pools, need_weight=False
        )
    assert torch.equal(only_x[0], made[0]) and only_x[1] is None


def test_maximum_and_minimum_on_one_token_add_up():
    """A block of one token, and a constant one: first token, both shares, and its mean."""
    x = torch.ones(1, 9, 1, 1, dtype=torch.float64)
    grad = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).expand(1, 3, 1, 3)
    made = _gate_pooling.pool_blocks_backward(grad, x, 4, 7)
    assert made.flatten().tolist() == [36.0, 25, 25, 25, 36.0, 25, 25, 25, 111.0]


def test_shares_are_summed_before_rounding():
    x = torch.tensor([3.0, 1.0]).bfloat16().view(1, 2, 1, 1)
    grad = torch.tensor([1.0, 0.0, 2.0**-7]).view(1, 1, 1, 3)  # 1 + 2^-8 is a tie in bf16
    made = _gate_pooling.pool_blocks_backward(grad, x, 2, 7)
    assert made.dtype == torch.bfloat16
    assert made.flatten().tolist() == [float(torch.tensor(1 + 2.0**-8).bfloat16()), 2.0**-8]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("blocks", [(6, 6), (3, 9), (9, 3)])
def test_gate_scores_backward_is_the_oracle_s(causal, blocks, seed):
    q = draw(seed, 2, blocks[0], 6, 5).requires_grad_()
    k = draw(seed + 1, 2, blocks[1], 2, 5).requires_grad_()
    seen = reference.gate_visible(*blocks, causal)
    out = reference.gate_scores(q, k, scale=0.3, causal=causal).masked_fill(~seen, 0)
    grad = draw(seed + 2, *out.shape)
    wanted = torch.autograd.grad(out, (q, k), grad)
    with torch.no_grad():
        made = _gate_math.gate_scores_backward(grad, q, k, scale=0.3, causal=causal)
    assert_exact(made, wanted)


@pytest.mark.parametrize("rotary", [0, 4])
def test_norm_gradcheck(rotary, seed):
    y, weight = draw(seed, 1, 4, 2, 10), draw(seed + 1, 10)
    tables = rope_tables(4, rotary) if rotary else (None, None)
    torch.autograd.gradcheck(
        lambda y, w: _gate_math.norm_rotate(y, w, 1e-6, *tables),
        (y.requires_grad_(), weight.requires_grad_()),
    )


# ----------------------------------------------------------------------------- memory of a backward


@pytest.mark.parametrize(("pools", "share"), [(4, 0.55), (1, 0.65), (7, 0.75)])
def test_backward_writes_one_gradient(pools, share, seed):
    """bf16: beside the result, half the fp32 size, only block-sized tensors and no index of x."""
    x = draw(seed, 1, 8192, 4, 64).bfloat16()
    grad = draw(seed + 1, 1, 128, 4, 64 * pools.bit_count()).float()
    with PeakMemory() as memory:
        _gate_pooling.pool_blocks_backward(grad, x, 64, pools)
    assert memory.peak < share * x.numel() * 4


@pytest.mark.gpu
def test_backward_memory_on_cuda(seed):
    """64k tokens of 32 heads, the average alone: the gradient of x and nothing near its size."""
    x = torch.randn(1, 65536, 32, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    out = torch.ops.seer.pool_gate(x)
    grad = torch.randn_like(out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(out, x, grad)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.2 * x.numel() * 2


# ------------------------------------------------------------------------------------------ RMSNorm


def literal_embedding(x, weight, norm, tables, pools, eps):
    """float64: pooling and projection by the oracle, norm by definition, rotation by the oracle."""
    gate = reference.pool_gate(x, weight, pools=pools)
    if norm is not None:
        gate = gate / (gate.square().mean(-1, keepdim=True) + eps).sqrt() * norm
    # The oracle rotates the pooled values: blocks of one row hand over what is there.
    return reference.pool_gate(gate, None, *tables, block=1, pools=4)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("name", ["Qavg_Kmaxminavg", "Qmaxavg_Kmin"])
@pytest.mark.parametrize(
    "device, dtype",
    [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    + [pytest.param("cuda", dtype, marks=GPU) for dtype in (torch.float32, *DTYPES["cuda"])],
)
def test_a_gate_and_its_gradients(device, dtype, name, qk_norm, seed):
    """Scores and the gradients of every weight, norms included, against float64 autograd."""
    torch.manual_seed(seed)
    eps = 1e-2
    options = {"qk_norm": qk_norm, "norm_eps": eps, "init_std": 0.1}
    config = GateConfig(4, 2, 64, name=name, gate_dim=64, **options)
    gate = AttnGate(config).to(device, dtype)
    with torch.no_grad():
        for name, weight in gate.named_parameters():
            if "norm" in name:
                weight.normal_(1, 0.2)
    q, k, _ = inputs.qkv(
        "normal",
        rows_q=300,
        rows_kv=300,
        heads_q=4,
        heads_kv=2,
        head_dim=64,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    scores = gate(q, k)
    exact = {n: p.detach().double().requires_grad_() for n, p in gate.named_parameters()}
    tables = gate.rope_tables(torch.arange(300, device=device))
    pairs = ((q, "q", config.q_pools), (k, "k", config.k_pools))
    embeddings = [
        literal_embedding(
            x,
            exact.get(f"mask_linear_{side}.weight"),
            exact.get(f"attngate_{side}norm.weight"),
            tables,
            pools,
            eps,
        )
        for x, side, pools in pairs
    ]
    want = reference.gate_scores(*embeddings)
    seen = want > -torch.inf
    # Scores are of order 1; up to eight roundings to dtype on the way.
    tolerance = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        scores[seen].double(), want[seen], rtol=tolerance, atol=4 * tolerance
    )
    out = torch.randn(want.shape, generator=inputs.generator(seed), dtype=torch.float64).to(device)
    out = out.masked_fill(~seen, 0)
    grads = torch.autograd.grad(scores, gate.parameters(), out.float())
    wanted = torch.autograd.grad(want, exact.values(), out.masked_fill(~seen, 0))
    for (key, grad), other in zip(zip(exact, grads, strict=True), wanted, strict=True):
        error = (grad.double() - other).norm() / other.norm()
        assert grad.dtype == dtype and error < 2 * tolerance, f"{key}: {float(error):.2e}"


def test_norms_in_state_and_checkpoint(seed):
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16, qk_norm=True))
    names = ["mask_linear_k.weight", "attngate_qnorm.weight", "attngate_knorm.weight"]
    assert list(gate.state_dict()) == names
    assert all((gate.state_dict()[name] == 1).all() for name in names[1:])
    state = {name: draw(seed, *shape) for name, shape in gate.config.weight_shapes().items()}
    prefix = "model.layers.3.self_attn.attn_gate."
    gate.load_released_state_dict({prefix + name: x for name, x in state.items()}, layer=3)
    for name in names:
        assert torch.equal(gate.state_dict()[name], state[name].float())
    # The names of the first checkpoints.
    early = {name.replace("attngate_", "mask_"): x + 1 for name, x in state.items()}
    gate.load_released_state_dict(early)
    for name in names:
        assert torch.equal(gate.state_dict()[name], (state[name] + 1).float())
    with pytest.raises(KeyError, match=r"attngate_knorm.weight: expected a weight of shape"):
        gate.load_released_state_dict({key: state[key] for key in names[:2]})
    without = AttnGate(GateConfig(4, 2, 16, gate_dim=16))
    with pytest.raises(ValueError, match="decode gate of SeerAttention-R"):
        without.load_released_state_dict(state)
    decode = state | {"attngate_linear_q.weight": torch.zeros(2, 2, 16, 16)}
    with pytest.raises(ValueError, match="decode gate of SeerAttention-R"):
        gate.load_released_state_dict(decode)


def test_norm_epsilon_is_checked():
    for eps in (-1e-6, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"seer::AttnGate: norm_eps: expected .+, got"):
            GateConfig(4, 2, 16, qk_norm=True, norm_eps=eps)
