"""Hi-DiT's configuration: one dataclass, and SiT's sizes as named instances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hidream.errors import ModelError, UsageError
from hidream.registry import nearest

ATTENTIONS = ("readonly", "full", "add")
PIXEL_CLOCKS = ("shared", "rescaled")


@dataclass(frozen=True, kw_only=True)
class HiDiTConfig:
    """Hi-DiT's network: SiT over latents, and a branch that denoises pixels through its blocks.

    `patch_size`, `in_channels` and `latent_size` (a side) are the latents'; the label table has
    `num_classes` rows and one more, the null label. `projector_dims`: widths of the features that
    the tokens behind block `encoder_depth` are aligned with (REPA, arXiv 2410.06940), each by a
    projector of its own, `projector_width` wide; () has none. `image_size` is the side in pixels,
    `gate` the noise level at and below which pixels are seen (Hi-DiT's tau). `attention`: who
    reads whom there, see `blocks`. `pixel_clock`: whether pixels stand at the latents' noise level
    or at one of their own, see `pixels.pixel_noise_level`.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    patch_size: int = 1
    in_channels: int = 32
    latent_size: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    qk_norm: bool = False
    encoder_depth: int = 8
    projector_width: int = 2048
    projector_dims: tuple[int, ...] = (768,)
    image_size: int = 256
    gate: float = 0.3
    attention: str = "readonly"
    pixel_clock: str = "shared"

    def __post_init__(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} is not a whole number of 1 or more")
        if not isinstance(self.projector_dims, tuple) or any(
            type(width) is not int or width < 1 for width in self.projector_dims
        ):
            raise ValueError(f"projector_dims={self.projector_dims!r} is no tuple of widths")
        for name in ("mlp_ratio", "gate"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} is not a number above 0")
        if type(self.qk_norm) is not bool:
            raise ValueError(f"qk_norm={self.qk_norm!r} is neither true nor false")
        if self.gate > 1:
            raise ValueError(f"gate={self.gate} is a noise level, which is 1 at the most")
        if self.hidden_size % 4 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 and of "
                f"num_heads={self.num_heads}"
            )
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"latent_size={self.latent_size} is not a multiple of patch_size={self.patch_size}"
            )
        if self.image_size % self.grid:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of the {self.grid} tokens a side"
            )
        if self.projector_dims and self.encoder_depth > self.num_layers:
            raise ValueError(
                f"encoder_depth={self.encoder_depth} of num_layers={self.num_layers} blocks"
            )
        for name, known in (("attention", ATTENTIONS), ("pixel_clock", PIXEL_CLOCKS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}")

    @property
    def grid(self) -> int:
        """Tokens along a side, of latents and of pixels alike."""
        return self.latent_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def pixel_patch(self) -> int:
        """Pixels along the side of a pixel token."""
        return self.image_size // self.grid

    @property
    def null_label(self) -> int:
        """The label of no class, for classifier-free guidance."""
        return self.num_classes

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> HiDiTConfig:
        """From a folder's `config.json`; ModelError for what is none of Hi-DiT's."""
        given = dict(config)
        foreign = given.keys() - {item.name for item in fields(cls)}
        try:
            if given.pop("model_type", "hidit") != "hidit":
                raise ValueError(f"its model_type is {config['model_type']!r}")
            if foreign - {"model_type"}:
                raise ValueError(f"unknown: {', '.join(sorted(foreign - {'model_type'})[:3])}")
            if isinstance(given.get("projector_dims"), list):
                given["projector_dims"] = tuple(given["projector_dims"])
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"config.json is not a Hi-DiT configuration ({error}).",
                "It must be one that hidream hidit train or hidream models convert wrote.",
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """The folder's `config.json`."""
        return {
            "model_type": "hidit",
            **asdict(self),
            "projector_dims": list(self.projector_dims),
        }


_WHOLE = (
    *("hidden_size", "num_layers", "num_heads", "patch_size", "in_channels", "latent_size"),
    *("num_classes", "encoder_depth", "projector_width", "image_size"),
)

# N and T are ours, for CPUs: the smallest that SiT knows is S.
WIDTHS = {
    "N": (128, 6, 2),
    "T": (192, 8, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
PROJECTOR_WIDTHS = {"N": 256, "T": 256}  # 2048 for the others
SIZES = {
    f"SiT-{name}/{patch_size}": HiDiTConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        patch_size=patch_size,
        encoder_depth=min(8, num_layers),
        projector_width=PROJECTOR_WIDTHS.get(name, 2048),
    )
    for name, (hidden_size, num_layers, num_heads) in WIDTHS.items()
    for patch_size in (1, 2, 4, 8)
}

# For tests: every part is there, nothing is large.
HIDIT_TINY = HiDiTConfig(
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    in_channels=4,
    latent_size=4,
    num_classes=5,
    encoder_depth=2,
    projector_width=24,
    projector_dims=(12,),
    image_size=32,
)


def size_of(name: str) -> HiDiTConfig:
    """The size that `--model` names, as in SiT-XL/1; UsageError suggests near names."""
    if name not in SIZES:
        raise UsageError(f'unknown model "{name}"; {nearest(name, SIZES)}')
    return SIZES[name]
