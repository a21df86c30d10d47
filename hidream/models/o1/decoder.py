"""O1's decoder: a Qwen3 transformer that is told from outside who may read whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hidream.models.o1.config import TextConfig
from hidream.nn.rope import Rope, interleaved_mrope, rotate

# attend(layer)(q, k, v) -> the values read. Training, the prefix and a denoising step differ in
# nothing but this function.
Read = Callable[[Tensor, Tensor, Tensor], Tensor]
Attend = Callable[[int], Read]


class Decoder(nn.Module):
    """Embeddings, `num_layers` blocks and the final norm.

    `forward` takes hidden states of any leading shape, a token a row or `(l, d)` packed:
    only `attend` looks across tokens.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        # Zeros: drawing normals on the meta device costs half a second of imports.
        table = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Float[Tensor, "*b l d"],
        rope: Rope,
        attend: Attend,
        deepstack: Sequence[Float[Tensor, "*b l d"]] = (),
    ) -> Float[Tensor, "*b l d"]:
        """`deepstack[i]`, zero except at vision tokens, is added after block i."""
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, rope, attend(i))
            if i < len(deepstack):
                hidden = hidden + deepstack[i]
        return self.norm(hidden)

    def rope(self, position_ids: Int[Tensor, "3 *b l"]) -> Rope:
        config = self.config
        return interleaved_mrope(
            position_ids, config.head_dim, config.rope_theta, config.mrope_sections
        )


class Block(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rope: Rope, read: Read) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, read)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Grouped-query attention with a norm on every query and key head."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rope: Rope, read: Read) -> Tensor:
        q, k, v = (
            rearrange(projection(hidden), "... (h d) -> ... h d", d=self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        return self.o_proj(rearrange(read(q, k, v), "... h d -> ... (h d)"))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)): arXiv 2002.05202, eq. 6."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
