# SPDX-License-Identifier: Apache-2.0
"""Sizes that kernels count in 32 bits: beyond them a call is refused, not cut."""

import pytest
import torch
from test_contract_errors import assert_contract_text

ops = torch.ops.seer

BEYOND = 2**32 + 1  # 1 if cut to 32 bits


@pytest.mark.parametrize(
    "op, argument, shapes",
    [
        ("block_sparse_attn", "q", [(BEYOND, 1, 1, 8)] * 3),
        ("block_sparse_attn", "q", [(1, 1, BEYOND, 8), (1, 1, 1, 8), (1, 1, 1, 8)]),
        ("attn_pool", "k", [(1, 1, 1, 8), (1, 1, BEYOND, 8), (1, 1, BEYOND, 8)]),
        ("pool_gate", "x", [(BEYOND, 1, 1, 1)]),
        ("pool_gate", "x", [(1, 1, BEYOND, 1)]),
        ("pool_gate", "weight", [(1, 1, 1, 1), (BEYOND, 1, 1)]),
        ("gate_scores", "q_gate", [(1, 1, BEYOND, 8), (1, 1, 1, 8)]),
        ("gate_select", "k_gate", [(BEYOND, 1, 1, 8)] * 2),
        ("gate_select", "k_gate", [(1, 1, 1, 8), (1, 1, BEYOND, 8)]),
    ],
)
def test_sizes_beyond_int(device, op, argument, shapes):
    """No kernel counts batch or heads in 64 bits: told, not cut."""
    tensors = [torch.ones(shape[-1], dtype=torch.bfloat16, device=device).expand(shape)
               for shape in shapes]  # fmt: skip
    with pytest.raises(RuntimeError, match=r"2\^31.+\. Split the batch\.$") as error:
        getattr(ops, op)(*tensors)
    assert_contract_text(error, op, "q_gate|k_gate" if argument == "k_gate" else argument)


def test_more_sequences_than_int(device):
    edges = torch.zeros(1, dtype=torch.int32, device=device).expand(BEYOND + 1)
    q = torch.ones(4, 1, 8, dtype=torch.bfloat16, device=device)
    packed = {"cu_seqlens_q": edges, "cu_seqlens_kv": edges, "max_rows_q": 4, "max_rows_kv": 4}
    with pytest.raises(RuntimeError, match=r"attn: cu_seqlens_q: .+2\^31 entries.+Split the batch"):
        ops.block_sparse_attn(q, q, q, **packed)
    with pytest.raises(RuntimeError, match=r"pool_gate: cu_seqlens: .+2\^31 entries.+Split the"):
        ops.pool_gate(q, cu_seqlens=edges, max_rows=4)
