"""A tiny Hi-DiT whose every weight is random, and what it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from hidream.models.hidit.config import HIDIT_TINY, HiDiTConfig
from hidream.models.hidit.model import HiDiT, new_hidit


def random_hidit(config: HiDiTConfig = HIDIT_TINY, seed: int = 0) -> HiDiT:
    """Nothing is zero, so that every part shows in the answer."""
    generator = torch.Generator().manual_seed(seed)
    model = new_hidit(config, generator).requires_grad_(False)
    for weight in model.parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        size = 0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5
        weight.copy_(size * drawn)
    model.set_statistics(
        torch.randn(config.in_channels, generator=generator),
        0.5 + torch.rand(config.in_channels, generator=generator),
    )
    return model.eval()


def inputs(
    config: HiDiTConfig = HIDIT_TINY, batch: int = 3, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, sigma, labels and noisy pixels of a whole batch."""
    generator = torch.Generator().manual_seed(seed)
    side = config.latent_size
    return (
        torch.randn(batch, config.in_channels, side, side, generator=generator),
        0.3 * torch.rand(batch, generator=generator),
        torch.randint(config.num_classes + 1, (batch,), generator=generator),
        torch.randn(batch, 3, config.image_size, config.image_size, generator=generator),
    )
