# SPDX-License-Identifier: Apache-2.0
"""seer_cuda.distill.gate_kl: the fused distillation loss against its plain composition."""

import math
import weakref

import inputs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seer_cuda import AttnGate, GateConfig, _gate_kl, attn_pool, distill, reference

FORM = r"seer::gate_kl: .+: expected .+, got .+"


def embeddings(blocks, *, batch=2, heads=(4, 2), width=16, dtype=torch.float32, device="cpu", seed):
    """q_gate, k_gate and a pooled map whose columns above the diagonal are 0."""
    gen = inputs.generator(seed)
    blocks_q, blocks_kv = blocks
    q = torch.randn(batch, blocks_q, heads[0], width, generator=gen)
    k = torch.randn(batch, blocks_kv, heads[1], width, generator=gen)
    pooled = torch.rand(batch, heads[0], blocks_q, blocks_kv, generator=gen)
    pooled = pooled * reference.gate_visible(blocks_q, blocks_kv, True)
    return q.to(device, dtype), k.to(device, dtype), pooled.to(device)


def plain_loss(q, k, pooled, *, drop, causal=True, per_row=False, scale=10.0):
    """float64, from the oracle's scores: mean over the kept rows of T (ln T - log_softmax)."""
    scores = reference.gate_scores(q, k, causal=causal)[:, :, drop:]
    target = pooled.double()[:, :, drop:].masked_fill(scores == -math.inf, 0)
    mass = target.sum(-1, keepdim=True)
    target = target / mass.masked_fill(mass == 0, 1)
    log_prob = scores.masked_fill(scores == -math.inf, -1e30).log_softmax(-1)
    terms = torch.xlogy(target, target) - target * log_prob
    count = terms[..., 0].numel() if per_row else terms.numel()
    return scale * terms.sum() / count


def grads_of(loss, tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("blocks", [(9, 9), (5, 20), (20, 3), (1, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_equals_the_composition(device, dtype, blocks, causal, heads, seed):
    q, k, pooled = embeddings(blocks, heads=heads, dtype=dtype, device=device, seed=seed)
    drop = blocks[0] // 4
    value, grads = grads_of(lambda q, k: distill.gate_kl(q, k, pooled, causal=causal), (q, k))
    want, wanted = grads_of(
        lambda q, k: plain_loss(q, k, pooled, drop=drop, causal=causal), (q.double(), k.double())
    )
    exact = dtype == torch.float64
    assert value.dtype == (torch.float64 if exact else torch.float32)
    rtol, atol = (1e-12, 1e-12) if exact else (1e-5, 1e-6)
    # The map is fp32, so a float64 gate still agrees with the oracle to float64.
    torch.testing.assert_close(value.double(), want, rtol=rtol, atol=atol)
    for grad, other in zip(grads, wanted, strict=True):
        assert grad.dtype == dtype
        rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 10 * rtol
        torch.testing.assert_close(grad.double(), other, rtol=rounding, atol=atol)


def test_equals_gate_loss(device, seed):
    """The two public ways to the same number, options included."""
    q, k, pooled = embeddings((13, 13), device=device, seed=seed)
    for options in ({}, {"reduction": "row_mean"}, {"drop_rows": 0}, {"loss_scale": 1.0}):
        value, grads = grads_of(
            lambda q, k, options=options: distill.gate_kl(q, k, pooled, **options), (q, k)
        )
        want, wanted = grads_of(
            lambda q, k, options=options: distill.gate_loss(
                torch.ops.seer.gate_scores(q, k), distill.target_prefill(pooled), **options
            ),
            (q, k),
        )
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
        for grad, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal, seed):
    q, k, pooled = embeddings((6, 8), batch=1, width=5, dtype=torch.float64, seed=seed)
    torch.autograd.gradcheck(
        lambda q, k: distill.gate_kl(q, k, pooled, causal=causal, drop_rows=1),
        (q.requires_grad_(), k.requires_grad_()),
    )


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_chunks_do_not_matter(chunk_rows, seed):
    q, k, pooled = embeddings((11, 14), dtype=torch.float64, seed=seed)
    whole = _gate_kl.gate_kl(q, k, pooled, first_row=2)
    parts = _gate_kl.gate_kl(q, k, pooled, first_row=2, chunk_rows=chunk_rows)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_first_quarter_of_the_rows_does_not_count(seed):
    q, k, pooled = embeddings((12, 12), seed=seed)
    _, (grad_q, _) = grads_of(lambda q, k: distill.gate_kl(q, k, pooled), (q, k))
    assert (grad_q[:, :3] == 0).all() and (grad_q[:, 3:] != 0).any((0, 2, 3)).all()
    other = pooled.clone()
    other[:, :, :3] = torch.nan
    assert torch.equal(distill.gate_kl(q, k, pooled), distill.gate_kl(q, k, other))


def test_stays_finite(seed):
    """Rows with an empty target, rows that see nothing, logits of thousands."""
    q, k, pooled = embeddings((20, 3), seed=seed)
    pooled[:, :, 18] = 0
    value, grads = grads_of(lambda q, k: distill.gate_kl(100 * q, k, pooled), (q, k))
    assert value.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :17] == 0).all() and (grads[0][:, 18] == 0).all()
    assert (grads[0][:, 19] != 0).any()


def test_nan_scores_show_in_the_loss(device, seed):
    """As they do in the gradients; NaN in a row that does not count stays out of both."""
    q, k, pooled = embeddings((12, 12), device=device, seed=seed)
    for row, finite in ((2, True), (7, False)):
        bad = q.clone()
        bad[0, row, 1, 3] = torch.nan
        value, (grad_q, grad_k) = grads_of(lambda q, k: distill.gate_kl(q, k, pooled), (bad, k))
        assert value.isfinite() == finite and grad_q.isfinite().all() == finite
        assert grad_k.isfinite().all() == finite
        scores = torch.ops.seer.gate_scores(bad, k)
        loss = distill.gate_loss(scores, distill.target_prefill(pooled))
        assert loss.isfinite() == finite


def test_what_needs_no_gradient_gets_none(seed):
    q, k, pooled = embeddings((9, 9), seed=seed)
    assert not distill.gate_kl(q, k, pooled.requires_grad_()).requires_grad
    loss = distill.gate_kl(q, k.requires_grad_(), pooled)
    loss.backward()
    assert k.grad is not None and q.grad is None and pooled.grad is None
    q.requires_grad_()
    (grad,) = torch.autograd.grad(distill.gate_kl(q, k, pooled), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


def test_is_deterministic(device, seed):
    q, k, pooled = embeddings((40, 40), dtype=torch.bfloat16, device=device, seed=seed)
    runs = [grads_of(lambda q, k: distill.gate_kl(q, k, pooled), (q, k)) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_trains_a_gate(seed):
    """From the map of real attention: the loss falls, and an ideal gate would have none."""
    torch.manual_seed(seed)
    q, k, v = inputs.qkv(
        "normal", rows_q=1000, rows_kv=1000, heads_q=4, heads_kv=2, head_dim=16, seed=seed
    )
    pooled = attn_pool(q, k, v)[2]
    gate = AttnGate(GateConfig(4, 2, 16, gate_dim=16))
    optimiser = torch.optim.AdamW(gate.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = distill.gate_kl(*gate.embed(q, k), pooled)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and losses[-1] > 0


def test_compiles(seed):
    torch._dynamo.reset()
    q, k, pooled = embeddings((9, 9), seed=seed)
    q.requires_grad_()

    def loss(q, k, pooled):
        return distill.gate_kl(q, k, pooled)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (want,) = torch.autograd.grad(loss(q, k, pooled), q)
    (grad,) = torch.autograd.grad(compiled(q, k, pooled), q)
    assert torch.equal(grad, want)
    torch.library.opcheck(
        torch.ops.seer._gate_kl.default,
        (q.detach(), k, pooled),
        {"scale": None, "causal": True, "first_row": 2, "need_grad": True},
    )


def test_refuses(seed):
    q, k, pooled = embeddings((9, 9), seed=seed)
    wrong = (
        ((q, k, pooled[..., :8]), {}),
        ((q, k, pooled[:, :2]), {}),
        ((q[0], k, pooled), {}),
        ((q, k, pooled), {"reduction": "sum"}),
        ((q, k, pooled), {"drop_rows": 9}),
        ((q, k, pooled), {"drop_rows": -1}),
    )
    for args, options in wrong:
        with pytest.raises(ValueError, match=FORM):
            distill.gate_kl(*args, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refuses_embeddings_that_do_not_fit(dtype, seed):
    """In float64 too, which no op looks at."""
    q, k, pooled = embeddings((9, 9), heads=(4, 2), dtype=dtype, seed=seed)
    wrong = {
        "heads": k[:, :, [0, 1, 1]],
        "no heads": k[:, :, :0],
        "batch": k[:1],
        "gate_dim": k[..., :8],
        "dtype": k.half(),
        "device": k.to("meta"),
    }
    for name, other in wrong.items():
        with pytest.raises(ValueError, match=r"seer::gate_kl: k_gate: expected .+, got .+"):
            pytest.fail(f"{name}: {distill.gate_kl(q, other, pooled)}")


def test_a_map_on_meta_is_not_taken_for_a_call_without_data(seed):
    q, k, pooled = embeddings((9, 9), seed=seed)
    with pytest.raises(ValueError, match=r"seer::gate_kl: pooled: expected .+, got meta"):
        distill.gate_kl(q, k, pooled.to("meta"))
    options = {"scale": None, "causal": True, "first_row": 0, "need_grad": False}
    with pytest.raises(RuntimeError, match=r"seer::_gate_kl: pooled: expected .+, got meta"):
        torch.ops.seer._gate_kl(q, k, pooled.to("meta"), **options)


class PeakMemory(TorchDispatchMode):
    """Most bytes that tensors made under it held at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def _free(self, pointer, size):
        self.seen.discard(pointer)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {
            x.untyped_storage().data_ptr()
            for x in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            pointer = storage.data_ptr()
            if pointer in before or pointer in self.seen or not storage.nbytes():
                continue
            self.seen.add(pointer)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, pointer, storage.nbytes())
        return result


def test_peak_memory_counts():
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        del a
        c = b * 2
        del b, c
    assert memory.peak == 8000 and memory.live == 0


def test_needs_less_than_one_score_matrix(monkeypatch, seed):
    """Everything that exists beside the arguments, the gradients included."""
    q, k, pooled = embeddings((512, 512), batch=1, heads=(8, 2), dtype=torch.bfloat16, seed=seed)
    monkeypatch.setattr(_gate_kl, "_CHUNK_ELEMENTS", 16 * 8 * 512)
    with PeakMemory() as memory:
        _gate_kl.gate_kl(q, k, pooled, first_row=128)
    matrix = pooled.numel() * 4
    assert memory.peak < 0.3 * matrix
    with PeakMemory() as plain:
        scores = torch.ops.seer.gate_scores(q, k)
        distill.gate_loss(scores, distill.target_prefill(pooled))
    assert plain.peak > 3 * matrix  # what the fused loss is for, and that the count works


@pytest.mark.gpu
def test_memory_at_64k_tokens(seed):
    """Forward and backward of one layer of an 8B model: less than one score matrix of 128 MiB."""
    q, k, pooled = embeddings(
        (1024, 1024),
        batch=1,
        heads=(32, 32),
        width=128,
        dtype=torch.bfloat16,
        device="cuda",
        seed=seed,
    )
    q.requires_grad_(), k.requires_grad_()
    distill.gate_kl(q, k, pooled).backward()  # cuBLAS takes its workspace once
    q.grad = k.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    distill.gate_kl(q, k, pooled).backward()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    print(f"gate_kl at 64k tokens: {used / 2**20:.0f} MiB beside its arguments")
    assert used < pooled.numel() * 4
