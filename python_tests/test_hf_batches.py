# SPDX-License-Identifier: Apache-2.0
"""Gates in transformers models: padding, packed sequences, chunks, next turns."""

import copy
from itertools import pairwise

import pytest
import torch
from hf_models import (
    BLOCK,
    DENSE,
    FAMILIES,
    SPARSE,
    attached,
    close,
    defined_logits,
    logits,
    make_model,
    padded,
    places,
    tokens,
    yarn,
)

from seer_cuda import gate_mask
from seer_cuda.integrations import transformers as seer_hf

pytest.importorskip("transformers")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_changes_nothing(family, side, use_cache):
    model = attached(family)
    ids, mask, sequences = padded([150, 3, 101, 16], side)
    out = logits(model, ids, attention_mask=mask, use_cache=use_cache)
    for row, (at, sequence) in enumerate(zip(places(mask), sequences, strict=True)):
        close(out[row, at], logits(model, sequence[None], use_cache=use_cache)[0])


def test_what_stands_in_the_padding_does_not_matter():
    model = attached("llama")
    ids, mask, _ = padded([150, 77], "left")
    want = logits(model, ids, attention_mask=mask)
    other = torch.where(mask == 1, ids, torch.full_like(ids, 55))
    got = logits(model, other, attention_mask=mask)
    assert torch.equal(got[mask == 1], want[mask == 1])


def test_a_mask_that_is_filled_anew_in_place_is_read_anew():
    model = attached("llama")
    ids, mask, _ = padded([100, 60], "left")
    mask = mask.bool()
    positions = torch.arange(100)[None]
    logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    mask.fill_(True)
    got = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    assert torch.equal(got, logits(model, ids))


def test_same_padding_in_all_rows():
    model = attached("qwen3")
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[:, :37] = 0
    ids = tokens(2, 120)
    out = logits(model, ids, attention_mask=mask)
    close(out[:, 37:], logits(model, ids[:, 37:]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_sequences_do_not_see_each_other(family, use_cache):
    model = attached(family)
    lengths = [70, 16, 41]
    sequences = [tokens(1, n, n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = torch.cat(sequences, 1)
    out = logits(model, ids, position_ids=positions, use_cache=use_cache)
    cu = torch.tensor([0, 70, 86, 127], dtype=torch.int32)
    flash = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 70, "max_length_k": 70}
    named = logits(model, ids, position_ids=positions, use_cache=use_cache, **flash)
    for part, same, sequence in zip(
        out.split(lengths, 1), named.split(lengths, 1), sequences, strict=True
    ):
        want = logits(model, sequence)
        close(part, want)
        close(same, want)


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_that_jump_beside_a_mask_are_one_sequence(use_cache):
    """transformers reads packing from positions only where no mask is given."""
    ids, mask = tokens(2, 100), torch.ones(2, 100, dtype=torch.long)
    positions = torch.cat([torch.arange(60), torch.arange(80, 120)])[None]
    options = {"attention_mask": mask, "position_ids": positions, "use_cache": use_cache}
    model = make_model("llama")
    want = logits(model, ids, **options)
    close(logits(attached("llama", DENSE, model=model), ids, **options), want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", [[64, 48, 38], [16, 134]])
def test_chunks_give_the_rows_of_the_whole(family, chunks):
    from transformers import DynamicCache

    model = attached(family)
    ids = tokens(2, sum(chunks))
    cache = DynamicCache()
    parts = [logits(model, part, past_key_values=cache) for part in ids.split(chunks, 1)]
    close(torch.cat(parts, 1), logits(model, ids))


def test_gate_keys_are_kept_from_chunk_to_chunk(monkeypatch):
    """Pooled once: later chunks embed their own keys only."""
    from transformers import DynamicCache

    from seer_cuda import AttnGate

    model = attached("llama")
    rows = []
    embed = AttnGate.embed_k
    monkeypatch.setattr(
        AttnGate, "embed_k", lambda *a, **b: rows.append(a[1].shape[1]) or embed(*a, **b)
    )
    cache = DynamicCache()
    for part in tokens(1, 160).split([64, 64, 32], 1):
        logits(model, part, past_key_values=cache)
    assert rows == [64, 64, 64, 64, 32, 32]  # two layers
    del cache
    assert not model.model._seer_state.kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", None])
def test_chunks_of_padded_batches_and_odd_starts(family, side):
    """A chunk that starts inside a block is dense up to the boundary."""
    from transformers import DynamicCache

    model = attached(family)
    lengths = [150, 113] if side else [150, 150]
    ids, mask, sequences = padded(lengths, side or "left")
    cache, parts, end = DynamicCache(), [], 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for rows in (70, 16, 64):
        end += rows
        now = slice(end - rows, end)
        parts.append(
            logits(
                model,
                ids[:, now],
                attention_mask=mask[:, :end],
                position_ids=positions[:, now],
                past_key_values=cache,
            )
        )
    for row, sequence in enumerate(sequences):
        pad = 150 - lengths[row]
        cuts = [max(cut - pad, 0) for cut in (0, 70, 86, 150)]

        def keep(index, q, k, cuts=cuts):
            gate = seer_hf.gates(model)[index]
            kept = torch.zeros(1, q.shape[2], cuts[-1], cuts[-1], dtype=torch.bool)
            for begin, end in pairwise(cuts):
                aligned = -(-begin // BLOCK) * BLOCK
                kept[:, :, begin:aligned] = True
                if aligned < end:
                    mask = gate_mask(q[:, aligned:end], k[:, :end], gate, SPARSE).to_dense()
                    mask = mask.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
                    kept[:, :, aligned:end, :end] = mask[:, :, : end - aligned, :end]
            return kept, 1

        want = defined_logits(model, sequence[None], keep)[0]
        close(torch.cat(parts, 1)[row, pad:], want)


def test_a_chunk_shorter_than_a_block_is_dense():
    from transformers import DynamicCache

    model, seen = attached("llama"), []
    ids, cache = tokens(1, 96 + BLOCK - 1), DynamicCache()
    logits(model, ids[:, :96], past_key_values=cache)
    twin = copy.deepcopy(cache)
    seer_hf.observe(model, lambda *mask: seen.append(mask))
    got = logits(model, ids[:, 96:], past_key_values=cache)
    assert not seen
    seer_hf.configure(model, mode="dense")
    close(got, logits(model, ids[:, 96:], past_key_values=twin))


@pytest.mark.parametrize("between", ["decode", "copy", "crop"])
def test_a_next_turn_finds_its_gate_keys_in_the_kv_cache(between):
    """After other calls the gate's keys come from rotating the cached keys back."""
    from transformers import DynamicCache

    model = attached("qwen3", model=make_model("qwen3", **yarn()))
    ids = tokens(2, 150)
    cache = DynamicCache()
    if between == "crop":
        logits(model, torch.cat([ids[:, :96], tokens(2, 32, seed=9)], 1), past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :96], layer.values[:, :, :96]
    elif between == "decode":
        logits(model, ids[:, :95], past_key_values=cache)
        logits(model, ids[:, 95:96], past_key_values=cache)
    else:
        logits(model, ids[:, :96], past_key_values=cache)
    twin = cache if between == "crop" else copy.deepcopy(cache)
    state = model.model._seer_state
    if between == "decode":
        assert not state.kept
    got = logits(model, ids[:, 96:], past_key_values=twin)
    if between == "copy":
        want = logits(model, ids[:, 96:], past_key_values=cache)
        close(got, want)
    exact = [kept.spans[None][0].keys.clone() for kept in state.kept[twin].values()]
    fresh = DynamicCache()
    logits(model, ids, past_key_values=fresh)
    # The first layer's keys do not depend on attention: those of the whole prompt.
    whole = state.kept[fresh][0].spans[None][0].keys
    torch.testing.assert_close(exact[0], whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", ["reorder", "repeat", "select", "refilled", "weights"])
def test_gate_keys_of_other_contents_are_not_used(change, tmp_path):
    """A KV cache of the same length whose rows or tokens are others."""
    from transformers import DynamicCache

    model = attached("llama")
    ids, more, index = tokens(2, 96), tokens(2, 48, seed=5), torch.tensor([1, 0])
    cache = DynamicCache()
    logits(model, ids, past_key_values=cache)
    if change == "reorder":
        cache.reorder_cache(index)
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
        more = more.repeat(2, 1)
    elif change == "select":
        cache.batch_select_indices(index[:1])
        more = more[:1]
    elif change == "refilled":
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :80], layer.values[:, :, :80]
        for part in tokens(2, 16, seed=9).split(8, 1):  # shorter than a block, not one token
            logits(model, part, past_key_values=cache)
    else:
        seer_hf.save_gates(attached("llama", seed=3), tmp_path)
        seer_hf.load_gates(model, tmp_path)
    twin = copy.deepcopy(cache)  # has no gate keys: they come from its own keys
    got = logits(model, more, past_key_values=cache)
    close(got, logits(model, more, past_key_values=twin))


def quantised(model):
    """A cache that keeps bf16 of the keys, in the layers that transformers has for this."""
    from transformers import DynamicCache
    from transformers.cache_utils import QuantizedLayer

    class Rounded(QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor.bfloat16()

        def _dequantize(self, tensor):
            return tensor.float()

    cache = DynamicCache(config=model.config)
    cache.layers = [Rounded(residual_length=32) for _ in model.model.layers]
    return cache


def test_a_quantised_cache():
    """What it gives back is not what was put in; gate keys follow what attention reads."""
    model = attached("llama", DENSE)
    ids = tokens(2, 160)
    cache, parts = quantised(model), []
    for part in ids.split([64, 64, 1, 31], 1):
        parts.append(logits(model, part, past_key_values=cache))
    want = logits(model, ids)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0.05, atol=0.05 * float(want.std()))
    seer_hf.configure(model, rule=SPARSE)
    got = model.generate(ids, past_key_values=quantised(model), max_new_tokens=4, do_sample=False)
    assert got.shape == (2, 164)
