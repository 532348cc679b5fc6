# SPDX-License-Identifier: Apache-2.0
"""The operators from torch alone: no seer_cuda is imported, only its library is loaded.

python examples/torch_library.py path/to/libseer_ops.so
"""

import sys

import torch

torch.ops.load_library(sys.argv[1])  # defines torch.ops.seer


# For torch.compile and torch.export: what shapes come out. `import seer_cuda` would bring this for
# all operators, and their gradients.
@torch.library.register_fake("seer::block_sparse_attn")
def _(q, k, v, block_bits=None, **options):
    batch, rows, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty(batch, heads, rows, dtype=torch.float32)


def attention(q, k, v, keep):
    """Attention over the blocks of 64 x 64 that keep, bool [1, heads, blocks, blocks], says."""
    bits = torch.ops.seer.pack_block_bits(keep)
    return torch.ops.seer.block_sparse_attn(q, k, v, bits, block_q=64, block_kv=64, causal=True)[0]


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 512, 4, 64, device=device, dtype=torch.bfloat16)
keep = torch.rand(1, 4, 8, 8, device=device) < 0.4
keep |= torch.eye(8, dtype=torch.bool, device=device)

out = attention(q, k, v, keep)
tokens = keep.repeat_interleave(64, 2).repeat_interleave(64, 3).tril()
q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # any strides will do
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=tokens)
error = (out.transpose(1, 2) - expected).abs().max().item()
print(f"{device}: largest difference from torch's attention {error:.4f}")
assert error < 0.02
