# SPDX-License-Identifier: Apache-2.0
"""Peers: where they are timed, and that those which are seldom installed are called rightly."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType

import pytest
import torch

from bench.cases import Case, all_cases
from bench.launch import launch_cost
from bench.peers import LIMITED_TO, all_peers, cudnn_frontend, fa3, fa4, worth_timing
from bench.problem import Problem, check

SMALL = Case(heads_q=2, heads_kv=1, head_dim=16, rows_q=256, rows_kv=256, density=0.5)
# The operator's declaration in flash-attention/hopper/flash_api.cpp.
FA3_SCHEMA = """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None,
Tensor(v_new!)? v_new=None, Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None,
Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None,
Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None,
Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None,
Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None,
Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False,
int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0.0,
bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0,
bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"""


def attend(q, k, v, keep) -> torch.Tensor:
    """[batch, rows, heads, head_dim] attention over the pairs of `keep`, in float32."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(q, k, v, keep, enable_gqa=True).transpose(1, 2)


def test_every_limit_names_a_peer_and_leaves_it_cases():
    for peer in all_peers():
        mine = [
            c.name for c in all_cases("sm90") if peer.supports(c) and worth_timing(peer.NAME, c)
        ]
        assert mine
        assert len(mine) < len(all_cases("sm90"))
    assert set(LIMITED_TO) <= {peer.NAME for peer in all_peers()}


@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.1])
def test_headline_rows_stand_beside_the_best_peers(density):
    def timed(**case: object) -> set[str]:
        case = Case(arch="sm90", rows_q=32768, rows_kv=32768, **case)
        assert case in all_cases("sm90")
        return {p.NAME for p in all_peers() if p.supports(case) and worth_timing(p.NAME, case)}

    assert timed(density=density) == {"fa4", "flex", "cudnn_frontend", "seer_triton"}
    assert timed(density=density, block=(128, 128)) == {"fa4", "flex"}
    dense = {"sdpa_flash", "sdpa_cudnn", "fa3", "fa4"}
    assert timed(mask="dense") == dense
    assert timed(mask="dense", causal=False) == dense - {"sdpa_flash"}


@pytest.mark.parametrize("causal", [True, False])
def test_fa3_is_called_as_its_schema_wants(causal):
    problem = Problem.build(dataclasses.replace(SMALL, mask="dense", causal=causal), "cpu")
    seen = {}

    def fwd(q, k, v, *rest):
        seen.update(zip(names, rest, strict=False))
        keep = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        out = attend(q, k, v, keep.tril() if seen["is_causal"] else keep)
        return out, *(torch.empty(0) for _ in range(3))

    library = torch.library.Library("flash_attn_3", "FRAGMENT")
    try:
        library.define(FA3_SCHEMA)
        library.impl("fwd", fwd, "CPU")
        names = [a.name for a in torch.ops.flash_attn_3.fwd.default._schema.arguments[3:]]
        check(problem, fa3.build(problem)())
        assert seen["softmax_scale"] == 0.25 and seen["num_splits"] == 1
    finally:
        library._destroy()


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for packages that are not installed: `packages("a.b", name=value)`."""

    def provide(path: str, **content: object) -> None:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for key, value in content.items():
            monkeypatch.setattr(sys.modules[path], key, value, raising=False)

    return provide


@pytest.mark.parametrize("kind", ["random", "kv_head"])
def test_cudnn_frontend_gets_lists_and_is_judged_without_a_causal_cut(packages, kind):
    problem = Problem.build(dataclasses.replace(SMALL, mask=kind), "cpu")

    def forward(q, k, v, q2k_block_index, *, q2k_block_nums, sparse_block_size, layout):
        assert layout == "bshd" and q2k_block_index.dtype == q2k_block_nums.dtype == torch.int32
        assert q2k_block_index.shape[-1] == q2k_block_nums.max()
        blocks = torch.zeros(*q2k_block_nums.shape, k.shape[1] // sparse_block_size)
        used = torch.arange(q2k_block_index.shape[-1]) < q2k_block_nums[..., None]
        blocks.scatter_add_(-1, q2k_block_index.long(), used.float())
        keep = blocks.repeat_interleave(sparse_block_size, 2).repeat_interleave(
            sparse_block_size, 3
        )
        return {"o_tensor": attend(q, k, v, keep.bool()), "lse_tensor": None}

    path = "cudnn.block_sparse_attention.api"
    packages(path, block_sparse_attention_forward=forward)
    out = cudnn_frontend.build(problem)()
    check(cudnn_frontend.answers(problem), out)
    with pytest.raises(ValueError, match="wrong result"):
        check(problem, out)


def test_fa4_gets_diagonal_blocks_apart_from_whole_ones(packages):
    problem = Problem.build(dataclasses.replace(SMALL, head_dim=64), "cpu")

    def tensors(mask_cnt, mask_idx, full_cnt, full_idx, *, block_size):
        assert block_size == (64, 64)
        return mask_cnt, mask_idx, full_cnt, full_idx

    def forward(q, k, v, *, causal, mask_mod, block_sparse_tensors, pack_gqa):
        assert causal is pack_gqa is False
        mask_cnt, mask_idx, full_cnt, full_idx = block_sparse_tensors
        keep = torch.zeros(1, q.shape[2], q.shape[1], k.shape[1], dtype=torch.bool)
        row, key = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        seen = mask_mod(0, 0, row, key, None, None)
        for head in range(q.shape[2]):
            for i in range(q.shape[1] // 64):
                rows = slice(64 * i, 64 * i + 64)
                for j in full_idx[0, head, i, : full_cnt[0, head, i]].tolist():
                    keep[0, head, rows, 64 * j : 64 * j + 64] = True
                for j in mask_idx[0, head, i, : mask_cnt[0, head, i]].tolist():
                    columns = slice(64 * j, 64 * j + 64)
                    keep[0, head, rows, columns] = seen[rows, columns]
        return attend(q, k, v, keep), None

    packages("flash_attn.cute.interface", _flash_attn_fwd=forward)
    packages("flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=tensors)
    packages("cutlass.cute", jit=lambda function: function)
    fa4._causal.cache_clear()
    try:
        check(problem, fa4.build(problem)())
    finally:
        fa4._causal.cache_clear()


@pytest.mark.gpu
def test_launch_cost_splits_a_call():
    a = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    cost = launch_cost(lambda: a @ a)
    assert 1 < cost["kernel_us"] < cost["call_us"] < 5000
    assert cost["overhead_us"] == pytest.approx(cost["call_us"] - cost["kernel_us"], abs=0.02)
    assert 0 < cost["host_us"] < cost["call_us"] and cost["stream_us"] < cost["call_us"]
