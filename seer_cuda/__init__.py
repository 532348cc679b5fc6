# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels and tools of SeerAttention: learned block-sparse attention.

Importing the package loads ``libseer_ops.so``, which defines ``torch.ops.seer``, and registers
shapes, gradients and, for ops without a compiled CUDA kernel, a CUDA implementation.

>>> import seer_cuda
>>> gate = seer_cuda.AttnGate(seer_cuda.GateConfig(heads_q=32, heads_kv=8, head_dim=128))
>>> mask = gate.select(q, k, "threshold", 5e-4)       # q, k before RoPE
>>> out = seer_cuda.block_sparse_attn(q_rope, k_rope, v, mask)
"""

# isort: off
from seer_cuda import _library

_library.load_ops()

# Each import registers something with torch.ops.seer, which exists from here on.
from seer_cuda import _autograd, _composite, _fake  # noqa: E402, F401

# isort: on
from seer_cuda import distill, reference, select  # noqa: E402
from seer_cuda._attention_map import AttentionMap, attention_map  # noqa: E402
from seer_cuda._version import __version__  # noqa: E402
from seer_cuda.block_mask import BlockMask  # noqa: E402
from seer_cuda.gate import AttnGate, GateConfig  # noqa: E402
from seer_cuda.ops import (  # noqa: E402
    attn_pool,
    block_sparse_attn,
    gate_scores,
    gate_select,
    pool_gate,
)

__all__ = [
    "AttentionMap",
    "AttnGate",
    "BlockMask",
    "GateConfig",
    "__version__",
    "attention_map",
    "attn_pool",
    "block_sparse_attn",
    "distill",
    "gate_scores",
    "gate_select",
    "pool_gate",
    "reference",
    "select",
]
