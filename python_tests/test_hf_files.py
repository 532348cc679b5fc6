# SPDX-License-Identifier: Apache-2.0
"""Files of gates: what is saved comes back, released adapters load, damaged ones are explained."""

import json

import pytest
import torch
from hf_models import BLOCK, FAMILIES, FORM, distilling, make_model, released, tokens

from seer_cuda import Rule
from seer_cuda.integrations import transformers as seer_hf
from seer_cuda.integrations.transformers import SeerConfig

pytest.importorskip("transformers")


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
        "gate": (sizes | {"seerattn_gate_type": "Qavg"}, ValueError, "SeerConfig: gate: "),
        "gate type": (sizes | {"seerattn_gate_type": 7}, ValueError, "gate_type: .*got 7"),
        "width": (sizes | {"seerattn_gate_hidden_size": "64"}, ValueError, "hidden_size: .*'64'"),
        "block": (sizes | {"seerattn_gate_block_size": 64.0}, ValueError, "block_size: .*64.0"),
        "sink": (sizes | {"seerattn_sink_blocks": "1"}, ValueError, "sink_blocks: .*'1'"),
        "flag": (sizes | {"seerattn_use_qk_norm": "no"}, ValueError, "qk_norm: .*'no'"),
        "method type": (sizes | {"seerattn_sparsity_method": []}, ValueError, "method: "),
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


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", b"{"),
        ("config.json", b"[1]"),
        ("config.json", b"\xff\xfe"),
        ("attn_gate_weights.pth", b"no pickle"),
        ("attn_gate_weights.pth", b""),
        ("attn_gate_weights.safetensors", b"no header"),
        ("attn_gate_weights.safetensors", b""),
    ],
)
def test_a_damaged_file_is_named(name, content, tmp_path):
    folder, _ = released(tmp_path, layers=2, heads=4, dim=64)
    (folder / name).write_bytes(content)
    model = make_model("llama")
    with pytest.raises(ValueError, match=rf"{name}: expected .+, got: .+\. Download the adapter"):
        seer_hf.load_gates(model, folder)
    assert seer_hf.attached_config(model) is None


@pytest.mark.parametrize("state", [[1, 2], {1: torch.ones(2)}, {"a": [torch.ones(2)]}])
def test_a_pth_without_weights_by_name_is_refused(state, tmp_path):
    folder, _ = released(tmp_path, layers=2, heads=4, dim=64)
    torch.save(state, folder / "attn_gate_weights.pth")
    with pytest.raises(ValueError, match=r"attn_gate_weights\.pth: expected weights by name"):
        seer_hf.load_gates(make_model("llama"), folder)


def test_a_config_is_checked_where_it_is_made():
    for wrong in ({"gate": "Qavg"}, {"gate_dim": 0}, {"gate_dim": 64.0}, {"block": 64.0}):
        with pytest.raises(ValueError, match=FORM):
            SeerConfig(**wrong)
    with pytest.raises(TypeError, match=r"seer::SeerConfig: rule: expected .+, got 'topk'\."):
        SeerConfig(rule="topk")
    model = seer_hf.attach(make_model("llama"))
    before = seer_hf.attached_config(model)
    with pytest.raises(TypeError, match=r"rule: expected .+, got \('topk', 4\)\."):
        seer_hf.configure(model, rule=("topk", 4))
    assert seer_hf.attached_config(model) == before


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
