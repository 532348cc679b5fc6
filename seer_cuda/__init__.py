# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels and tools of SeerAttention: learned block-sparse attention.

Importing the package loads ``libseer_ops.so``, which defines ``torch.ops.seer``, and registers
shapes, gradients and, for ops without a compiled CUDA kernel, a CUDA implementation.

>>> import seer_cuda
>>> gate = seer_cuda.AttnGate(seer_cuda.GateConfig(heads_q=32, heads_kv=8, head_dim=128))
>>> mask = seer_cuda.gate_mask(q, k, gate, seer_cuda.Rule("threshold", 5e-4))  # before RoPE
>>> out = seer_cuda.block_sparse_attn(q_rope, k_rope, v, mask)
>>> out = seer_cuda.sparse_prefill(q_rope, k_rope, v, q, k, gate)  # the same in one call
"""

# isort: off
from seer_cuda import _library

_library.load_for_package()

# Each import registers something with torch.ops.seer, which exists from here on.
from seer_cuda import _autograd, _composite, _fake  # noqa: E402, F401

# isort: on
from seer_cuda import distill, heuristics, reference, select  # noqa: E402
from seer_cuda._attention_map import AttentionMap, attention_map  # noqa: E402
from seer_cuda._version import __version__  # noqa: E402
from seer_cuda.block_mask import BlockMask  # noqa: E402
from seer_cuda.gate import AttnGate, GateConfig  # noqa: E402
from seer_cuda.gate_cache import GateKeyCache  # noqa: E402
from seer_cuda.gate_ops import gate_scores, gate_select, pool_gate  # noqa: E402
from seer_cuda.ops import attn_pool, block_sparse_attn  # noqa: E402
from seer_cuda.prefill import gate_mask, sparse_prefill  # noqa: E402
from seer_cuda.select import Rule  # noqa: E402

__all__ = [
    "AttentionMap",
    "AttnGate",
    "BlockMask",
    "GateConfig",
    "GateKeyCache",
    "Rule",
    "__version__",
    "attention_map",
    "attn_pool",
    "block_sparse_attn",
    "distill",
    "gate_mask",
    "gate_scores",
    "gate_select",
    "heuristics",
    "pool_gate",
    "reference",
    "select",
    "sparse_prefill",
]
