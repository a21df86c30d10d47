"""A tiny I1 with random weights, and what it is given."""

from __future__ import annotations

from dataclasses import replace

import torch

from hidream.models.i1.config import I1_TINY, I1Config
from hidream.models.i1.model import I1, Features
from tests.parity.i1_weights import random_state

TINIEST = replace(I1_TINY, num_layers=1, num_single_layers=1, llama_layers=(0, 1))


def random_i1(config: I1Config = I1_TINY, seed: int = 0) -> I1:
    model = I1(config)
    model.load_state_dict(random_state(config, torch.Generator().manual_seed(seed)))
    return model.requires_grad_(False).eval()


def features(config: I1Config = I1_TINY, batch: int = 2, seed: int = 1) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        t5=torch.randn(batch, 7, config.t5_size, generator=generator),
        llama=torch.randn(
            max(config.llama_layers) + 1, batch, 5, config.llama_size, generator=generator
        ),
        pooled=torch.randn(batch, config.pooled_size, generator=generator),
    )


def latents(height: int, width: int, batch: int = 2, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, I1_TINY.in_channels, height, width, generator=generator)
