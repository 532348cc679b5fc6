# SPDX-License-Identifier: Apache-2.0
"""Gates of transformers models: training them, and their files."""

import json

import pytest
import torch
from hf_models import BLOCK, FAMILIES, FORM, SPARSE, make_model, padded, places, tokens

from seer_cuda import AttnGate, Rule, distill, reference
from seer_cuda.integrations import transformers as seer_hf
from seer_cuda.integrations.transformers import SeerConfig

pytest.importorskip("transformers")


def distilling(family="llama", *, seed=0, train=True, **extra):
    model = make_model(family, seed=seed, **extra).train(train)
    seer_hf.attach(model, SeerConfig("distilling", SPARSE, block=BLOCK))
    torch.manual_seed(seed + 1)
    for weight in seer_hf.gate_parameters(model):
        torch.nn.init.normal_(weight, std=0.3)
    return model


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
        with pytest.raises(ValueError, match="a call in distilling mode"):
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


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("format", ["safetensors", "pth"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_gates_come_back(family, format, tmp_path):
    model = distilling(family, train=False)
    rule = Rule("density", 0.3, sink=1, local=2, dense_last_rows=3)
    seer_hf.configure(model, mode="sparse", rule=rule)
    path = seer_hf.save_gates(model, tmp_path / "a", format=format)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, "config.json"]
    again = seer_hf.load_gates(make_model(family), path.parent)
    assert seer_hf.attached_config(again).rule == rule
    assert seer_hf.attached_config(again).block == BLOCK
    ids = tokens(1, 90)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    other = "pth" if format == "safetensors" else "safetensors"
    assert not seer_hf.save_gates(model, path.parent, format=other).samefile(tmp_path / "a") and (
        not path.exists()
    )


def test_a_full_disk_leaves_the_old_gates(tmp_path, monkeypatch):
    """The weights fit, their configuration does not: neither is replaced."""
    seer_hf.save_gates(distilling("llama", train=False), tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = seer_hf.attach(make_model("llama"), SeerConfig(block=BLOCK, gate="Qavg_Kavg"))

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="no space"):
        seer_hf.save_gates(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


@pytest.mark.parametrize(
    "rule", [Rule("threshold", 2e-3), Rule("topk", 5), Rule("topp", 0.9), Rule("density", 0.5)]
)
def test_every_rule_has_keys(rule, tmp_path):
    config = SeerConfig(rule=rule, gate="Qmaxavg_Kmin", block=32, force_double=True, qk_norm=True)
    again = SeerConfig.from_released(json.loads(json.dumps(config.released(48))))
    assert again == SeerConfig(
        rule=rule,
        gate="Qmaxavg_Kmin",
        block=32,
        force_double=True,
        qk_norm=True,
        gate_dim=48,
    )


def released(folder, *, layers, heads, dim, name="mask_linear_k", drop=(), **keys):
    """An adapter as it is published: the reference's keys and names, bf16, a .pth."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(layers):
        key = f"model.layers.{layer}.self_attn.attn_gate.{name}.weight"
        weights[key] = 0.02 * torch.randn(heads, 3 * dim, dim, generator=generator).bfloat16()
    for key in drop:
        del weights[key]
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "attn_gate_weights.pth")
    config = {
        "base_model": "somewhere/a-model",
        "seerattn_sparsity_method": "threshold",
        "seerattn_threshold": 5e-4,
        "seerattn_nz_ratio": 1.0,
        "seerattn_gate_type": "Qavg_Kmaxminavg",
        "seerattn_gate_block_size": 64,
        "seerattn_gate_hidden_size": dim,
        "seerattn_last_block_dense": True,
        "seerattn_gate_force_double": False,
        "use_flash_rope": True,
        "fused_norm": True,
    }
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder, weights


@pytest.mark.parametrize("name", ["mask_linear_k", "attngate_linear_k"])
def test_a_released_adapter(name, tmp_path):
    folder, weights = released(tmp_path, layers=2, heads=4, dim=64, name=name)
    model = seer_hf.load_gates(make_model("llama"), folder)
    config = seer_hf.attached_config(model)
    assert config.rule == Rule("threshold", 5e-4, dense_last_rows=2)
    assert (config.block, config.gate) == (64, "Qavg_Kmaxminavg")
    for gate, weight in zip(seer_hf.gates(model), weights.values(), strict=True):
        assert gate.config.single_linear and gate.mask_linear_k.weight.dtype == torch.float32
        assert torch.equal(gate.mask_linear_k.weight, weight.float())
    ids = tokens(2, 150)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 152)
    nz = {"seerattn_sparsity_method": "nz_ratio", "seerattn_nz_ratio": 0.25}
    folder, _ = released(tmp_path, layers=2, heads=4, dim=64, **nz, seerattn_last_block_dense=False)
    model = seer_hf.load_gates(make_model("llama"), folder, mode="dense", dtype=torch.bfloat16)
    assert seer_hf.attached_config(model).rule == Rule("density", 0.25)
    assert seer_hf.gates(model)[0].mask_linear_k.weight.dtype == torch.bfloat16


def test_the_reference_s_defaults():
    config = SeerConfig.from_released({})
    assert config.rule == Rule("threshold", 0.0, dense_last_rows=2) and config.gate_dim == 128


def test_files_that_do_not_fit_are_explained(tmp_path):
    """The error names the key, and the model is left as it was."""
    key = r"model\.layers\.1\.self_attn\.attn_gate\.mask_linear_k\.weight: expected "
    sizes = {"layers": 2, "heads": 4, "dim": 64}
    decode = {"seerattn_sparsity_method": "token_budget"}
    wrong = {
        "heads": (sizes | {"heads": 2}, ValueError, r"got \[2, 192, 64\]"),
        "missing": (sizes | {"drop": [key.split(":")[0].replace("\\", "")]}, KeyError, key),
        "layers": (sizes | {"layers": 1}, KeyError, key + ".*layers 0 to 0"),
        "more": (sizes | {"layers": 3}, KeyError, r"layers\.2\..* expected 2 layers"),
        "norm": (sizes | {"seerattn_use_qk_norm": True}, KeyError, r"layers\.0\..*norm\.weight"),
        "decode": (sizes | decode, ValueError, r"config\.json: .*decode adapter"),
        "method": (sizes | {"seerattn_sparsity_method": "no"}, ValueError, "sparsity_method"),
        "value": (sizes | {"seerattn_threshold": -1}, ValueError, "seerattn_threshold: "),
        "gate": (sizes | {"seerattn_gate_type": "Qavg"}, ValueError, "name: "),
    }
    for name, (options, kind, match) in wrong.items():
        folder, _ = released(tmp_path / name, **options)
        model = make_model("llama")
        with pytest.raises(kind, match=match) as error:
            seer_hf.load_gates(model, folder)
        assert "seer::" in str(error.value) and ": expected " in str(error.value), name
        assert seer_hf.attached_config(model) is None
    folder, _ = released(tmp_path / "heads", **sizes | {"heads": 2})
    attached = seer_hf.attach(make_model("llama"))
    before = [weight.clone() for weight in seer_hf.gate_parameters(attached)]
    with pytest.raises(ValueError, match="expected shape"):
        seer_hf.load_gates(attached, folder)
    assert all(map(torch.equal, before, seer_hf.gate_parameters(attached)))
    with pytest.raises(FileNotFoundError, match="seer::load_gates: folder"):
        seer_hf.load_gates(make_model("llama"), tmp_path / "nowhere")
    with pytest.raises(ValueError, match=FORM):
        seer_hf.save_gates(attached, tmp_path, format="npz")


def test_a_decode_gate_is_refused(tmp_path):
    folder, weights = released(tmp_path, layers=2, heads=2, dim=64, name="attngate_linear_k")
    for layer in range(2):
        key = f"model.layers.{layer}.self_attn.attn_gate.attngate_linear_q.weight"
        weights[key] = torch.zeros(2, 2, 64, 64)
    torch.save(weights, folder / "attn_gate_weights.pth")
    with pytest.raises(ValueError, match="decode gate of SeerAttention-R"):
        seer_hf.load_gates(make_model("llama"), folder)


def test_a_pth_cannot_run_code(tmp_path):
    folder, weights = released(tmp_path, layers=2, heads=4, dim=64)
    torch.save(weights | {"x": SeerConfig}, folder / "attn_gate_weights.pth")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        seer_hf.load_gates(make_model("llama"), folder)


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
