"""Fresh weights of a Hi-DiT, all in one place: a function of the generator alone.

They are SiT's: xavier for linear maps, 0.02 for labels and times, and zero for what modulates and
for the last layer, so that at first no block changes a token and the velocity is 0 (adaLN-zero,
arXiv 2212.09748).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hidream.models.hidit.blocks import PatchEmbedder, TimestepEmbedder, positions

PIXEL_PREFIX = "pixel_"  # of the names of all that the pixel branch adds
STD = 0.02


@torch.no_grad()
def init_latents(model: Any, generator: torch.Generator) -> None:
    """All but the pixel branch; latent statistics become mean 0 and variance 1."""
    config = model.config
    for name, module in model.named_modules():
        if name.startswith(PIXEL_PREFIX):
            continue
        if isinstance(module, nn.Linear):
            _init_linear(module, generator)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    _init_patches(model.x_embedder, generator)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=STD, generator=generator)
    _init_time(model.t_embedder, generator)
    for part in (*model.blocks, model.final_layer):
        nn.init.zeros_(part.adaLN_modulation[1].weight)
    nn.init.zeros_(model.final_layer.linear.weight)
    model.pos_embed.copy_(positions(config.hidden_size, config.grid))
    model.bn.running_mean.zero_()
    model.bn.running_var.fill_(1.0)
    model.bn.num_batches_tracked.zero_()


@torch.no_grad()
def init_pixels(model: Any, generator: torch.Generator) -> None:
    """The pixel branch, whose last convolution is zero: it predicts mid-grey, whatever it sees.

    Where pixels are added to latents, they add nothing yet.
    """
    config, head = model.config, model.pixel_head
    _init_patches(model.pixel_embedder, generator)
    if config.attention == "add":
        nn.init.zeros_(model.pixel_embedder.proj.weight)
    else:
        nn.init.normal_(model.pixel_type, std=STD, generator=generator)
    if config.pixel_clock == "rescaled":
        _init_time(model.pixel_t_embedder, generator)
    for conv in head.convs:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(conv.bias)
    nn.init.zeros_(head.convs[-1].weight)
    nn.init.zeros_(head.adaLN_modulation[1].weight)
    nn.init.zeros_(head.adaLN_modulation[1].bias)


def _init_linear(layer: nn.Linear, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)


def _init_patches(embedder: PatchEmbedder, generator: torch.Generator) -> None:
    proj: Any = embedder.proj
    nn.init.xavier_uniform_(proj.weight.flatten(1), generator=generator)
    nn.init.zeros_(proj.bias)


def _init_time(embedder: TimestepEmbedder, generator: torch.Generator) -> None:
    for layer in (embedder.mlp[0], embedder.mlp[2]):
        linear: Any = layer
        nn.init.normal_(linear.weight, std=STD, generator=generator)
        nn.init.zeros_(linear.bias)
