"""Three ways to compute the same picture's velocity: ours, and two to be measured against.

All share the embeddings, the vision tower and the pixel head; they differ in how the decoder is run
over the sequence `[causal tokens | timestep | target | references]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hidream.models.o1.model import O1, Prefix
from hidream.models.o1.tokens import Tokens


class Way(ABC):
    """One way to run the decoder. `begin` is paid once a picture, `step` at every step."""

    def __init__(self, model: O1):
        self.model = model

    @abstractmethod
    def begin(self, branches: list[Tokens]) -> None:
        """Whatever this way computes before the first step."""

    @abstractmethod
    def step(self, x_t: Float[Tensor, "b n p"], sigma: Tensor) -> Float[Tensor, "b n p"]:
        """Clean patches of every branch."""


class Ours(Way):
    """The causal tokens once a picture; then only what is generated, all branches at once."""

    prefix: Prefix

    def begin(self, branches: list[Tokens]) -> None:
        self.prefix = self.model.prefill(branches)

    def step(self, x_t: Float[Tensor, "b n p"], sigma: Tensor) -> Float[Tensor, "b n p"]:
        return self.model.predict_x0(x_t, sigma, self.prefix)


class WholeSequence(Way):
    """Every token at every step, branch after branch; `decode` says by which attention.

    Words and the vision tower's tokens are embedded once a picture, which is generous: the
    published pipeline does that at every step too.
    """

    def __init__(self, model: O1):
        super().__init__(model)
        self.layers, self.rotary, self.norm = _transformers_decoder(model)

    def begin(self, branches: list[Tokens]) -> None:
        uit = self.model.model
        self.branches = []
        for tokens in branches:
            hidden, deepstack = self.model.embed_causal([tokens])
            cos_sin = self.rotary(hidden, tokens.position_ids[:, None])
            references = uit.x_embedder(tokens.references)
            self.branches.append((tokens, hidden, deepstack, references, cos_sin))

    def step(self, x_t: Float[Tensor, "b n p"], sigma: Tensor) -> Float[Tensor, "b n p"]:
        uit, outputs = self.model.model, []
        for (tokens, causal, deepstack, references, cos_sin), x in zip(
            self.branches, x_t, strict=True
        ):
            time = uit.t_embedder1((1 - sigma).reshape(1))
            hidden = torch.cat([causal, time, uit.x_embedder(x), references])[None]
            hidden = self.decode(hidden, len(causal), deepstack, cos_sin)
            first = len(causal) + 1
            outputs.append(uit.final_layer2(hidden[0, first : first + tokens.num_target]))
        return torch.stack(outputs)

    def decode(
        self,
        hidden: Float[Tensor, "1 l d"],
        num_causal: int,
        deepstack: tuple[Float[Tensor, "a d"], ...],
        cos_sin: tuple[Tensor, Tensor],
    ) -> Float[Tensor, "1 l d"]:
        for i, layer in enumerate(self.layers):
            hidden = self.layer(layer, hidden, num_causal, cos_sin)
            if i < len(deepstack):
                hidden = hidden + F.pad(deepstack[i], (0, 0, 0, hidden.shape[1] - num_causal))
        return self.norm(hidden)

    @abstractmethod
    def layer(
        self, layer: Any, hidden: Tensor, num_causal: int, cos_sin: tuple[Tensor, Tensor]
    ) -> Tensor:
        """One of transformers' decoder layers over the whole sequence."""


class Plain(WholeSequence):
    """transformers' Qwen3-VL text layers as they are, with a dense mask."""

    def layer(
        self, layer: Any, hidden: Tensor, num_causal: int, cos_sin: tuple[Tensor, Tensor]
    ) -> Tensor:
        order = torch.arange(hidden.shape[1], device=hidden.device)
        mask = (order[:, None] >= num_causal) | (order[:, None] >= order)
        return layer(hidden, position_embeddings=cos_sin, attention_mask=mask[None, None])


class TwoPass(WholeSequence):
    """The published scheme: a causal pass over the causal tokens and a full pass over all of them,
    in every layer of every step, by fused attention without a mask."""

    def layer(
        self, layer: Any, hidden: Tensor, num_causal: int, cos_sin: tuple[Tensor, Tensor]
    ) -> Tensor:
        own, normed = layer.self_attn, layer.input_layernorm(hidden)
        shape = (*normed.shape[:-1], -1, own.head_dim)
        q = own.q_norm(own.q_proj(normed).view(shape)).transpose(1, 2)
        k = own.k_norm(own.k_proj(normed).view(shape)).transpose(1, 2)
        v = own.v_proj(normed).view(shape).transpose(1, 2)
        q, k = _rotate(q, *cos_sin), _rotate(k, *cos_sin)
        grouped = q.shape[1] != k.shape[1]
        q_causal, k_causal, v_causal = (t[:, :, :num_causal] for t in (q, k, v))
        causal = F.scaled_dot_product_attention(
            q_causal, k_causal, v_causal, is_causal=True, enable_gqa=grouped
        )
        full = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        read = torch.cat([causal, full[:, :, num_causal:]], dim=2)
        hidden = hidden + own.o_proj(read.transpose(1, 2).flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


WAYS: dict[str, type[Way]] = {"ours": Ours, "plain": Plain, "two_pass": TwoPass}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _transformers_decoder(model: O1) -> tuple[Any, Any, Any]:
    """transformers' layers, rotary embedding and last norm around our very weights."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

    special = {f"<|{name}|>": i for i, name in enumerate(("image_pad", "video_pad"))}
    special |= {f"<|vision_{name}|>": i for i, name in enumerate(("start", "end"))}
    config: Any = qwen.Qwen3VLConfig(**model.config.to_dict(special)).text_config
    config._attn_implementation = "sdpa"
    own = model.model.language_model
    device = own.norm.weight.device
    with torch.device("meta"):
        layers = [qwen.Qwen3VLTextDecoderLayer(config, i) for i in range(len(own.layers))]
        norm = qwen.Qwen3VLTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    for theirs, ours in zip([*layers, norm], [*own.layers, own.norm], strict=True):
        theirs.load_state_dict(ours.state_dict(), assign=True)
    return layers, qwen.Qwen3VLTextRotaryEmbedding(config).to(device), norm
