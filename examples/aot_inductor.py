# SPDX-License-Identifier: Apache-2.0
"""Compiles a model that calls torch.ops.seer ahead of time, for examples/libtorch.cpp.

python examples/aot_inductor.py model.pt2
"""

import sys

import torch

import seer_cuda  # noqa: F401  the operators, and their fakes for torch.export


class Attention(torch.nn.Module):
    """The part of a model between its projections."""

    def forward(self, q, k, v, block_bits):
        return torch.ops.seer.block_sparse_attn(q, k, v, block_bits, causal=True)[0]


q = torch.randn(1, 512, 4, 64, dtype=torch.bfloat16)
k, v = torch.randn(2, 1, 512, 2, 64, dtype=torch.bfloat16)
bits = torch.full((1, 1, 8, 1), 7, dtype=torch.int32)
program = torch.export.export(Attention(), (q, k, v, bits))
print(torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1]))
