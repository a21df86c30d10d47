"""Names and shapes of all of an O1's tensors, from its configuration alone."""

from __future__ import annotations

import re

from hidream.models.o1.config import O1Config, VisionConfig
from hidream.train.flops import NUM_FREQUENCIES

Shapes = dict[str, tuple[int, ...]]

_BLOCK = re.compile(r"model\.language_model\.layers\.(\d+)\.")
# Which dimension of a matrix tensor parallel divides: see `hidream.train.tensor_parallel`.
TP_DIMENSION = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 0),
    **dict.fromkeys(("o_proj", "down_proj"), 1),
}


def block_of(name: str) -> int | None:
    """The decoder's block that a tensor is in, if it is in one."""
    found = _BLOCK.match(name)
    return int(found[1]) if found else None


def shapes(config: O1Config) -> Shapes:
    """Every tensor once: a head that is tied to the embeddings is not there."""
    text, size = config.text, config.text.hidden_size
    width, kv_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    block: Shapes = {
        "self_attn.q_proj.weight": (width, size),
        "self_attn.k_proj.weight": (kv_width, size),
        "self_attn.v_proj.weight": (kv_width, size),
        "self_attn.o_proj.weight": (size, width),
        "self_attn.q_norm.weight": (text.head_dim,),
        "self_attn.k_norm.weight": (text.head_dim,),
        "mlp.gate_proj.weight": (text.intermediate_size, size),
        "mlp.up_proj.weight": (text.intermediate_size, size),
        "mlp.down_proj.weight": (size, text.intermediate_size),
        "input_layernorm.weight": (size,),
        "post_attention_layernorm.weight": (size,),
    }
    decoder, found = "model.language_model", {"lm_head.weight": (text.vocab_size, size)}
    if not config.has_lm_head or config.tie_word_embeddings:
        found = {}
    return {
        **found,
        f"{decoder}.embed_tokens.weight": (text.vocab_size, size),
        f"{decoder}.norm.weight": (size,),
        **{
            f"{decoder}.layers.{i}.{name}": shape
            for i in range(text.num_layers)
            for name, shape in block.items()
        },
        **_linear("model.t_embedder1.mlp.0", NUM_FREQUENCIES, size),
        **_linear("model.t_embedder1.mlp.2", size, size),
        "model.x_embedder.proj1.weight": (config.bottleneck_dim, config.patch_dim),
        **_linear("model.x_embedder.proj2", config.bottleneck_dim, size),
        **_linear("model.final_layer2.linear", size, config.patch_dim),
        **{f"model.visual.{n}": s for n, s in _vision(config.vision, size).items()},
    }


def _vision(config: VisionConfig, out_size: int) -> Shapes:
    size, side = config.hidden_size, config.patch_size
    found: Shapes = {
        "patch_embed.proj.weight": (size, 3, config.temporal_patch_size, side, side),
        "patch_embed.proj.bias": (size,),
        "pos_embed.weight": (config.num_positions, size),
        **_merger("merger", config, out_size, normed=size),
    }
    merged = size * config.merge_size**2
    for i in range(len(config.deepstack_layers)):
        found |= _merger(f"deepstack_merger_list.{i}", config, out_size, normed=merged)
    for i in range(config.num_layers):
        found |= {
            **_norm(f"blocks.{i}.norm1", size),
            **_norm(f"blocks.{i}.norm2", size),
            **_linear(f"blocks.{i}.attn.qkv", size, 3 * size),
            **_linear(f"blocks.{i}.attn.proj", size, size),
            **_linear(f"blocks.{i}.mlp.linear_fc1", size, config.intermediate_size),
            **_linear(f"blocks.{i}.mlp.linear_fc2", config.intermediate_size, size),
        }
    return found


def _merger(name: str, config: VisionConfig, out_size: int, *, normed: int) -> Shapes:
    merged = config.hidden_size * config.merge_size**2
    return {
        **_norm(f"{name}.norm", normed),
        **_linear(f"{name}.linear_fc1", merged, merged),
        **_linear(f"{name}.linear_fc2", merged, out_size),
    }


def _linear(name: str, inside: int, out: int) -> Shapes:
    return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
