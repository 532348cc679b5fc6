# SPDX-License-Identifier: Apache-2.0
"""Gates of transformers models: their loss, their gradients, real sizes on CUDA."""

import pytest
import torch
from hf_models import (
    BLOCK,
    FAMILIES,
    FORM,
    distilling,
    make_model,
    padded,
    places,
    released,
    tokens,
)

from seer_cuda import AttnGate, Rule, distill, reference
from seer_cuda.integrations import transformers as seer_hf

pytest.importorskip("transformers")


def layer_tensors(model, ids):
    """q, k before RoPE and q, k, v of every layer, seen from outside the integration."""
    seen, handles = [], []

    def before(module, args, kwargs):
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        q, k, v = (
            getattr(module, f"{name}_proj")(hidden).unflatten(-1, (-1, module.head_dim))
            for name in "qkv"
        )
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        turned = []
        for x in (q, k):
            a, b = x.chunk(2, -1)
            turned.append(x * cos[:, :, None] + torch.cat([-b, a], -1) * sin[:, :, None])
        seen.append((q, k, *turned, v))

    for layer in model.model.layers:
        handles.append(layer.self_attn.register_forward_pre_hook(before, with_kwargs=True))
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_recipe_s(family):
    """Sum over layers of KL(row-normalised oracle map || softmax of scores), and its gradient."""
    model = distilling(family)
    ids = tokens(2, 90)
    layers = layer_tensors(make_model(family), ids)
    out = model(ids, use_cache=False).logits
    loss = seer_hf.gate_loss(model)
    (3 * loss).backward()
    want, twins = 0, []
    for gate, (q, k, *rotated) in zip(seer_hf.gates(model), layers, strict=True):
        pooled = reference.attn_pool(*(x.double() for x in rotated), block_q=BLOCK, block_kv=BLOCK)
        twin = AttnGate(gate.config, gate.inv_freq)
        twin.load_state_dict(gate.state_dict())
        want = want + distill.gate_loss(twin(q, k), distill.target_prefill(pooled[2].float()))
        twins.append(twin)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    (3 * want).backward()
    for gate, twin in zip(seer_hf.gates(model), twins, strict=True):
        grad, expected = gate.mask_linear_k.weight.grad, twin.mask_linear_k.weight.grad
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(out, make_model(family)(ids).logits, rtol=1e-4, atol=1e-4)


def test_only_gates_train_and_the_model_thaws():
    model = distilling()
    own = {id(weight) for weight in seer_hf.gate_parameters(model)}
    assert {id(w) for w in model.parameters() if w.requires_grad} == own
    seer_hf.configure(model, mode="sparse")
    assert all(weight.requires_grad for weight in model.parameters())


def test_training_lowers_the_loss():
    model = distilling(layers=1)
    ids = tokens(2, 90)
    optimiser = torch.optim.AdamW(seer_hf.gate_parameters(model), lr=1e-2)
    losses = []
    for _ in range(20):
        model(ids, use_cache=False)
        loss = seer_hf.gate_loss(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("input_grads", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, input_grads):
    """Even with inputs that require gradients, as trainers set them for adapters."""
    grads = []
    ids = tokens(2, 90)
    for checkpointing in (False, True):
        model = distilling()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if input_grads:
            model.enable_input_require_grads()
        out = model(ids, use_cache=False).logits
        loss = seer_hf.gate_loss(model)
        (loss + (out.sum() * 0 if input_grads else 0)).backward()
        grads.append([weight.grad for weight in seer_hf.gate_parameters(model)])
        # The recomputation in backward leaves nothing behind.
        with pytest.raises(ValueError, match="a call in distilling or joint mode"):
            seer_hf.gate_loss(model)
        model(ids, use_cache=False)
        again = seer_hf.gate_loss(model)
        torch.testing.assert_close(again, loss)
    for a, b in zip(*grads, strict=True):
        assert a.abs().sum() > 0 and torch.equal(a, b)


@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_sequences_count_the_same_each(side):
    model = distilling(train=False)
    ids, mask, sequences = padded([90, 40], "left" if side == "packed" else side)
    with torch.no_grad():
        if side == "packed":
            positions = torch.cat([torch.arange(90), torch.arange(40)])[None]
            out = model(torch.cat(sequences)[None], position_ids=positions, use_cache=False).logits
            parts = out[0].split([90, 40])
        else:
            out = model(ids, attention_mask=mask, use_cache=False).logits
            parts = [out[row, at] for row, at in enumerate(places(mask))]
        got, alone = seer_hf.gate_loss(model), []
        for part, sequence in zip(parts, sequences, strict=True):
            want = model(sequence[None], use_cache=False).logits[0]
            torch.testing.assert_close(part, want, rtol=1e-4, atol=1e-4)
            alone.append(seer_hf.gate_loss(model))
    torch.testing.assert_close(got, torch.stack(alone).mean(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=FORM):
        seer_hf.gate_loss(model)


def test_evaluation_makes_no_gradients(monkeypatch):
    model = distilling(train=False)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        model(tokens(1, 40), use_cache=False)
    assert not seer_hf.gate_loss(model).requires_grad


def test_distilling_still_generates():
    model = distilling(train=False)
    ids = tokens(1, 40)
    got = model.generate(ids, max_new_tokens=4, do_sample=False)
    want = make_model("llama").generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, want)


# ----------------------------------------------------------------------------------------- CUDA


def apart(got, want):
    """Relative distance."""
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_real_head_counts_on_cuda(family, tmp_path):
    """One layer with real heads, a released adapter, bf16: every mode, padding, decode."""
    heads = {"llama": (32, 8), "qwen2": (28, 4), "qwen3": (32, 8)}[family]
    model = make_model(family, layers=1, heads=heads, head_dim=128).to("cuda", torch.bfloat16)
    folder, weights = released(tmp_path, layers=1, heads=heads[0], dim=128)
    ids, mask, sequences = padded([1500, 700], "left")
    ids, mask, kept = ids.cuda(), mask.cuda(), mask.cuda() == 1
    with torch.no_grad():
        dense = model(ids, attention_mask=mask).logits
        seer_hf.load_gates(model, folder)
        assert torch.equal(seer_hf.gates(model)[0].mask_linear_k.weight.cpu(), weights.popitem()[1])
        seer_hf.configure(model, rule=Rule("density", 1.0))
        assert apart(model(ids, attention_mask=mask).logits[kept], dense[kept]) < 0.01
        seer_hf.configure(model, rule=Rule("density", 0.2, local=1))
        sparse = model(ids, attention_mask=mask).logits
        assert apart(sparse[kept], dense[kept]) > 0.1
        # The same bits whatever the padding holds; alone, GEMMs of another shape round otherwise,
        # which moves a block near the rule's boundary in few rows.
        other = model(torch.where(kept, ids, 55), attention_mask=mask).logits
        assert torch.equal(other[kept], sparse[kept])
        for row, sequence in enumerate(sequences):
            alone = model(sequence[None].cuda()).logits[0]
            error = (sparse[row, -len(sequence) :] - alone).float().norm(dim=-1)
            assert (error < 0.05 * alone.float().norm(dim=-1)).float().mean() > 0.9
        out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        assert out.shape == (2, 1504)
        seer_hf.configure(model, mode="distilling")
        distilled = model(ids, attention_mask=mask, use_cache=False).logits
        assert apart(distilled[kept], dense[kept]) < 0.01
        assert seer_hf.gate_loss(model).isfinite()
    model.train()
    model(ids, attention_mask=mask, use_cache=False)
    seer_hf.gate_loss(model).backward()
    assert seer_hf.gates(model)[0].mask_linear_k.weight.grad.abs().sum() > 0
