"""I1's latents: diffusers' AutoencoderKL, with the scale and shift that its network was trained on.

A large picture is coded in tiles: equal ones, spread evenly, that overlap and are blended with
weights that rise from the border inwards (diffusers' own tiling leaves slivers at two borders).
Attention and normalisation then see a tile instead of the picture, so that tiles are as large as
what the model was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hidream.errors import ModelError
from hidream.folder import DIFFUSERS_STEM, Folder, open_folder
from hidream.models.loading import check_tensors, load_weights, quiet_imports, tensor_shapes
from hidream.tiling import Tile, join, split

TILE = 128  # latents: 1024 pixels
OVERLAP = 32
MAX_WHOLE = 160 * 160  # latents of a picture that is coded whole


class LatentCodec:
    """Pictures to latents and back; latents are fp32, of mean 0 and deviation 1 or so.

    `tile` and `overlap` are in latents, along both sides; pictures of more than `max_whole` latents
    are coded in tiles, which bounds the memory that they take. `keep` False has the autoencoder on
    the device only while it codes, and in CPU memory otherwise.
    """

    def __init__(
        self, vae: Any, *, device: torch.device | str, dtype: torch.dtype, keep: bool = True
    ):
        self.vae = vae
        self.device = torch.device(device)
        self.dtype = dtype
        self.keep = keep
        self.tile, self.overlap, self.max_whole = TILE, OVERLAP, MAX_WHOLE

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        keep: bool = True,
    ) -> LatentCodec:
        """The autoencoder of a repository's `vae`.

        Where its configuration says that fp16 is too narrow for it, fp32 stands in for it.

        Raises ModelError where diffusers is missing, or the folder is not whole or something else.
        """
        opened, vae = _on_meta(folder)
        if dtype == torch.float16 and opened.config.get("force_upcast", True):
            dtype = torch.float32
        load_weights(vae, opened, device=device if keep else "cpu", dtype=dtype)
        return cls(vae, device=device, dtype=dtype, keep=keep)

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

        with self._there():
            latents = self._coded(encode, pictures, self.factor, 1)
        return (latents - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c height width"]) -> Float[Tensor, "b 3 h w"]:
        """The pictures of latents: fp32, in [−1, 1] or little more."""

        def decode(part: Tensor) -> Tensor:
            return self.vae.decode(part.to(self.dtype)).sample.float()

        latents = latents.to(self.device, torch.float32) / self._scale + self._shift
        with self._there():
            return self._coded(decode, latents, 1, self.factor)

    def to(self, device: torch.device | str) -> LatentCodec:
        self.device = torch.device(device)
        self.vae.to(self.device if self.keep else "cpu")
        return self

    @contextmanager
    def _there(self) -> Iterator[None]:
        if self.keep:
            yield
            return
        try:
            with torch.inference_mode(False):
                self.vae.to(self.device)
            yield
        finally:
            with torch.inference_mode(False):
                self.vae.to("cpu")

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
        size = (x.shape[-2] // unit * out_unit, x.shape[-1] // unit * out_unit)
        tiles = split(size, self.tile * out_unit, self.overlap * out_unit, out_unit)

        def read(row: Tensor, tile: Tile) -> Tensor:
            rows, columns = (
                slice(place.start // out_unit * unit, place.stop // out_unit * unit)
                for place in (tile.rows, tile.columns)
            )
            return function(row[..., rows, columns])

        coded = [join([read(row, tile) for tile in tiles], tiles, size) for row in x.split(1)]
        return torch.cat(coded)


def verify_vae(folder: str | Path, channels: int) -> Folder:
    """Check a repository's `vae`: configuration, headers, names, shapes; reads no weights.

    Raises ModelError as `LatentCodec.open`, and where its latents have not so many `channels`.
    """
    opened, vae = _on_meta(folder)
    check_tensors(opened, tensor_shapes(vae))
    check_channels(opened.path.parent, vae.config.latent_channels, channels)
    return opened


def check_channels(parts: Path, there: int, read: int) -> None:
    """Raise ModelError unless the VAE in `parts` has the latents that a transformer reads."""
    if there != read:
        raise ModelError(
            f"the VAE in {parts} has latents of {there} channels; this transformer reads {read}.",
            "Use the VAE of its own repository.",
        )


def _on_meta(folder: str | Path) -> tuple[Folder, Any]:
    """A VAE's folder and the module that it describes, without its weights."""
    try:
        with quiet_imports():
            from diffusers import AutoencoderKL
    except ImportError as error:
        raise ModelError(
            "HiDream-I1's VAE needs diffusers, which is not installed.",
            'Install it with: pip install "hidream[i1]".',
        ) from error
    opened = open_folder(folder, stem=DIFFUSERS_STEM)
    found = opened.config.get("_class_name")
    if found != "AutoencoderKL":
        raise ModelError(
            f'{folder} holds "{found}"; I1\'s VAE is an AutoencoderKL.', "Check its path."
        )
    try:
        with torch.device("meta"):
            return opened, AutoencoderKL.from_config(dict(opened.config))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ModelError(
            f"the config.json in {folder} is not that of a VAE ({error}).",
            "Download the folder again.",
        ) from error
