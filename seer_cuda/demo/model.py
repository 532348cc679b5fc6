# SPDX-License-Identifier: Apache-2.0
"""A small causal language model over bytes whose attention can be replaced from outside.

RMSNorm, RoPE, grouped-query attention with normalised q and k, SwiGLU. Three additions let so small
a model learn within minutes to look far back, to where the text was like the present one: a byte's
embedding is a sum over the last bytes too, keys mix in the key of the previous token (KV shifting
attention, Xu et al. 2024), and the key projection starts equal to a query projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_cuda.demo.config import ModelConfig

VOCABULARY = 256


@dataclass(frozen=True)
class AttentionInput:
    """What one layer gives to its attention.

    Attributes:
        layer: Index of the layer.
        q, k: ``[batch, rows, heads_q | heads_kv, head_dim]`` before RoPE: what a gate reads.
        q_rope, k_rope: The same after RoPE: what attention reads.
        v: ``[batch, rows, heads_kv, head_dim]``.
    """

    layer: int
    q: Tensor
    k: Tensor
    q_rope: Tensor
    k_rope: Tensor
    v: Tensor


#: From its input to ``[batch, rows, heads_q, head_dim]``.
Attention = Callable[[AttentionInput], Tensor]


def dense_attention(x: AttentionInput) -> Tensor:
    """Differentiable causal attention by torch."""
    q, k, v = (t.transpose(1, 2) for t in (x.q_rope, x.k_rope, x.v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """float32 ``[head_dim / 2]``, shared by the model and its gates."""
    half = config.head_dim // 2
    return (config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on ``[batch, rows, heads, head_dim]``: channel c is paired with c + head_dim / 2."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.float().chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


class Layer(nn.Module):
    """Attention and SwiGLU, each on a normalised input and added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        width_q, width_kv = (h * config.head_dim for h in (config.heads_q, config.heads_kv))
        self.norm_attention = nn.RMSNorm(config.width)
        self.q = nn.Linear(config.width, width_q, bias=False)
        self.k = nn.Linear(config.width, width_kv, bias=False)
        self.v = nn.Linear(config.width, width_kv, bias=False)
        self.norm_q = nn.RMSNorm(config.head_dim)
        self.norm_k = nn.RMSNorm(config.head_dim)
        # Shares of a token's own key and of the previous one's, per KV head.
        self.key_mix = nn.Parameter(torch.tensor([[0.0, 1.0]]).repeat(config.heads_kv, 1))
        self.out = nn.Linear(width_q, config.width, bias=False)
        self.norm_mlp = nn.RMSNorm(config.width)
        self.gate_up = nn.Linear(config.width, 2 * config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.width, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> AttentionInput:
        """q, k before and after RoPE, and v."""
        x = self.norm_attention(x)
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v)
        )
        own, previous = self.key_mix.to(k.dtype).unsqueeze(-1).unbind(1)
        k = own * k + previous * F.pad(k, (0, 0, 0, 0, 1, 0))[:, :-1]
        # Norms run in float32; attention takes the width of the projections.
        q, k = self.norm_q(q.float()).to(v.dtype), self.norm_k(k.float()).to(v.dtype)
        return AttentionInput(self.index, q, k, rotate(q, cos, sin), rotate(k, cos, sin), v)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        x = x + self.out(attention(self.project(x, cos, sin)).flatten(2))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class CausalLM(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Row `256 * age + byte` of one table: a byte that lies `age` positions back.
        self.embedding = nn.Embedding(VOCABULARY * config.bytes_seen, config.width)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        angle = torch.outer(torch.arange(config.context).float(), rope_frequencies(config))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Variance-preserving projections; branches that write to the residual start smaller."""
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)
        for layer in self.layers:
            for linear in (layer.q, layer.k, layer.v, layer.gate_up):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            for linear in (layer.out, layer.down):
                nn.init.normal_(linear.weight, std=0.5 * linear.in_features**-0.5)
            # A key starts as the query of the token before: attention begins as a search for
            # earlier text like the present one, which otherwise takes most of the training to find.
            heads = layer.q.weight.unflatten(0, (self.config.heads_q, -1))
            group = self.config.heads_q // self.config.heads_kv
            layer.k.weight.data.copy_(heads[::group].flatten(0, 1))

    def forward(self, tokens: Tensor, attention: Attention = dense_attention) -> Tensor:
        """Logits ``[batch, rows, 256]`` of int64 tokens ``[batch, rows]``, rows <= context."""
        rows, ages = tokens.shape[1], self.config.bytes_seen
        # Position t sees the bytes t, t - 1, ..., zeros before the start.
        recent = F.pad(tokens, (ages - 1, 0)).unfold(1, ages, 1).flip(-1)
        rows_of_table = recent + VOCABULARY * torch.arange(ages, device=tokens.device)
        x = F.embedding_bag(rows_of_table.flatten(0, 1), self.embedding.weight, mode="sum")
        x = x.view(*tokens.shape, -1)
        for layer in self.layers:
            x = layer(x, self.cos[:rows], self.sin[:rows], attention)
        return self.head(self.norm(x))


def next_byte_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy in nats, fp32 ``[batch, rows]``, of logits ``[batch, rows, 256]`` for tokens
    ``[batch, rows + 1]``."""
    targets = tokens[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)
