# SPDX-License-Identifier: Apache-2.0
"""Adaptive rules of a study against plain definitions in float64, and their calibration."""

import pytest
import torch
from hf_models import attached, tokens

pytest.importorskip("transformers")

from seer_cuda.integrations.transformers import _adaptive, _choices, _study

N = 11


def drawn(seed, logits):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn((1, 3, N, N), generator=generator)
    return scores if logits else scores.exp()


def defined_shares(scores, logits):
    visible = torch.ones(N, N, dtype=torch.bool).tril()
    masses = scores.double().exp() if logits else scores.double()
    masses = masses * visible
    return masses / masses.sum(-1, keepdim=True)


@pytest.mark.parametrize("logits", [True, False])
def test_shares_of_a_row(logits):
    scores = drawn(0, logits)
    own = _adaptive.shares(scores, logits)
    torch.testing.assert_close(own.double(), defined_shares(scores, logits), rtol=1e-5, atol=1e-7)


def test_a_row_without_mass_keeps_its_diagonal():
    own = _adaptive.shares(torch.zeros(1, 1, N, N), logits=False)
    assert torch.equal(own, torch.zeros(1, 1, N, N))
    for rule in _adaptive.RULES:
        kept = _adaptive.keep(_adaptive.strengths(rule, own), 1e-9, 16 * N, 16).to_dense()
        assert torch.equal(kept[0, 0], torch.eye(N, dtype=torch.bool))


@pytest.mark.parametrize("mass", [0.3, 0.8, 0.99])
def test_top_p_is_the_smallest_set_with_the_mass(mass):
    scores = drawn(1, True)
    own = _adaptive.strengths("topp", _adaptive.shares(scores, True))
    kept = _adaptive.keep(own, 1 - mass, 16 * N, 16).to_dense()
    shares = defined_shares(scores, True)
    for head in range(3):
        for row in range(N):
            order = shares[0, head, row].argsort(descending=True).tolist()
            wanted, have = {row}, 0.0
            for block in order:
                if have >= mass:
                    break
                wanted.add(block)
                have += shares[0, head, row, block].item()
            assert set(kept[0, head, row].nonzero().flatten().tolist()) == wanted


def test_threshold_keeps_shares_of_at_least_its_value():
    scores = drawn(2, False)
    own = _adaptive.strengths("threshold", _adaptive.shares(scores, False))
    kept = _adaptive.keep(own, 0.1, 16 * N, 16).to_dense()
    diagonal = torch.eye(N, dtype=torch.bool)
    assert torch.equal(kept, (defined_shares(scores, False) >= 0.1) | diagonal)


@pytest.mark.parametrize("rule", _adaptive.RULES)
@pytest.mark.parametrize("density", [0.9, 0.5, 0.3])
def test_a_tally_finds_the_number_of_a_mean_density(rule, density):
    tally, maps = _adaptive.Tally(), []
    for seed in range(40):
        own = _adaptive.strengths(rule, _adaptive.shares(drawn(seed, True), True))
        tally.add(own)
        maps.append(own)
    value = tally.value(density)
    kept = torch.stack(
        [_adaptive.keep(own, value, 16 * N, 16).density().mean() for own in maps]
    ).mean()
    # At most what was asked, by no more than what lies within one bin.
    assert density - 0.01 < kept <= density + 1e-6


def test_densities_that_cannot_be_had():
    tally = _adaptive.Tally()
    with pytest.raises(ValueError, match="expected windows, got none"):
        tally.value(0.5)
    own = _adaptive.strengths("threshold", _adaptive.shares(drawn(0, True), True))
    tally.add(own)
    whole = _adaptive.keep(own, tally.value(1.0), 16 * N, 16)
    assert torch.equal(whole.density(), torch.ones_like(whole.density()))
    least = _adaptive.keep(own, tally.value(1e-3), 16 * N, 16).to_dense()
    assert torch.equal(least, torch.eye(N, dtype=torch.bool).expand_as(least))


def test_a_calibrated_model_keeps_what_was_asked():
    """On the windows of the calibration themselves, by the dense model's activations."""
    model = attached("llama", mode="dense")
    windows = [tokens(1, 149 * 3 + seed, seed=seed)[0] for seed in range(3)]
    found = _study.calibrate(model, windows, (0.6, 0.35))
    assert len(found) == 2 * 2 * len(_choices.ADAPTIVE)
    for one in found:
        counts = []

        def look(prompt, one=one, counts=counts):
            mask = _choices.choose(one, prompt)
            blocks = mask.blocks_q
            counts.append((mask.to_dense().sum().item(), mask.heads * blocks * (blocks + 1) // 2))

        for window in windows:
            with _study.choosing(model, look):
                _study._losses(model, window)
        kept, visible = (sum(column) for column in zip(*counts, strict=True))
        assert one.target - 0.05 < kept / visible <= one.target + 1e-3, one


def test_points_have_the_density_of_the_sparse_model():
    model = attached("llama", mode="dense")
    window = tokens(1, 445, seed=5)[0]
    wanted = _study.calibrate(model, [window], (0.4,), ("learned gate", "random"))
    points = _study.measure(model, window, wanted, window=1)
    assert [(point.rule, point.target) for point in points[1:]] == [
        ("threshold", 0.4),
        ("topp", 0.4),
    ]
    for one, point in zip(wanted, points[1:], strict=True):
        densities = []

        def choose(prompt, one=one, densities=densities):
            mask = _choices.choose(one, prompt, 1)
            densities.append(mask.density().mean().item())
            return mask

        with _study.choosing(model, choose):
            loss = _study._losses(model, window).double().mean().item()
        assert point.loss == pytest.approx(loss, rel=1e-6)
        assert point.kept == pytest.approx(sum(densities) / len(densities), abs=1e-6)
        assert 0 < point.mass <= 1 and point.recall is None
