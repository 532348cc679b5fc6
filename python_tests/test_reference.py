# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: against torch's float64 attention, against loops, and by hand."""

import itertools
import math

import inputs
import patterns
import pytest
import torch
from torch.nn import functional as F

from seer_cuda import reference

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def loop_attention(q, k, v, mask, block_q, block_kv, causal, scale):
    """The definition with Python loops over one head: q [rows_q, d], mask [blocks_q, blocks_kv]."""
    rows_q, rows_kv = q.shape[0], k.shape[0]
    out, lse = torch.zeros_like(q), torch.full((rows_q,), -math.inf, dtype=q.dtype)
    for r in range(rows_q):
        seen = [
            c
            for c in range(rows_kv)
            if mask[r // block_q, c // block_kv] and (not causal or c <= r + rows_kv - rows_q)
        ]
        if seen:
            score = scale * (k[seen] @ q[r])
            lse[r] = score.logsumexp(0)
            out[r] = score.softmax(0) @ v[seen]
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (65, 65), (40, 90), (130, 130)])
@pytest.mark.parametrize("group", [1, 4])
def test_dense_equals_sdpa(rows, causal, group, seed):
    q, k, v = inputs.qkv(
        "normal", rows_q=rows[0], rows_kv=rows[1], batch=2, heads_q=2 * group, heads_kv=2, seed=seed
    )
    out, lse = reference.block_sparse_attn(q, k, v, causal=causal)
    seen = reference.token_visible(*rows, causal)
    args = [x.double().transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*args, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), **CLOSE)
    score = args[0] @ args[1].repeat_interleave(group, 1).transpose(2, 3) / 8.0
    torch.testing.assert_close(lse, score.masked_fill(~seen, -math.inf).logsumexp(-1), **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", patterns.PATTERNS)
@pytest.mark.parametrize("rows", [(50, 50), (20, 50), (50, 20)])
def test_sparse_equals_loops(name, rows, causal, seed):
    q, k, v = inputs.qkv(
        "normal", rows_q=rows[0], rows_kv=rows[1], heads_q=4, heads_kv=2, head_dim=8, seed=seed
    )
    mask = patterns.pattern(name, 1, 2, -(-rows[0] // 16), -(-rows[1] // 8), seed)
    out, lse = reference.block_sparse_attn(
        q, k, v, reference.pack_block_bits(mask), block_q=16, block_kv=8, causal=causal, scale=0.3
    )
    for h in range(4):
        want = loop_attention(
            *(x[0, :, h // n].double() for x, n in ((q, 1), (k, 2), (v, 2))),
            mask[0, h // 2],
            16,
            8,
            causal,
            0.3,
        )
        torch.testing.assert_close(out[0, :, h], want[0], **CLOSE)
        torch.testing.assert_close(lse[0, h], want[1], **CLOSE)


def test_two_keys_by_hand():
    q = torch.tensor([[1.0, 0.0]])[None, :, None]
    k = torch.tensor([[math.log(3.0), 5.0], [0.0, 7.0]])[None, :, None]
    v = torch.tensor([[4.0, 0.0], [0.0, 8.0]])[None, :, None]
    out, lse = reference.block_sparse_attn(q.double(), k.double(), v.double(), scale=1.0)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([3.0, 2.0]).double(), atol=1e-6, rtol=0)
    assert lse.item() == pytest.approx(math.log(4.0), abs=1e-6)
    *_, pooled = reference.attn_pool(q, k, v, scale=1.0, block_kv=1, block_q=1)
    torch.testing.assert_close(
        pooled[0, 0, 0], torch.tensor([0.75, 0.25]).double(), **CLOSE | {"atol": 1e-6}
    )


def test_causal_is_aligned_to_the_bottom_right():
    seen = reference.token_visible(2, 4, True)
    assert seen.tolist() == [[True, True, True, False], [True] * 4]
    assert reference.token_visible(4, 2, True).tolist() == [
        [False, False],
        [False, False],
        [True, False],
        [True, True],
    ]


def test_empty_rows_are_zero_and_minus_infinity():
    q, k, v = inputs.qkv("normal", rows_q=96, rows_kv=64)
    out, lse = reference.block_sparse_attn(q, k, v)
    assert (out[:, :32] == 0).all() and (lse[:, :, :32] == -math.inf).all()
    assert out[:, 32:].ne(0).all() and lse[:, :, 32:].isfinite().all()


def test_unkept_and_invisible_values_have_no_influence():
    q, k, v = inputs.qkv("normal", rows_q=64, rows_kv=64, head_dim=8)
    bits = reference.pack_block_bits(patterns.pattern("diagonal", 1, 1, 4, 4))
    clean = reference.block_sparse_attn(q, k, v, bits, block_q=16, block_kv=16)
    k[:, 16:32], v[:, 16:32] = math.nan, math.inf
    dirty = reference.block_sparse_attn(q, k, v, bits, block_q=16, block_kv=16)
    away = torch.ones(64, dtype=torch.bool)
    away[16:32] = False
    torch.testing.assert_close(dirty[0][:, away], clean[0][:, away], rtol=0, atol=0)
    assert dirty[0][:, ~away].isnan().all()
    v[:, 16:32] = 1.0
    v[:, 63] = math.nan
    assert reference.block_sparse_attn(q, k[:, :16], v[:, :16])[0].isfinite().all()


def test_varlen_equals_sequences_one_by_one(seed):
    lengths_q, lengths_kv = [0, 33, 1, 70], [20, 33, 64, 90]
    case = inputs.varlen(
        "normal", lengths_q, lengths_kv, slack=5, heads_q=4, heads_kv=2, head_dim=8, seed=seed
    )
    mask = patterns.pattern("random_50", 4, 2, -(-70 // 16), -(-90 // 16), seed)
    bits = reference.pack_block_bits(mask)
    out, lse = reference.block_sparse_attn(**case, block_bits=bits, block_q=16, block_kv=16)
    pool_out, _, pooled = reference.attn_pool(**case, block_q=16, block_kv=16)
    _, _, tokens = reference.attn_pool(**case, block_q=16, block_kv=16, per_token=True)
    assert (out[:5] == 0).all() and (lse[:, -5:] == -math.inf).all()
    edges_q, edges_kv = (case[f"cu_seqlens_{x}"].tolist() for x in ("q", "kv"))
    for n in range(4):
        at_q, at_kv = slice(*edges_q[n : n + 2]), slice(*edges_kv[n : n + 2])
        one = [case["q"][at_q][None], case["k"][at_kv][None], case["v"][at_kv][None]]
        alone, alone_lse = reference.block_sparse_attn(
            *one, bits[n : n + 1], block_q=16, block_kv=16
        )
        torch.testing.assert_close(out[at_q], alone[0], **CLOSE)
        torch.testing.assert_close(lse[:, at_q], alone_lse[0], **CLOSE)
        dense, _, alone_map = reference.attn_pool(*one, block_q=16, block_kv=16)
        torch.testing.assert_close(pool_out[at_q], dense[0], **CLOSE)
        shape = alone_map.shape[2:]
        torch.testing.assert_close(pooled[n, :, : shape[0], : shape[1]], alone_map[0], **CLOSE)
        assert (pooled[n, :, shape[0] :] == 0).all() and (pooled[n, :, :, shape[1] :] == 0).all()
        assert (tokens[:, at_q, shape[1] :] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_pooled_map_is_the_maximum_of_probabilities(causal, seed):
    rows_q, rows_kv = 37, 53
    q, k, v = inputs.qkv(
        "normal", rows_q=rows_q, rows_kv=rows_kv, heads_q=2, heads_kv=1, head_dim=8, seed=seed
    )
    kw = {"block_q": 8, "block_kv": 16, "causal": causal}
    _, _, pooled = reference.attn_pool(q, k, v, **kw)
    _, _, tokens = reference.attn_pool(q, k, v, per_token=True, **kw)
    score = torch.einsum("brhd,bcd->bhrc", q.double(), k[:, :, 0].double()) / math.sqrt(8)
    seen = reference.token_visible(rows_q, rows_kv, causal)
    prob = score.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    for i, j in itertools.product(range(5), range(4)):
        tile = prob[:, :, 8 * i : 8 * i + 8, 16 * j : 16 * j + 16]
        torch.testing.assert_close(pooled[:, :, i, j], tile.amax((2, 3)), **CLOSE)
        torch.testing.assert_close(tokens[:, :, 8 * i : 8 * i + 8, j], tile.amax(3), **CLOSE)


def test_pool_gate_by_hand():
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 0.0]])[None, :, None]
    pooled = reference.pool_gate(x, block=2, pools=7)
    assert pooled[0, :, 0].tolist() == [[3, 4, 1, -2, 2, 1], [5, 0, 5, 0, 5, 0]]
    weight = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, 0.0]]])
    cos, sin = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    gate = reference.pool_gate(x, weight, cos, sin, block=2, pools=1)
    assert gate[0].tolist() == [[[3, 8], [4, 3]], [[0, 5], [-5, 0]]]


def test_rope_leaves_channels_beyond_its_width():
    x = torch.randn(1, 5, 1, 6)
    cos, sin = torch.rand(3, 2), torch.rand(3, 2)
    plain, turned = (reference.pool_gate(x, None, *rope, block=2) for rope in ((), (cos, sin)))
    assert (turned[..., 4:] == plain[..., 4:]).all() and (turned[..., :4] != plain[..., :4]).any()


class TestSelection:
    scores = torch.tensor([[[[1.0, 3.0, 3.0, 0.0], [0.0, 1.0, 2.0, 3.0]]]], dtype=torch.float64)

    def kept(self, **rule):
        mask = reference.select_blocks(self.scores, causal=rule.pop("causal", False), **rule)
        return ["".join(str(int(x)) for x in row) for row in mask[0, 0]]

    def test_topk_ties_go_to_the_lower_index(self):
        assert self.kept(method=reference.TOPK, value=1) == ["0100", "0001"]
        assert self.kept(method=reference.TOPK, value=2) == ["0110", "0011"]
        assert self.kept(method=reference.TOPK, value=9) == ["1111", "1111"]

    def test_threshold_is_strict(self):
        p = self.scores.softmax(-1)[0, 0, 1]
        assert self.kept(value=float(p[2]))[1] == "0001"
        assert self.kept(value=math.nextafter(float(p[2]), 0))[1] == "0011"

    def test_density(self):
        assert self.kept(method=reference.DENSITY, value=1e-9) == ["0100", "0001"]
        assert self.kept(method=reference.DENSITY, value=0.75) == ["0110", "0011"]
        assert self.kept(method=reference.DENSITY, value=1.0) == ["1111", "1111"]

    def test_topp_is_the_smallest_set(self):
        p = self.scores.softmax(-1)[0, 0, 1]
        assert self.kept(method=reference.TOPP, value=0.0) == ["0100", "0001"]
        assert self.kept(method=reference.TOPP, value=float(p[3]))[1] == "0001"
        assert self.kept(method=reference.TOPP, value=float(p[3]) + 1e-9)[1] == "0011"
        assert self.kept(method=reference.TOPP, value=1.0)[1] == "1111"

    def test_only_visible_blocks_and_forced_rules(self):
        none = {"method": reference.THRESHOLD, "value": 2.0, "causal": True}
        assert self.kept(**none) == ["0000", "0000"]
        assert self.kept(**none, sink=1) == ["1000", "1000"]
        assert self.kept(**none, local=1) == ["0010", "0001"]
        assert self.kept(**none, local=2, sink=9) == ["1110", "1111"]
        assert self.kept(**none, dense_last_rows=1) == ["0000", "1111"]
        assert self.kept(method=reference.TOPK, value=9, causal=True) == ["1110", "1111"]

    def test_nan_is_never_selected_except_by_force(self):
        scores = self.scores.clone()
        scores[..., 1, 3] = math.nan
        mask = reference.select_blocks(scores, causal=False, method=reference.TOPK, value=1)
        assert mask[0, 0, 1].tolist() == [False, False, True, False]
        mask = reference.select_blocks(scores, causal=False, value=2.0, local=1)
        assert mask[0, 0, 1].tolist() == [False, False, False, True]


def test_bits_by_hand():
    mask = torch.zeros(2, 35, dtype=torch.bool)
    mask[0, [0, 5]] = True
    mask[1, [31, 34]] = True
    bits = reference.pack_block_bits(mask)
    assert bits.tolist() == [[33, 0], [-(2**31), 4]] and bits.dtype == torch.int32
    assert (reference.unpack_block_bits(bits, 35) == mask).all()
    indices = torch.tensor([[5, 0, 5, 99], [34, 31, 7, 7]], dtype=torch.int32)
    counts = torch.tensor([4, 2], dtype=torch.int32)
    assert (reference.block_bits_from_indices(indices, counts, 35) == bits).all()


def test_gradients_flow_through_the_oracle(seed):
    q, k, v = inputs.qkv("normal", rows_q=9, rows_kv=7, heads_q=2, head_dim=4, seed=seed)
    args = [x.double().requires_grad_() for x in (q, k, v)]

    def attend(q, k, v):
        return reference.attn_pool(q, k, v, block_q=4, block_kv=4)[0]

    assert torch.autograd.gradcheck(attend, args)
    x = torch.randperm(42).reshape(1, 7, 2, 3).double().requires_grad_()
    weight = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.rand(2, 2), torch.rand(2, 2)
    assert torch.autograd.gradcheck(
        lambda x, w: reference.pool_gate(x, w, cos, sin, block=4, pools=7), (x, weight)
    )
