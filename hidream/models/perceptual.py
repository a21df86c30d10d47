"""How far two pictures are apart to a frozen network: LPIPS, and perceptual DINO.

Both take values in [−1, 1] and give one number a picture. Gradients reach the pictures, never the
network. Without published weights, a random network of the same shape stands in, and says so.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from hidream.errors import ModelError
from hidream.folder import PICKLES, read_header
from hidream.locating import fetch
from hidream.models.hidit.encoder import MEAN, STAND_IN, STD, Encoder, open_encoder

VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_DEPTHS = (2, 2, 3, 3, 3)
STAND_IN_WIDTHS = (8, 16, 32, 32, 32)
LONGEST_SIDE = 512  # pixels: what DINO sees of a larger picture is scaled down
_NAMES = 'It must hold torchvision\'s "features.N.weight" and lpips\' "linN.model.1.weight".'


class Distance(Protocol):
    """`name` says which network judges."""

    @property
    def name(self) -> str: ...

    def __call__(
        self, a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, " b"]:
        """The distance of each pair; gradients flow to `a`."""
        ...


class Lpips(nn.Module):
    """LPIPS (arXiv 1801.03924, equation 1): d = Σ_l mean_hw Σ_c w_lc (â_lc − b̂_lc)².

    â, b̂ are VGG16's activations after the last ReLU of each of its five levels, normed over the
    channels. `widths`: channels of each level; others than VGG16's are for stand-ins.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, name: str, widths: tuple[int, ...]):
        super().__init__()
        self.name = name
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        for level, (before, width) in enumerate(pairwise((3, *widths))):
            layers += [nn.MaxPool2d(2)] if level else []
            for i in range(VGG_DEPTHS[level]):
                layers += [nn.Conv2d(width if i else before, width, 3, padding=1), nn.ReLU()]
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.weights = nn.ParameterList(torch.full((w,), 1 / w) for w in widths)
        mean, std = (torch.tensor(t)[:, None, None] for t in (MEAN, STD))
        self.register_buffer("scale", 1 / (2 * std), persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
        self.requires_grad_(False).eval()

    def forward(
        self, a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, " b"]:
        with torch.no_grad():
            wanted = self.levels(b)
        total = torch.zeros(len(a), device=a.device)
        for weight, found, target in zip(self.weights, self.levels(a), wanted, strict=True):
            square = (found - target).square() * weight[:, None, None]
            total = total + square.sum(1).mean((1, 2))
        return total

    def levels(self, pixels: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c _ _"]]:
        """The activations of all levels, each of length 1 over its channels."""
        x = pixels.float() * self.scale + self.shift
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found.append(F.normalize(x, dim=1, eps=1e-10))
        return found


class PatchCosine:
    """1 − the mean cosine of an encoder's patch features: perceptual DINO, for DINOv2.

    Of pictures larger than 512 pixels it sees a smaller copy.
    """

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.name = encoder.name

    def __call__(
        self, a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, " b"]:
        with torch.no_grad():
            wanted = self.encoder.features(_smaller(b))
        found = self.encoder.features(_smaller(a))
        return 1 - F.cosine_similarity(found, wanted, dim=-1).mean(1)


def _smaller(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 _ _"]:
    height, width = pixels.shape[-2:]
    scale = LONGEST_SIDE / max(height, width)
    if scale >= 1:
        return pixels.float()
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(pixels.float(), size, mode="bilinear", antialias=True)


def open_lpips(where: str, device: torch.device | str = "cpu") -> Lpips:
    """LPIPS from a safetensors file, or from all of them in a folder or in the hub's cache.

    They hold, under these names, torchvision's VGG16 (`features.0.weight` … `features.28.bias`;
    what else it has is left out) and the linear weights as the package lpips names them
    (`lin0.model.1.weight` … `lin4.model.1.weight`, (1, channels, 1, 1)). "stand-in" needs none.

    Raises ModelError, before weights are read, for names or shapes that are not these.
    """
    if where == STAND_IN:
        return stand_in_lpips().to(device)
    model = Lpips(f"LPIPS in {where}", VGG_WIDTHS)
    places: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        level = name.removeprefix("weights.")
        places[name if level == name else f"lin{level}.model.1.weight"] = parameter
    files = {name: file for file in _files(where) for name in read_header(file)}
    lacking = [name for name in places if name not in files]
    if lacking:
        raise ModelError(
            f"the perceptual network in {where} lacks {len(lacking)} tensors: {lacking[0]}.", _NAMES
        )
    for name, parameter in places.items():
        shape, wanted = read_header(files[name])[name].shape, tuple(parameter.shape)
        wanted = wanted if name.startswith("features") else (1, *wanted, 1, 1)
        if shape != wanted:
            told = f"{list(shape)} instead of {list(wanted)}"
            raise ModelError(f"{name} in {where} has the shape {told}.", _NAMES)
    tensors = {name: t for file in set(files.values()) for name, t in load_file(file).items()}
    for name, parameter in places.items():
        parameter.data = tensors[name].float().reshape(parameter.shape)
        if not parameter.isfinite().all():
            raise ModelError(f"{name} in {where} holds values that are not finite.", _NAMES)
    if min(weight.min() for weight in model.weights) < 0:
        raise ModelError(f"the linear weights in {where} are not all positive.", _NAMES)
    return model.to(device)


def open_dino(enc_type: str, where: str, device: torch.device | str = "cpu") -> PatchCosine:
    """Perceptual DINO with the encoder that `hidream.models.hidit.encoder.open_encoder` opens."""
    return PatchCosine(open_encoder(enc_type, where or None, device=device))


def stand_in_lpips(seed: int = 0) -> Lpips:
    """LPIPS's formula on a small random VGG, all channels alike: a function of `seed`."""
    model = Lpips(f"{STAND_IN} (random VGG, seed {seed}; not LPIPS)", STAND_IN_WIDTHS)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            std = math.sqrt(2 / (9 * layer.in_channels))
            nn.init.normal_(layer.weight, std=std, generator=generator)
            assert layer.bias is not None
            layer.bias.copy_(0.1 * torch.randn(layer.out_channels, generator=generator))
    return model


def _files(where: str) -> list[Path]:
    path = Path(where).expanduser()
    if path.is_file():
        if path.suffix in PICKLES:
            raise ModelError(f"{path} is a pickle, which is never loaded.", "Convert it first.")
        return [path]
    if not where or not path.exists():
        if where.count("/") != 1 or where.startswith((".", "~")):
            raise ModelError(
                f'there is no perceptual network in perceptual.lpips = "{where}".',
                'Name a file or folder, or say perceptual.network = "stand-in".',
            )
        path = fetch(where, local_only=True)
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise ModelError(f"{path} holds no safetensors.", _NAMES)
    return found
