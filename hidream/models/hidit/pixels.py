"""The pixel branch: the pixels' noise level, and the head that turns tokens into a clean picture.

How Hi-DiT's own branch is built was not published with its README: this one follows what it says
(pixel tokens in the same blocks, a light sub-pixel head on their features) and the reasons in
docs/hidit.md. Its weights are not those of the authors.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hidream.models.hidit.blocks import modulate
from hidream.models.hidit.config import HiDiTConfig

MIN_WIDTH = 8


class PixelHead(nn.Module):
    """Tokens → pixels: a linear map, then convolutions, with a pixel shuffle behind each.

    At a patch of 16, 1152 channels go 256 → 128 → 64 → 3 while the grid doubles four times
    (sub-pixel convolution: Shi et al. 2016, arXiv 1609.05158). The 3×3 windows reach across the
    borders of patches, which leaves no seams there. What is predicted is the clean picture x0:
    networks predict noise badly where a patch has many dimensions (JiT, arXiv 2511.13720).
    """

    def __init__(self, config: HiDiTConfig):
        super().__init__()
        size = config.hidden_size
        self.grid = config.grid
        self.factors = prime_factors(config.pixel_patch) or [1]
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))
        widths = [max(first_width(size) >> i, MIN_WIDTH) for i in range(len(self.factors) - 1)]
        inputs, outputs = [size, *widths], [*widths, 3]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after * factor**2, kernel_size=side, padding=side // 2)
            for before, after, factor, side in zip(
                inputs, outputs, self.factors, [1] + [3] * len(widths), strict=True
            )
        )

    def forward(
        self, tokens: Float[Tensor, "g l d"], condition: Float[Tensor, "g d"]
    ) -> Float[Tensor, "g 3 height width"]:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        x = rearrange(modulate(tokens, shift, scale), "g (h w) d -> g d h w", h=self.grid)
        for i, (conv, factor) in enumerate(zip(self.convs, self.factors, strict=True)):
            x = F.pixel_shuffle(conv(x if i == 0 else F.silu(x)), factor)
        return x


def pixel_noise_level(sigma: Float[Tensor, "*b"], config: HiDiTConfig) -> Float[Tensor, "*b"]:
    """The pixels' noise level where the latents' is `sigma`.

    `shared`: the same; at the gate, the pixels are made from the latents, decoded and noised.
    `rescaled`: pure noise from the gate upwards, min(1, sigma / gate), so that nothing has to be
    made there (separate schedules, latents first: arXiv 2602.11401).
    """
    return sigma if config.pixel_clock == "shared" else (sigma / config.gate).clamp(max=1)


def first_width(size: int) -> int:
    """Channels behind the first shuffle: a quarter of the tokens', down to a power of two."""
    return max(MIN_WIDTH, 2 ** int(math.log2(size / 4)))


def prime_factors(number: int) -> list[int]:
    """In rising order; none of 1."""
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found
