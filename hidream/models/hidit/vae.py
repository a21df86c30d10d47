"""The autoencoder of Hi-DiT's latents: latent diffusion's AutoencoderKL, by its own names.

`encoder.down.i.block.j`, `decoder.up.i.…` (i counts from the finest level in both), `quant_conv`
and `post_quant_conv` are those of CompVis/latent-diffusion's checkpoints (arXiv 2112.10752), as
VA-VAE and REPA-E publish them. Latents are as the encoder makes them: `HiDiT.normalise` scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hidream.errors import ModelError, UsageError
from hidream.folder import Folder, open_file, open_folder
from hidream.models.hidit.config import HiDiTConfig
from hidream.models.hidit.files import write_folder
from hidream.models.loading import load_weights, tensor_shapes
from hidream.nn.attention import attention
from hidream.registry import nearest

MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """`width` times `multipliers[i]` channels at level i, each level half as large as the last.

    `num_blocks` residual blocks at a level of the encoder, one more of the decoder; those of
    `attention_levels` are each followed by attention. `num_groups` are the norms'.
    """

    channels: int  # of the latents
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    num_groups: int = 32

    def __post_init__(self) -> None:
        whole = (self.channels, self.width, self.num_blocks, self.num_groups, *self.multipliers)
        if any(type(n) is not int or n < 1 for n in whole) or not self.multipliers:
            raise ValueError("all but attention_levels is made of whole numbers of 1 or more")
        if any(type(n) is not int or not 0 <= n < self.num_levels for n in self.attention_levels):
            raise ValueError(f"attention_levels={self.attention_levels} of {self.num_levels}")
        if any(width % self.num_groups for width in self.widths):
            raise ValueError(f"widths {self.widths} are not all multiples of {self.num_groups}")

    @property
    def num_levels(self) -> int:
        return len(self.multipliers)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def factor(self) -> int:
        """Pixels of a latent, along each side."""
        return 2 ** (self.num_levels - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VaeConfig:
        """From a folder's `config.json`, which has fields or an `arch` of `VAES`; ModelError."""
        given = {key: value for key, value in config.items() if key not in ("model_type", "arch")}
        try:
            if config.get("model_type", "hidit-vae") != "hidit-vae":
                raise ValueError(f"its model_type is {config['model_type']!r}")
            if not given and config.get("arch") in VAES:
                return VAES[config["arch"]]
            foreign = sorted(given.keys() - {item.name for item in fields(cls)})
            if foreign:
                raise ValueError(f"unknown: {', '.join(foreign[:3])}")
            for name in ("multipliers", "attention_levels"):
                given[name] = tuple(given.get(name, ()))
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"config.json is not that of a VAE of Hi-DiT ({error}).",
                "It must be one that hidream models convert wrote.",
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """The folder's `config.json`."""
        return {"model_type": "hidit-vae", "arch": arch_of(self), **asdict(self)}


VAES = {
    # 16² latents of 32 channels from 256² pixels; attention at 16².
    "f16d32": VaeConfig(channels=32, attention_levels=(4,)),
    # 32² latents of 4 channels; attention in the middle alone.
    "f8d4": VaeConfig(channels=4, multipliers=(1, 2, 4, 4)),
}


def arch_of(config: VaeConfig) -> str | None:
    """The name of `VAES` that a configuration has; None for one of its own."""
    return next((name for name, known in VAES.items() if known == config), None)


def arch_named(name: str) -> VaeConfig:
    """The VAE that `--vae-arch` names; UsageError suggests near names."""
    if name not in VAES:
        raise UsageError(f'unknown VAE "{name}"; {nearest(name, VAES)}')
    return VAES[name]


class LdmVae(nn.Module):
    """Pictures in [−1, 1] ⇄ latents."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 1)

    def moments(
        self, pictures: Float[Tensor, "b 3 height width"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Mean and standard deviation of the latents, in the pictures' dtype.

        Raises ValueError where the sides are no multiples of the configuration's `factor`.
        """
        if any(side % self.config.factor for side in pictures.shape[-2:]):
            raise ValueError(f"{list(pictures.shape)} pictures are not whole latents")
        x = self._laid_out(pictures)
        mean, log_variance = self.quant_conv(self.encoder(x)).to(pictures.dtype).chunk(2, dim=1)
        clamped = log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
        return mean.contiguous(), (0.5 * clamped).exp().contiguous()

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Pictures in [−1, 1] or little more, in the latents' dtype."""
        x = self.post_quant_conv(self._laid_out(latents))
        return self.decoder(x).to(latents.dtype).contiguous()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights, even in ±1/√(inputs): PyTorch's own, but a function of the generator."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for weight in module.parameters():
                    nn.init.uniform_(weight, -bound, bound, generator=generator)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()

    def _laid_out(self, x: Tensor) -> Tensor:
        """In the weights' dtype; channels last, as tensor cores want it and no CPU minds."""
        return x.to(self.quant_conv.weight.dtype, memory_format=torch.channels_last)


class Level(nn.Module):
    """Residual blocks of one size, each followed by attention if there is some."""

    def __init__(self, inputs: int, outputs: int, num_blocks: int, attends: bool, groups: int):
        super().__init__()
        widths = [inputs] + [outputs] * (num_blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(width, outputs, groups) for width in widths)
        self.attn = nn.ModuleList(
            SpatialAttention(outputs, groups) for _ in range(num_blocks if attends else 0)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d height width"]:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.resized(x)

    def resized(self, x: Tensor) -> Tensor:
        return x


class DownLevel(Level):
    """A level whose result is halved."""

    def __init__(self, inputs: int, outputs: int, num_blocks: int, attends: bool, groups: int):
        super().__init__(inputs, outputs, num_blocks, attends, groups)
        self.downsample = _Conv(nn.Conv2d(outputs, outputs, 3, stride=2))

    def resized(self, x: Tensor) -> Tensor:
        return self.downsample.conv(F.pad(x, (0, 1, 0, 1)))


class UpLevel(Level):
    """A level whose result is doubled."""

    def __init__(self, inputs: int, outputs: int, num_blocks: int, attends: bool, groups: int):
        super().__init__(inputs, outputs, num_blocks, attends, groups)
        self.upsample = _Conv(nn.Conv2d(outputs, outputs, 3, padding=1))

    def resized(self, x: Tensor) -> Tensor:
        return self.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Between the levels, at the smallest size."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.block_1 = ResidualBlock(width, width, groups)
        self.attn_1 = SpatialAttention(width, groups)
        self.block_2 = ResidualBlock(width, width, groups)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig):
        super().__init__()
        widths, last, groups = config.widths, config.num_levels - 1, config.num_groups
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.down = nn.ModuleList(
            (Level if i == last else DownLevel)(
                *(widths[max(i - 1, 0)] if i else config.width, widths[i], config.num_blocks),
                *(i in config.attention_levels, groups),
            )
            for i in range(config.num_levels)
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b c2 h w"]:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig):
        super().__init__()
        widths, last, groups = config.widths, config.num_levels - 1, config.num_groups
        self.conv_in = nn.Conv2d(config.channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(
            (UpLevel if i else Level)(
                *(widths[min(i + 1, last)], widths[i], config.num_blocks + 1),
                *(i in config.attention_levels, groups),
            )
            for i in range(config.num_levels)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class SpatialAttention(nn.Module):
    """One head over all places."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "b c h w -> b (h w) 1 c") for f in (self.q, self.k, self.v))
        read = rearrange(attention(q, k, v), "b (h w) 1 c -> b c h w", h=x.shape[2])
        return x + self.proj_out(read)


class _Conv(nn.Module):
    """The published names have a `conv` inside."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv


def new_vae(config: VaeConfig, generator: torch.Generator) -> LdmVae:
    """A VAE with fresh weights, a function of the generator alone, on its device."""
    with torch.device("meta"):
        vae = LdmVae(config)
    vae.to_empty(device=generator.device)
    vae.init_weights(generator)
    return vae


def open_vae(path: str | Path, arch: str | None = None) -> tuple[Folder, VaeConfig]:
    """Headers and configuration of a VAE; no weights are read.

    `path`: a folder with `config.json` and `model.safetensors`, or a safetensors file, whose
    configuration is told by its tensors. `arch`, a name of `VAES`, is what it must be.

    Raises ModelError where it is not there, not whole, no VAE or another one; UsageError for an
    unknown `arch`.
    """
    wanted = None if arch is None else arch_named(arch)
    path = Path(path).expanduser()
    if path.is_dir():
        folder = open_folder(path)
        config = VaeConfig.from_dict(folder.config)
    else:
        folder = open_file(path)
        shapes = {name: list(info.shape) for name, info in folder.tensors.items()}
        config = wanted or config_of(shapes)
    if wanted is not None and config != wanted:
        raise ModelError(
            f"the VAE in {path} is {arch_of(config) or 'one of its own'}, not {arch}.",
            "Name its own architecture, or another VAE.",
        )
    return folder, config


def check_latents(path: str | Path, network: HiDiTConfig, arch: str | None = None) -> None:
    """ModelError where a VAE (see `open_vae`) is none, or has other latents than `network`'s."""
    _, vae = open_vae(path, arch)
    wanted = network.in_channels, network.image_size / network.latent_size
    if (vae.channels, vae.factor) != wanted:
        raise ModelError(
            f"the VAE in {path} has latents of {vae.channels} channels, one for {vae.factor} "
            f"pixels; the network's have {wanted[0]}, one for {wanted[1]:g}.",
            "Name the VAE whose latents it is trained on.",
        )


def load_vae(
    path: str | Path,
    arch: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LdmVae:
    """The VAE of a checkpoint (see `open_vae`), ready for use. ModelError as there."""
    folder, config = open_vae(path, arch)
    with torch.device("meta"):
        vae = LdmVae(config)
    return load_weights(vae, folder, device=device, dtype=dtype, change=_channels_last)


def save_vae(vae: LdmVae, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`; ModelError where other weights are there."""
    write_folder(Path(folder), vae.config.to_dict(), vae.state_dict())


def shapes_of(config: VaeConfig) -> dict[str, list[int]]:
    """Every tensor of a VAE of this configuration, built on the meta device."""
    with torch.device("meta"):
        return tensor_shapes(LdmVae(config))


def _channels_last(name: str, tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def config_of(shapes: Mapping[str, Sequence[int]]) -> VaeConfig:
    """The configuration that tensors of these shapes have; ModelError where they are no VAE."""
    try:
        width = shapes["encoder.conv_in.weight"][0]
        channels = shapes["decoder.conv_in.weight"][1]
        outputs: list[int] = []
        level = 0
        while (name := f"encoder.down.{level}.block.0.conv1.weight") in shapes:
            outputs.append(shapes[name][0])
            level += 1
        blocks = {name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")}
        return VaeConfig(
            channels=channels,
            width=width,
            multipliers=tuple(n // width for n in outputs),
            num_blocks=len(blocks),
            attention_levels=tuple(
                i for i in range(level) if f"encoder.down.{i}.attn.0.q.weight" in shapes
            ),
            num_groups=math.gcd(32, *outputs),
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"these tensors are not those of a VAE by latent diffusion's names ({error}).",
            "It has encoder.conv_in, encoder.down.0.block.0 and so on.",
        ) from error
