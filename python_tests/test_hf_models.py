# SPDX-License-Identifier: Apache-2.0
"""Gates in transformers models: every mode and family, generate(), compiled, detached."""

import copy
import subprocess
import sys

import hf_models
import pytest
import torch
from hf_models import (
    BLOCK,
    DENSE,
    FAMILIES,
    FORM,
    SPARSE,
    attached,
    close,
    defined_logits,
    logits,
    make_model,
    padded,
    tokens,
    yarn,
)

from seer_cuda import Rule
from seer_cuda.integrations import transformers as seer_hf
from seer_cuda.integrations.transformers import SeerConfig, _attention

MAJOR = int(pytest.importorskip("transformers").__version__.split(".")[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_mode_is_the_untouched_model(family, implementation):
    model = make_model(family, attn_implementation=implementation)
    ids, mask, _ = padded([70, 33], "left")
    before = logits(model, ids, attention_mask=mask)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    attached(family, mode="dense", model=model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model, ids, attention_mask=mask), before)
    again = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_every_block_kept_is_dense(family, use_cache):
    model = make_model(family)
    ids = tokens(2, 150)
    want = logits(model, ids)
    attached(family, DENSE, model=model)
    close(logits(model, ids, use_cache=use_cache), want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", [SPARSE, Rule("threshold", 0.2), Rule("density", 0.3, sink=1)])
def test_sparse_prefill_is_softmax_under_the_gate_s_mask(family, rule):
    """Against a model recomputed in float64 with plain softmax."""
    model = attached(family, rule)
    ids = tokens(2, 150)
    density = []

    def keep(index, q, k):
        gate = seer_hf.gates(model)[index]
        mask = gate.select(
            q, k, rule.method, rule.value, sink=rule.sink, local=rule.local
        ).validate()
        density.append(mask.to_dense().float().mean())
        return mask.to_dense(), BLOCK

    want = defined_logits(model, ids, keep)
    assert max(density) < 0.45  # of all blocks; 0.55 are visible
    close(logits(model, ids), want)
    dense = defined_logits(model, ids, lambda *_: None)
    assert (want - dense).abs().max() > 0.05
    seer_hf.configure(model, mode="dense")
    close(logits(model, ids), dense)


def test_decode_is_dense_over_the_cache():
    """Each new token attends to everything: one dense step after a sparse prompt."""
    from transformers import DynamicCache

    model, plain = attached("qwen2"), make_model("qwen2")
    ids = tokens(2, 101)
    cache = DynamicCache()
    logits(model, ids[:, :100], past_key_values=cache)
    twin = copy.deepcopy(cache)
    step = logits(model, ids[:, 100:], past_key_values=cache)
    assert torch.equal(step, logits(plain, ids[:, 100:], past_key_values=twin))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_padding(family):
    """Rows of a left-padded batch generate what they generate alone."""
    model = attached(family)
    ids, mask, sequences = padded([90, 41, 2], "left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": hf_models.PAD}
    out = model.generate(ids, attention_mask=mask, **options)
    for row, sequence in zip(out, sequences, strict=True):
        alone = model.generate(
            sequence[None], attention_mask=torch.ones(1, len(sequence), dtype=torch.long), **options
        )
        assert torch.equal(row[-6:], alone[0, -6:])


@pytest.mark.parametrize("kind", ["static", "beams", "chunked"])
def test_ways_to_generate(kind):
    # Before 5.0 chunked generation leaves the prompt's last token to a decode step, which is dense.
    model = attached("llama", DENSE if kind == "chunked" and MAJOR < 5 else SPARSE)
    ids = tokens(1, 96)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": hf_models.PAD}
    want = model.generate(ids, **options)
    if kind == "static":
        got = model.generate(ids, cache_implementation="static", **options)
    elif kind == "chunked":
        got = model.generate(ids, prefill_chunk_size=32, **options)
    else:
        got = model.generate(ids, num_beams=1, num_return_sequences=1, **options)
        assert model.generate(ids, num_beams=3, **options).shape == (1, 102)
    assert torch.equal(got, want)


def test_bf16_and_yarn():
    model = attached("llama", model=make_model("llama", **yarn()), rule=DENSE)
    gate = seer_hf.gates(model)[0]
    assert gate.config.attention_scaling > 1
    assert torch.equal(gate.inv_freq, model.model.rotary_emb.inv_freq)
    ids = tokens(1, 96)
    seer_hf.configure(model, mode="dense")
    want = logits(model, ids)
    seer_hf.configure(model, mode="sparse")
    close(logits(model, ids), want)
    model.to(torch.bfloat16)
    assert logits(model, ids).dtype == torch.bfloat16 and gate.inv_freq.dtype == torch.float32
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 99)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_autocast(family, use_cache, monkeypatch):
    """Norms, RoPE and the cache give fp32; the kernels see the type of autocast."""
    model = attached(family, DENSE)
    ids = tokens(1, 96)
    want, types = logits(model, ids), []
    attend = _attention.block_sparse_attn

    def watched(*args, **options):
        types.extend(x.dtype for x in args[:3])
        return attend(*args, **options)

    monkeypatch.setattr(_attention, "block_sparse_attn", watched)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, ids, use_cache=use_cache)
    assert set(types) == {torch.bfloat16}
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1 * float(want.std()))


@pytest.mark.parametrize("head_dim, heads", [(128, (2, 2)), (64, (8, 1))])
def test_other_head_counts(head_dim, heads):
    model = make_model("llama", head_dim=head_dim, heads=heads)
    ids = tokens(1, 70)
    want = logits(model, ids)
    attached("llama", DENSE, model=model)
    close(logits(model, ids), want)


def test_masks_can_be_observed():
    model = attached("llama")
    seen = []
    seer_hf.observe(model, lambda layer, mask: seen.append((layer, mask)))
    logits(model, tokens(2, 96))
    assert [layer for layer, _ in seen] == [0, 1]
    assert all(mask.shape == (2, 4, 6, 6) and (mask.density() < 1).all() for _, mask in seen)
    seer_hf.observe(model, None)
    logits(model, tokens(2, 96))
    assert len(seen) == 2


def test_detach_leaves_nothing():
    model = make_model("qwen3")
    keys, before = list(model.state_dict()), logits(model, ids := tokens(1, 50))
    attached("qwen3", mode="distilling", model=model)
    assert "model.layers.1.self_attn.attn_gate.mask_linear_k.weight" in model.state_dict()
    seer_hf.detach(model)
    assert list(model.state_dict()) == keys and torch.equal(logits(model, ids), before)
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert seer_hf.attached_config(model) is None


def test_a_deep_copy_is_a_model_of_its_own():
    model = attached("llama")
    twin = copy.deepcopy(model)
    ids = tokens(1, 96)
    want = logits(model, ids)
    seer_hf.configure(model, rule=DENSE)
    assert torch.equal(logits(twin, ids), want) and not torch.equal(logits(model, ids), want)
    seer_hf.detach(twin)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert seer_hf.attached_config(model) is not None
    assert not torch.equal(logits(model, ids), want)


def test_compiled_model():
    torch._dynamo.reset()
    model = attached("llama")
    ids = tokens(1, 96)
    want = logits(model, ids)
    compiled = torch.compile(model, backend="eager")
    close(logits(compiled, ids), want)
    close(logits(compiled, ids, use_cache=False), want)


def test_a_decode_step_compiles_whole():
    from transformers import StaticCache

    torch._dynamo.reset()
    model = attached("llama")
    ids = tokens(1, 40)
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    steps = []
    for cache, step in zip(
        caches, [model, torch.compile(model, backend="eager", fullgraph=True)], strict=True
    ):
        logits(model, ids[:, :39], past_key_values=cache, cache_position=torch.arange(39))
        at = torch.tensor([39])
        steps.append(
            logits(
                step, ids[:, 39:], past_key_values=cache, cache_position=at, position_ids=at[None]
            )
        )
    close(steps[1], steps[0])


def test_wrong_calls_are_explained():
    from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

    model = attached("llama")
    ids = tokens(2, 40)
    holes = torch.ones(2, 40, dtype=torch.long)
    holes[1, 10] = 0
    cache = DynamicCache()
    logits(model, ids, past_key_values=cache)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    sliding = make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    both_ways = make_model("llama")
    both_ways.model.layers[0].self_attn.is_causal = False
    offloaded = make_model("llama")
    offloaded.model.layers[1].to("meta")
    moving = make_model("llama")
    moving.model.rotary_emb.rope_type = "dynamic"
    wrong = (
        lambda: seer_hf.attach(model),
        lambda: seer_hf.attach(gpt),
        lambda: seer_hf.attach(sliding),
        lambda: seer_hf.attach(moving),
        lambda: seer_hf.attach(both_ways),
        lambda: seer_hf.attach(offloaded),
        lambda: logits(model, ids, output_attentions=True),
        lambda: seer_hf.attach(torch.nn.Linear(1, 1)),
        lambda: seer_hf.configure(model, mode="quick"),
        lambda: seer_hf.detach(make_model("llama")),
        lambda: seer_hf.gate_loss(model),
        lambda: SeerConfig("quick"),
        lambda: SeerConfig(block=48),
        lambda: logits(model, ids, attention_mask=holes),
        lambda: logits(model, ids, attention_mask=torch.ones(2, 1, 40, 40)),
        lambda: logits(model, ids, attention_mask=torch.ones(2, 40), past_key_values=cache),
        lambda: seer_hf.configure(model, mode="distilling")
        and logits(model, ids, past_key_values=cache),
        lambda: logits(make_model("llama", attn_implementation="seer"), ids),
    )
    for call in wrong:
        with pytest.raises(ValueError, match=FORM):
            call()


def test_another_attention_set_afterwards_is_noticed():
    """Prompts would be dense without a word."""
    model = attached("llama")
    ids = tokens(1, 40)
    want = logits(model, ids)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=FORM):
        logits(model, ids)
    seer_hf.configure(model)
    assert torch.equal(logits(model, ids), want)


def test_rope_in_place_is_noticed(monkeypatch):
    """As some fused kernels do: the gate would see rotated q and k."""
    from transformers.models.llama import modeling_llama

    model, rotate = attached("llama"), modeling_llama.apply_rotary_pos_emb

    def in_place(q, k, cos, sin, *more, **options):
        for x, turned in zip((q, k), rotate(q, k, cos, sin, *more, **options), strict=True):
            x.copy_(turned)
        return q, k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", in_place)
    with pytest.raises(RuntimeError, match=FORM):
        logits(model, tokens(1, 40))


def test_projections_without_a_weight():
    """As quantised models have them."""

    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.inner = linear

        def forward(self, x):
            return self.inner(x)

    model, ids = make_model("llama"), tokens(1, 96)
    want = logits(model, ids)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
    close(logits(attached("llama", DENSE, model=model), ids), want)


def test_modules_that_were_changed_afterwards_are_noticed():
    model = attached("llama")
    attn = model.model.layers[1].self_attn
    attn.q_proj = copy.deepcopy(attn.q_proj)
    with pytest.raises(RuntimeError, match=FORM):
        logits(model, tokens(1, 40))


def test_importing_seer_cuda_does_not_import_transformers():
    code = (
        "import sys, seer_cuda, seer_cuda.integrations.transformers\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
