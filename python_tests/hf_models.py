# SPDX-License-Identifier: Apache-2.0
"""Tiny transformers models with random weights, and a definition of their sparse prefill.

The definition recomputes a whole model in plain torch from its weights: RMSNorm, projections, RoPE,
softmax over the tokens of the kept blocks, MLP. It shares nothing with the integration but the
gate's block mask.
"""

import json

import torch

from seer_cuda import Rule
from seer_cuda.integrations import transformers as seer_hf
from seer_cuda.integrations.transformers import SeerConfig

FAMILIES = ("llama", "qwen2", "qwen3")
PAD = 0
BLOCK = 16
SPARSE = Rule("topk", 2, local=1)
DENSE = Rule("density", 1.0)
FORM = r"seer::\w+: .+: expected .+, got .+\. \S.*\."


def make_model(family, *, layers=2, heads=(4, 2), head_dim=64, seed=0, **extra):
    """A causal language model with 64 hidden channels, in eval mode."""
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": head_dim,
            "max_position_embeddings": 4096,
            "initializer_range": 0.2,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        | extra
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                value += 0.1 * torch.randn_like(value)
    return model


def distilling(family="llama", *, seed=0, train=True, **extra):
    model = make_model(family, seed=seed, **extra).train(train)
    seer_hf.attach(model, SeerConfig("distilling", SPARSE, block=BLOCK))
    torch.manual_seed(seed + 1)
    for weight in seer_hf.gate_parameters(model):
        torch.nn.init.normal_(weight, std=0.3)
    return model


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


def attached(family, rule=SPARSE, *, mode="sparse", seed=0, block=BLOCK, model=None, **config):
    """A tiny model with gates whose scores are far apart: decisions must not hang on rounding."""
    model = make_model(family, seed=seed) if model is None else model
    seer_hf.attach(model, SeerConfig(mode, rule, block=block, **config))
    torch.manual_seed(seed + 1)
    for weight in seer_hf.gate_parameters(model):
        torch.nn.init.normal_(weight, std=0.5)
    return model


def close(got, want):
    torch.testing.assert_close(got.double(), want.double(), rtol=2e-4, atol=2e-4)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def yarn():
    """Options of a model whose RoPE is scaled, with a factor on cos and sin."""
    import transformers

    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    key = "rope_parameters" if int(transformers.__version__[0]) >= 5 else "rope_scaling"
    return {key: scaling | {"rope_theta": 10000.0}}


def tokens(batch, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 97, (batch, rows), generator=generator)


def padded(rows, side, *, seed=0):
    """(input_ids, attention_mask) of sequences with these lengths, and the sequences."""
    sequences = [tokens(1, n, seed + at)[0] for at, n in enumerate(rows)]
    ids = torch.full((len(rows), max(rows)), PAD)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        n = len(sequence)
        place = slice(max(rows) - n, None) if side == "left" else slice(0, n)
        ids[row, place], mask[row, place] = sequence, 1
    return ids, mask, sequences


def places(mask):
    """Index of the tokens of every row."""
    return [row.nonzero()[:, 0] for row in mask]


def _norm(x, module):
    scale = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + module.variance_epsilon)
    return x.double() * scale * module.weight.double()


def _linear(x, module):
    y = x @ module.weight.double().T
    return y if module.bias is None else y + module.bias.double()


def _rope(x, inv_freq, scaling):
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * inv_freq.double()
    cos, sin = angle.cos()[None, :, None] * scaling, angle.sin()[None, :, None] * scaling
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@torch.no_grad()
def defined_logits(model, ids, keep):
    """Logits of unpadded sequences, float64.

    keep(layer index, q, k) gives the bool block mask ``[batch, heads_q, blocks, blocks]`` of a
    layer and the block size from q and k before RoPE, or None for dense attention.
    """
    base = model.model
    x = base.embed_tokens.weight.double()[ids]
    rows = ids.shape[1]
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    for index, layer in enumerate(base.layers):
        attn, h = layer.self_attn, _norm(x, layer.input_layernorm)
        q, k, v = (
            _linear(h, getattr(attn, f"{name}_proj")).unflatten(-1, (-1, attn.head_dim))
            for name in "qkv"
        )
        if hasattr(attn, "q_norm"):
            q, k = _norm(q, attn.q_norm), _norm(k, attn.k_norm)
        kept = keep(index, q.float(), k.float())
        visible = causal
        if kept is not None:
            blocks, size = kept
            at = torch.arange(rows) // size
            visible = causal & blocks[:, :, at][:, :, :, at]
        rotary = base.rotary_emb
        q, k = (_rope(t, rotary.inv_freq, rotary.attention_scaling) for t in (q, k))
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        scores = torch.einsum("brhd,bchd->bhrc", q, k) * attn.head_dim**-0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)
        out = torch.einsum("bhrc,bchd->brhd", weights, v).flatten(2)
        x = x + _linear(out, attn.o_proj)
        h, mlp = _norm(x, layer.post_attention_layernorm), layer.mlp
        gated = torch.nn.functional.silu(_linear(h, mlp.gate_proj)) * _linear(h, mlp.up_proj)
        x = x + _linear(gated, mlp.down_proj)
    return _linear(_norm(x, base.norm), model.lm_head)
