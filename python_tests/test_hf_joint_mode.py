# SPDX-License-Identifier: Apache-2.0
"""A model that trains beside its gates: gradients, freezing, the loss in chunks."""

import pytest
import torch
from hf_models import BLOCK, FAMILIES, SPARSE, make_model, padded, tokens

from seer_cuda.integrations import transformers as seer_hf
from seer_cuda.integrations.transformers import SeerConfig

pytest.importorskip("transformers")

from seer_cuda.integrations.transformers import _lm


def learner(mode, family="llama", **extra):
    model = make_model(family, **extra).train()
    seer_hf.attach(model, SeerConfig(mode, SPARSE, block=BLOCK))
    torch.manual_seed(1)
    for weight in seer_hf.gate_parameters(model):
        torch.nn.init.normal_(weight, std=0.3)
    return model


def grads(model):
    """Of the model's own weights, by name."""
    named = model.named_parameters()
    return {name: weight.grad for name, weight in named if "attn_gate" not in name}


def gate_grads(model):
    return [weight.grad for weight in seer_hf.gate_parameters(model)]


def apart(got, want):
    """Relative distance."""
    return float((got.double() - want).norm() / want.norm())


# ----------------------------------------------------------------------------------------- mode


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_model_s_gradients_are_those_of_its_own_loss(family, side):
    """Against the same model without gates, in float64 with transformers' own attention."""
    ids, mask, sequences = padded([90, 40], side)
    plain = make_model(family, attn_implementation="eager").train().double()
    losses = [plain(one[None], labels=one[None]).loss * (len(one) - 1) for one in sequences]
    want = sum(losses) / sum(len(one) - 1 for one in sequences)
    want.backward()
    # A sequence's first token follows padding or nothing.
    untold = (mask == 0) | (mask.cumsum(1) == 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    inputs["labels"] = ids.masked_fill(untold, -100)
    model = learner("joint", family)
    loss = model(**inputs).loss
    (loss + seer_hf.gate_loss(model)).backward()
    assert abs(loss.item() / want.item() - 1) < 1e-5
    expected = grads(plain)
    assert grads(model).keys() == expected.keys()
    for name, grad in grads(model).items():
        assert apart(grad, expected[name]) < 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_each_loss_reaches_its_own_weights_alone(family):
    """The gates learn as beside a frozen model; the model as without gates. Bit for bit."""
    ids = tokens(2, 90)
    both, alone, frozen = (learner(mode, family) for mode in ("joint", "joint", "distilling"))
    out = both(ids, labels=ids, use_cache=False)
    (out.loss + seer_hf.gate_loss(both)).backward()
    alone(ids, labels=ids, use_cache=False).loss.backward()
    assert all(grad is None for grad in gate_grads(alone))
    frozen(ids, use_cache=False)
    seer_hf.gate_loss(frozen).backward()
    assert all(grad is None for grad in grads(frozen).values())
    for name, grad in grads(both).items():
        assert torch.equal(grad, grads(alone)[name]), name
    for a, b in zip(gate_grads(both), gate_grads(frozen), strict=True):
        assert a.abs().sum() > 0 and torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_computed_twice_give_the_same_gradients(reentrant):
    ids, models = tokens(2, 90), []
    for checkpointing in (False, True):
        models.append(model := learner("joint"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        out = model(ids, labels=ids, use_cache=False)
        (out.loss + seer_hf.gate_loss(model)).backward()
    a, b = models
    assert all(torch.equal(grad, grads(b)[name]) for name, grad in grads(a).items())
    assert all(map(torch.equal, gate_grads(a), gate_grads(b)))


def test_modes_freeze_and_thaw():
    model = learner("joint")
    assert all(weight.requires_grad for weight in model.parameters())
    seer_hf.configure(model, mode="distilling")
    assert not any(w.requires_grad for n, w in model.named_parameters() if "attn_gate" not in n)
    seer_hf.configure(model, mode="joint")
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_in_chunks_is_transformers_own(tied, monkeypatch):
    monkeypatch.setattr(_lm, "_ROWS", 32)
    ids = tokens(2, 90)
    model = make_model("llama", tie_word_embeddings=tied).double()
    twin = make_model("llama", tie_word_embeddings=tied).double()
    most = []
    model.lm_head.register_forward_hook(lambda *a: most.append(a[2].shape[0]))
    # float32 in the end, as transformers has it.
    got, want = _lm.lm_loss(model, ids), twin(ids, labels=ids).loss
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=0)
    got.backward()
    want.backward()
    assert max(most) == 32 and len(most) == 2 * 6  # in backward again
    for name, grad in grads(model).items():
        assert apart(grad, grads(twin)[name]) < 1e-6, name


def test_autocast_trains_fp32_weights():
    """As on a GPU: fp32 weights, bf16 products, near the gradients of fp32."""
    ids, both = tokens(2, 90), []
    for enabled in (True, False):
        both.append(model := learner("joint"))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = _lm.lm_loss(model, ids)
        (loss + seer_hf.gate_loss(model)).backward()
    rounded, exact = both
    for name, grad in grads(rounded).items():
        assert grad.dtype == torch.float32 and apart(grad, grads(exact)[name].double()) < 0.1, name
