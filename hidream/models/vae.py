"""I1's latents: diffusers' AutoencoderKL, with the scale and shift that its network was trained on.

A large picture is coded in tiles: equal ones, spread evenly, that overlap and are blended with
weights that rise from the border inwards (diffusers' own tiling leaves slivers at two borders).
Attention and normalisation then see a tile instead of the picture, so that tiles are as large as
what the model was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hidream.errors import ModelError
from hidream.folder import open_folder
from hidream.models.loading import load_weights

STEM = "diffusion_pytorch_model"  # diffusers' name for the weights
TILE = 128  # latents: 1024 pixels
OVERLAP = 32
MAX_WHOLE = 160 * 160  # latents of a picture that is coded whole


class LatentCodec:
    """Pictures to latents and back; latents are fp32, of mean 0 and deviation 1 or so.

    `tile` and `overlap` are in latents, along both sides; pictures of more than `max_whole` latents
    are coded in tiles, which bounds the memory that they take.
    """

    def __init__(self, vae: Any, *, device: torch.device | str, dtype: torch.dtype):
        self.vae = vae
        self.device = torch.device(device)
        self.dtype = dtype
        self.tile, self.overlap, self.max_whole = TILE, OVERLAP, MAX_WHOLE

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LatentCodec:
        """The autoencoder of a repository's `vae`.

        Where its configuration says that fp16 is too narrow for it, fp32 stands in for it.

        Raises ModelError where diffusers is missing, or the folder is not whole or something else.
        """
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ModelError(
                "HiDream-I1's VAE needs diffusers, which is not installed.",
                'Install it with: pip install "hidream[i1]".',
            ) from error
        opened = open_folder(folder, stem=STEM)
        found = opened.config.get("_class_name")
        if found != "AutoencoderKL":
            raise ModelError(f'{folder} holds "{found}"; I1\'s VAE is an AutoencoderKL.')
        if dtype == torch.float16 and opened.config.get("force_upcast", True):
            dtype = torch.float32
        try:
            with torch.device("meta"):
                vae = AutoencoderKL.from_config(dict(opened.config))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ModelError(
                f"the config.json in {folder} is not that of a VAE ({error}).",
                "Download the folder again.",
            ) from error
        load_weights(vae, opened, device=device, dtype=dtype)
        return cls(vae, device=device, dtype=dtype)

    @property
    def channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def factor(self) -> int:
        """Pixels of a latent, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c height width"]:
        """The likeliest latents of pictures in [−1, 1], whose sides are multiples of `factor`."""
        if any(side % self.factor for side in pictures.shape[-2:]):
            raise ValueError(f"{list(pictures.shape)} pictures are not whole latents")

        def encode(part: Tensor) -> Tensor:
            return self.vae.encode(part.to(self.device, self.dtype)).latent_dist.mode().float()

        return (self._coded(encode, pictures, self.factor, 1) - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c height width"]) -> Float[Tensor, "b 3 h w"]:
        """The pictures of latents: fp32, in [−1, 1] or little more."""

        def decode(part: Tensor) -> Tensor:
            return self.vae.decode(part.to(self.dtype)).sample.float()

        latents = latents.to(self.device, torch.float32) / self._scale + self._shift
        return self._coded(decode, latents, 1, self.factor)

    def to(self, device: torch.device | str) -> LatentCodec:
        self.device = torch.device(device)
        self.vae.to(self.device)
        return self

    @property
    def _scale(self) -> float:
        return self.vae.config.scaling_factor

    @property
    def _shift(self) -> float:
        return self.vae.config.shift_factor or 0.0

    def _coded(
        self, function: Callable[[Tensor], Tensor], x: Tensor, unit: int, out_unit: int
    ) -> Tensor:
        """Row by row, so that memory and bits are those of one picture; in tiles where large."""
        if x.shape[-2] * x.shape[-1] <= self.max_whole * unit**2:
            return torch.cat([function(row) for row in x.split(1)])
        options = {"tile": self.tile, "overlap": self.overlap, "unit": unit, "out_unit": out_unit}
        return torch.cat([in_tiles(function, row, **options) for row in x.split(1)])


def in_tiles(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b c h w"],
    *,
    tile: int,
    overlap: int,
    unit: int = 1,
    out_unit: int = 1,
) -> Float[Tensor, "b d height width"]:
    """`function` of overlapping tiles of `x`, blended.

    Tiles are `tile` units wide, or as `x` where that is smaller, and overlap by `overlap` units or
    more; a unit is so many places of `x`, and `out_unit` places of what the function makes of it.
    Where tiles overlap, weights rise linearly with the distance to a tile's border, and add up to
    1.
    """
    rows, columns = (side // unit for side in x.shape[-2:])
    total = weights = None
    for top in _starts(rows, tile, overlap):
        for left in _starts(columns, tile, overlap):
            high, wide = min(tile, rows), min(tile, columns)
            made = function(x[(..., *_window(top, left, high, wide, unit))])
            if total is None or weights is None:
                total = made.new_zeros(*made.shape[:2], rows * out_unit, columns * out_unit)
                weights = made.new_zeros(total.shape[-2:])
            down, across = (_ramp(side, overlap * out_unit).to(made) for side in made.shape[-2:])
            weight, place = down[:, None] * across, _window(top, left, high, wide, out_unit)
            total[(..., *place)] += made * weight
            weights[place] += weight
    assert total is not None
    assert weights is not None
    return total / weights


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: as few as there can be, spread evenly."""
    if side <= tile:
        return [0]
    count = math.ceil((side - overlap) / (tile - overlap))
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]


def _window(top: int, left: int, high: int, wide: int, unit: int) -> tuple[slice, slice]:
    return (
        slice(top * unit, (top + high) * unit),
        slice(left * unit, (left + wide) * unit),
    )


def _ramp(size: int, fade: int) -> Float[Tensor, " size"]:
    """Weights that rise to 1 over `fade` places from both ends."""
    distance = torch.minimum(torch.arange(size), torch.arange(size).flip(0)) + 0.5
    return (distance / max(fade, 1)).clamp(max=1)
