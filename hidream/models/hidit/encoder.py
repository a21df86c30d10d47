"""What a frozen encoder says of a picture, one feature a token: REPA's targets, perceptual DINO.

DINOv2 (arXiv 2304.07193) is asked as REPA (arXiv 2410.06940) asks it: ImageNet's mean and
deviation, the picture brought to 14 pixels a token (256 become 224), its positions to the grid of
the tokens once, and of the answer the normed patch tokens.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn

from hidream.errors import ModelError, UsageError
from hidream.folder import PICKLES, read_config
from hidream.locating import fetch
from hidream.models.loading import quiet_imports
from hidream.registry import nearest

logger = logging.getLogger(__name__)

REPOS = {
    "dinov2-vit-s": "facebook/dinov2-small",
    "dinov2-vit-b": "facebook/dinov2-base",
    "dinov2-vit-l": "facebook/dinov2-large",
    "dinov2-vit-g": "facebook/dinov2-giant",
}
WIDTHS = {"dinov2-vit-s": 384, "dinov2-vit-b": 768, "dinov2-vit-l": 1024, "dinov2-vit-g": 1536}
STAND_IN = "stand-in"
STAND_IN_WIDTH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red, green, blue
PIXELS_PER_TOKEN = 16  # of the picture, where nothing else is said
_AGAIN = "Download it again."


@runtime_checkable
class Encoder(Protocol):
    """`name` says what the features are; `width` is their last axis."""

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    def __call__(self, pictures: Tensor) -> Tensor:
        """UInt8 (b, 3, H, W) → fp32 (b, l, width), row by row of the tokens' grid."""
        ...

    def features(self, pixels: Tensor) -> Tensor:
        """The same of values in [−1, 1], with gradients for them."""
        ...


def open_encoder(
    enc_type: str,
    path: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    grid: int | None = None,
) -> Encoder:
    """The encoder that `--enc-type` names.

    `path`: a folder with transformers' Dinov2Model in safetensors; None: the hub's cache on this
    machine. "stand-in" needs no weights. `grid`: tokens along a side; None: one for 16 pixels.

    Raises UsageError for an unknown name, ModelError where the weights are not there or not right.
    """
    if enc_type == STAND_IN:
        return StandIn(grid=grid, device=device)
    if enc_type not in REPOS:
        raise UsageError(
            f'unknown encoder "{enc_type}"; {nearest(enc_type, [*REPOS, STAND_IN])}',
            "Only DINOv2's features are known here.",
        )
    folder = Path(path).expanduser() if path else fetch(REPOS[enc_type], local_only=True)
    return Dinov2(enc_type, _load_dinov2(folder, enc_type, device, dtype), grid=grid)


class Dinov2:
    """transformers' Dinov2Model, frozen, asked as REPA does. `module` may be compiled in place."""

    def __init__(self, name: str, module: Any, *, grid: int | None = None):
        self.name = name
        self.module = module
        self.grid = grid
        self.width: int = module.config.hidden_size
        self.patch_size: int = module.config.patch_size
        self._learnt: Tensor = module.embeddings.position_embeddings.detach()
        like = next(module.parameters())
        mean, std = (torch.tensor(t, device=like.device)[:, None, None] for t in (MEAN, STD))
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._positions_are: tuple[int, int] | None = None

    @torch.no_grad()
    def __call__(self, pictures: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b l z"]:
        return self._ask(pictures.to(self._scale) * self._scale + self._shift)

    def features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b l z"]:
        half = 127.5 * self._scale
        return self._ask(pixels.to(half) * half + (half + self._shift))

    def _ask(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b l z"]:
        rows, columns = _token_grid(x, self.grid)
        size = (rows * self.patch_size, columns * self.patch_size)
        x = F.interpolate(x, size, mode="bicubic", align_corners=False)
        self._set_positions(rows, columns)
        hidden = self.module(x.to(next(self.module.parameters()).dtype)).last_hidden_state
        return hidden[:, 1:].float()  # the first is the class token

    def _set_positions(self, rows: int, columns: int) -> None:
        """Bring the learnt positions to the grid, once: as timm and so REPA do, antialiased.

        For grids that are no square transformers does it, without antialiasing.
        """
        if rows != columns:
            rows = columns = round((self._learnt.shape[1] - 1) ** 0.5)
        if self._positions_are == (rows, columns):
            return
        first, rest = self._learnt[:, :1], self._learnt[:, 1:].float()
        grid = rearrange(rest, "1 (h w) d -> 1 d h w", h=round(rest.shape[1] ** 0.5))
        if grid.shape[2:] != (rows, columns):
            grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
        rest = rearrange(grid, "1 d h w -> 1 (h w) d").to(first.dtype)
        self.module.embeddings.position_embeddings = nn.Parameter(
            torch.cat([first, rest], dim=1), requires_grad=False
        )
        self._positions_are = (rows, columns)


class StandIn:
    """Features of a fixed random convolutional network: for tests and small runs, never for REPA.

    Its weights are a function of `seed`. The picture is brought to 8 pixels a token and goes
    through three convolutions that halve it; features have mean 0 and deviation 1 in every token.
    """

    def __init__(
        self,
        *,
        grid: int | None = None,
        seed: int = 0,
        width: int = STAND_IN_WIDTH,
        device: torch.device | str = "cpu",
    ):
        self.name = f"{STAND_IN} (random convolutions, seed {seed}; not REPA's features)"
        self.grid = grid
        self.width = width
        generator = torch.Generator().manual_seed(seed)
        sizes = (3, width // 2, width, width)
        self._kernels = [
            (torch.randn(after, before, 4, 4, generator=generator) / (4 * before**0.5)).to(device)
            for before, after in pairwise(sizes)
        ]

    @torch.no_grad()
    def __call__(self, pictures: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b l z"]:
        return self.features(pictures.to(self._kernels[0]) / 127.5 - 1)

    def features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b l z"]:
        rows, columns = _token_grid(pixels, self.grid)
        x = F.interpolate(pixels, (8 * rows, 8 * columns), mode="bilinear", antialias=True)
        for kernel in self._kernels:
            x = F.silu(F.conv2d(x, 2 * kernel, stride=2, padding=1))
        return F.layer_norm(rearrange(x, "b z h w -> b (h w) z"), (self.width,))


def _token_grid(pictures: Tensor, side: int | None) -> tuple[int, int]:
    """Rows and columns of tokens: `side` of each, or one for 16 pixels."""
    if side is not None:
        return side, side
    height, width = pictures.shape[-2:]
    return height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN


def _load_dinov2(
    folder: Path, enc_type: str, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """Raises ModelError, before weights are read where it can be told."""
    if folder.is_file() or not folder.exists():
        what = "is a file" if folder.is_file() else "does not exist"
        raise ModelError(
            f"the encoder's folder {folder} {what}.",
            f"Name a folder of {REPOS[enc_type]}, or leave the flag out to use the hub's cache.",
        )
    config, _ = read_config(folder)
    found = (config.get("model_type"), config.get("hidden_size"))
    if found[0] != "dinov2":
        raise ModelError(
            f"{folder} holds a {found[0]}, not DINOv2.", f"Use {REPOS[enc_type]}, or its like."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = any(file.suffix in PICKLES for file in folder.iterdir())
        raise ModelError(
            f"{folder} holds {'a pickle, which is never loaded' if pickled else 'no weights'}.",
            f'Get its safetensors with "hidream models pull {REPOS[enc_type]}".',
        )
    if found[1] != WIDTHS[enc_type]:
        logger.warning(
            "the encoder in %s is %s wide; %s has %d", folder, found[1], enc_type, WIDTHS[enc_type]
        )
    try:
        module, told = _from_pretrained(folder, dtype)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"the encoder in {folder} cannot be read: {reason}", _AGAIN) from error
    lacking = sorted(told["missing_keys"])
    if lacking:
        raise ModelError(
            f"the encoder in {folder} lacks {len(lacking)} tensors: {', '.join(lacking[:3])}.",
            _AGAIN,
        )
    for name, weight in module.named_parameters():
        if not weight.isfinite().all():
            raise ModelError(f"{name} in {folder} holds values that are not finite.", _AGAIN)
    return module.requires_grad_(False).eval().to(torch.device(device))


def _from_pretrained(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """transformers' own loading, which knows the names that older versions wrote; in silence."""
    with quiet_imports():
        from transformers import Dinov2Model
        from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        loaded: Any = Dinov2Model.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        return loaded
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
