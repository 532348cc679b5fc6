# SPDX-License-Identifier: Apache-2.0
"""seer_cuda.distill: the targets and the loss of the two papers, element by element."""

import math

import inputs
import pytest
import torch
from torch.nn import functional as F

from seer_cuda import attn_pool, distill, reference


def pooled_map(per_token=False, rows=200, seed=0):
    q, k, v = inputs.qkv(
        "normal", rows_q=rows, rows_kv=rows, batch=2, heads_q=4, heads_kv=2, head_dim=16, seed=seed
    )
    return attn_pool(q, k, v, per_token=per_token)[2]


def test_prefill_target_is_row_normalised(seed):
    pooled = pooled_map(seed=seed)
    target = distill.target_prefill(pooled)
    assert target.dtype == torch.float32 and target.shape == pooled.shape
    torch.testing.assert_close(target.sum(-1), torch.ones(2, 4, 4))
    want = pooled.double() / pooled.double().sum(-1, keepdim=True)
    torch.testing.assert_close(target.double(), want, rtol=1e-6, atol=1e-7)


def test_prefill_target_of_an_empty_row_is_zero():
    pooled = torch.rand(1, 1, 3, 4)
    pooled[0, 0, 1] = 0
    target = distill.target_prefill(pooled)
    assert (target[0, 0, 1] == 0).all() and target.isfinite().all()


@pytest.mark.parametrize("eps", [1e-9, 1e-3])
def test_decode_target(eps, seed):
    """Maximum over the group, blocks before the token's own, divided by the sum + eps."""
    pooled = pooled_map(per_token=True, seed=seed)
    target = distill.target_decode(pooled, 2, 64, eps=eps)
    assert target.shape == (2, 2, 200, 4)
    for b, u, r in ((0, 0, 0), (0, 1, 63), (1, 0, 64), (1, 1, 150), (0, 0, 199)):
        row = pooled[b, 2 * u : 2 * u + 2, r].double().amax(0)
        row[r // 64 :] = 0
        want = row / (row.sum() + eps)
        torch.testing.assert_close(target[b, u, r].double(), want, rtol=1e-5, atol=1e-7)
    assert (target[:, :, :64] == 0).all()


def test_decode_target_of_packed_sequences(seed):
    lengths = [100, 70]
    case = inputs.varlen("normal", lengths, lengths, heads_q=4, heads_kv=2, head_dim=16, seed=seed)
    pooled = attn_pool(**case, per_token=True)[2]
    positions = torch.cat([torch.arange(n) for n in lengths])
    target = distill.target_decode(pooled, 2, 64, positions)
    assert target.shape == (2, 170, 2)
    assert (target[:, :64] == 0).all() and (target[:, 100:164] == 0).all()
    torch.testing.assert_close(target[:, 64:100, 0], torch.ones(2, 36))


def test_decode_target_refuses_a_wrong_group():
    with pytest.raises(ValueError, match=r"seer::target_decode: group: expected .+, got 3"):
        distill.target_decode(torch.rand(1, 4, 3, 2), 3, 64)


def test_decode_target_refuses_what_does_not_fit():
    pooled = torch.rand(2, 4, 3, 2)
    for shape in ((), (1,), (2,), (3, 2), (3, 3), (2, 1, 3)):
        with pytest.raises(ValueError, match=r"positions: expected \[3\] or \[2, 3\], got \["):
            distill.target_decode(pooled, 2, 64, torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"positions: expected \[3\], got \[4, 3\]"):
        distill.target_decode(pooled[0], 2, 64, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"seer::target_decode: block: expected .+, got 0"):
        distill.target_decode(pooled, 2, 0)
    each = torch.tensor([[0, 64, 128], [64, 0, 0]])
    assert distill.target_decode(pooled, 2, 64, each).shape == (2, 2, 3, 2)


@pytest.mark.parametrize("kind", ["prefill", "decode", "mse"])
@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (1, 0, 4, 4), (1, 2, 4, 0)])
def test_a_loss_of_nothing_is_zero(kind, shape):
    scores = torch.rand(shape, requires_grad=True)
    loss = distill.gate_loss(scores, torch.rand(shape), kind=kind)
    loss.backward()
    assert loss.item() == 0 and scores.grad.shape == shape


def literal_loss(scores, target, drop, *, per_row=False):
    """10 * mean over elements (or sum per row) of target (ln target - log_softmax(scores))."""
    scores, target = scores[..., drop:, :].double(), target[..., drop:, :].double()
    total = 0.0
    for s, t in zip(scores.flatten(0, -2), target.flatten(0, -2), strict=True):
        logp = s - s[s > -math.inf].logsumexp(0) if (s > -math.inf).any() else s
        for x, y in zip(t.tolist(), logp.tolist(), strict=True):
            if x > 0 and y > -math.inf:
                total += x * (math.log(x) - y)
    rows = scores.flatten(0, -2).shape[0]
    return 10.0 * total / (rows if per_row else scores.numel())


@pytest.mark.parametrize("kind", ["prefill", "decode", "mse"])
def test_nan_scores_show_in_the_loss(kind, seed):
    """NaN in a row that is left out does not, of one sequence or of packed ones."""
    scores, target = training_pair(seed)
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
    for row, finite in ((0, kind != "mse"), (6, False)):
        bad = scores.clone()
        bad[0, 1, row, 0] = torch.nan
        assert distill.gate_loss(bad, target, kind=kind).isfinite() == finite
        packed = distill.gate_loss(bad[0], target[0], kind=kind, cu_seqlens=cu_seqlens)
        assert packed.isfinite() == finite


def training_pair(seed, blocks=8):
    gen = inputs.generator(seed)
    scores = torch.randn(1, 2, blocks, blocks, generator=gen)
    seen = reference.gate_visible(blocks, blocks, True)
    scores = scores.masked_fill(~seen, -math.inf)
    pooled = torch.rand(scores.shape, generator=gen) * seen
    return scores, distill.target_prefill(pooled)


def test_prefill_loss(seed):
    scores, target = training_pair(seed)
    loss = distill.gate_loss(scores, target)
    assert float(loss) == pytest.approx(literal_loss(scores, target, 2), rel=1e-5)
    floor = scores.masked_fill(scores.isinf(), -1e30).log_softmax(-1)
    total = F.kl_div(floor[:, :, 2:], target[:, :, 2:], reduction="sum")
    torch_loss = 10 * total / target[:, :, 2:].numel()
    assert float(loss) == pytest.approx(float(torch_loss), rel=1e-5)


def test_row_mean_and_scale(seed):
    scores, target = training_pair(seed)
    loss = distill.gate_loss(scores, target, reduction="row_mean", drop_rows=0, loss_scale=1.0)
    want = literal_loss(scores, target, 0, per_row=True) / 10
    assert float(loss) == pytest.approx(want, rel=1e-5)


def test_decode_loss_drops_the_first_half(seed):
    scores, target = training_pair(seed)
    loss = distill.gate_loss(scores, target, kind="decode")
    assert float(loss) == pytest.approx(literal_loss(scores, target, 4), rel=1e-5)


def packed_pair(lengths, blocks, seed):
    """Scores and target ``[2, total, blocks]``, and each sequence's rows."""
    gen = inputs.generator(seed)
    total = sum(lengths)
    scores = torch.randn(2, total, blocks, generator=gen)
    target = distill.target_prefill(torch.rand(2, total, blocks, generator=gen))
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    return scores, target, [slice(e - n, e) for n, e in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize("lengths", [[7, 4, 1], [5, 0, 6], [8]])
@pytest.mark.parametrize("kind", ["decode", "prefill", "mse"])
@pytest.mark.parametrize("reduction", ["element_mean", "row_mean"])
def test_packed_loss_is_the_mean_over_sequences(lengths, kind, reduction, seed):
    """Each sequence loses its own leading rows; rows of no sequence count nowhere."""
    scores, target, spans = packed_pair(lengths, 3, seed)
    options = {"kind": kind, "reduction": reduction}
    alone = [
        distill.gate_loss(scores[None, :, at], target[None, :, at], **options)
        for at in spans
        if at.start < at.stop
    ]
    stray = torch.full((2, 2, 3), math.nan)
    scores = torch.cat([scores, stray], 1).requires_grad_()
    target = torch.cat([target, stray], 1)
    cu = inputs.packed(lengths)
    loss = distill.gate_loss(scores, target, cu_seqlens=cu, **options)
    torch.testing.assert_close(loss, torch.stack(alone).mean(), rtol=1e-5, atol=1e-7)
    loss.backward()
    assert scores.grad.isfinite().all() and (scores.grad[:, -2:] == 0).all()


def test_packed_loss_with_given_rows(seed):
    """A sequence that loses all its rows does not count in the mean."""
    scores, target, spans = packed_pair([7, 2, 4], 3, seed)
    alone = [
        distill.gate_loss(scores[None, :, at], target[None, :, at], drop_rows=3)
        for at in (spans[0], spans[2])
    ]
    cu = inputs.packed([7, 2, 4])
    loss = distill.gate_loss(scores, target, drop_rows=3, cu_seqlens=cu)
    torch.testing.assert_close(loss, torch.stack(alone).mean())


def test_packed_loss_refuses(seed):
    scores, target, _ = packed_pair([7, 4], 3, seed)
    cu = inputs.packed([7, 4])
    form = r"seer::gate_loss: .+: expected .+, got .+"
    for x, wrong in (
        (scores, {"kind": "decode"}),
        (scores[None], {"cu_seqlens": cu}),
        (scores, {"cu_seqlens": cu.float()}),
        (scores, {"cu_seqlens": cu[:1]}),
        (scores, {"cu_seqlens": cu, "drop_rows": -1}),
        (scores[:, :0], {}),
    ):
        with pytest.raises(ValueError, match=form):
            distill.gate_loss(x, target.expand_as(x) if x.shape[-2] else x, **wrong)


def test_loss_is_zero_for_a_perfect_gate(seed):
    _, target = training_pair(seed)
    assert float(distill.gate_loss(target.log(), target)) == pytest.approx(0.0, abs=1e-6)


def test_loss_gradient_is_softmax_minus_target(seed):
    scores, target = training_pair(seed)
    scores.requires_grad_()
    distill.gate_loss(scores, target).backward()
    want = 10 * (scores.detach().double().softmax(-1) - target.double()) / scores[:, :, 2:].numel()
    want[:, :, :2] = 0
    torch.testing.assert_close(scores.grad.double(), want, rtol=1e-4, atol=1e-7)


def test_loss_stays_finite(seed):
    """Rows that see nothing, rows with an empty target, logits of a thousand."""
    scores, target = training_pair(seed)
    scores[:, :, 5] = -math.inf
    target[:, :, 6] = 0
    scores[:, :, 7, 0] = 1e4
    scores.requires_grad_()
    loss = distill.gate_loss(scores, target)
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


def test_targets_carry_no_gradient(seed):
    pooled = pooled_map(seed=seed).requires_grad_()
    assert not distill.target_prefill(pooled).requires_grad
    assert not distill.target_decode(pooled, 2, 64).requires_grad


def test_loss_refuses():
    scores = torch.zeros(1, 1, 4, 4)
    for wrong in ({"kind": "kl"}, {"reduction": "sum"}, {"drop_rows": 4}):
        with pytest.raises(ValueError, match=r"seer::gate_loss: .+: expected .+, got .+"):
            distill.gate_loss(scores, scores, **wrong)
    with pytest.raises(ValueError, match=r"seer::gate_loss: target: expected .+, got .+"):
        distill.gate_loss(scores, scores[..., :3])
