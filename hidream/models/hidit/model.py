"""Hi-DiT's network: noisy latents and, at low noise, noisy pixels become velocity and clean pixels.

       velocity     (features: REPA)     clean pixels
          ↑                 ↑                 ↑
     final_layer       projectors        pixel_head
          ↑                 ↑                 ↑
    ┌─────┴─────────────────┴─────────────────┴─────┐
    │ blocks   [ latent tokens ] ⇠ [ pixel tokens ] │←─ adaLN: sigma and the label
    └─────↑─────────────────────────────────↑───────┘
     x_embedder                       pixel_embedder
          ↑                                 ↑
    noisy latents              noisy pixels, where sigma <= gate

Without pixels this is SiT-XL with REPA's projectors, by the names and to the numbers of REPA-E's
checkpoints. All that the pixel branch adds has a name that begins with `pixel_`. Hi-DiT's `t` is
`sigma` of `sampling.flow`, and its network predicts the velocity of there: nothing is converted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hidream.models.hidit.blocks import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbedder,
    TimestepEmbedder,
    projector,
    take,
)
from hidream.models.hidit.config import HiDiTConfig
from hidream.models.hidit.init import PIXEL_PREFIX, init_latents, init_pixels
from hidream.models.hidit.pixels import PixelHead, pixel_noise_level
from hidream.nn.attention import Backend

EPS = 1e-4  # of the variance that latents are normalised by


@dataclass(frozen=True)
class Prediction:
    """What `forward` returns, in the dtypes of what it was given.

    `velocity`: noise − latents. `features`: of the latent tokens, one for each of
    `projector_dims`, fp32; () unless asked for. `pixels`: the clean ones of the rows that had
    noisy ones, in about [−1, 1].
    """

    velocity: Float[Tensor, "b c h w"]
    features: tuple[Float[Tensor, "b l _"], ...] = ()
    pixels: Float[Tensor, "g 3 height width"] | None = None


class LatentStatistics(nn.Module):
    """Mean and variance of every channel of the latents, under the names of a BatchNorm2d."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


class HiDiT(nn.Module):
    """Hi-DiT, with SiT's and REPA-E's names. Its parts stand in the order of their use."""

    pos_embed: Tensor
    pixel_type: nn.Parameter
    pixel_t_embedder: TimestepEmbedder

    def __init__(self, config: HiDiTConfig, attention_backend: Backend = "auto"):
        super().__init__()
        self.config = config
        size, patch_size = config.hidden_size, config.patch_size
        self.t_embedder = TimestepEmbedder(size)
        self.y_embedder = LabelEmbedder(config.num_classes, size)
        self.x_embedder = PatchEmbedder(config.in_channels, patch_size, size)
        self.register_buffer("pos_embed", torch.zeros(1, config.num_tokens, size))
        self.pixel_embedder = PatchEmbedder(3, config.pixel_patch, size)
        if config.attention != "add":
            self.pixel_type = nn.Parameter(torch.zeros(size))
        if config.pixel_clock == "rescaled":
            self.pixel_t_embedder = TimestepEmbedder(size)
        self.blocks = nn.ModuleList(
            Block(config, attention_backend) for _ in range(config.num_layers)
        )
        self.projectors = nn.ModuleList(
            projector(size, config.projector_width, width) for width in config.projector_dims
        )
        self.final_layer = FinalLayer(size, patch_size**2 * config.in_channels)
        self.pixel_head = PixelHead(config)
        self.bn = LatentStatistics(config.in_channels)

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        labels: Int[Tensor, " b"],
        pixels: Float[Tensor, "g 3 height width"] | None = None,
        *,
        rows: Int[Tensor, " g"] | None = None,
        pixel_sigma: Float[Tensor, " g"] | None = None,
        with_features: bool = False,
    ) -> Prediction:
        """One evaluation: `x_t` are noisy normalised latents (see `normalise`).

        `pixels`: noisy pictures of `rows` of the batch (indices, each once; None: all of them),
        `pixel_sigma` their noise level (None: what the configuration's clock says). Whether a row
        has pixels is the caller's choice, which the configuration's gate is for.
        """
        dtype, adds = self.x_embedder.proj.weight.dtype, self.config.attention == "add"
        label = self.y_embedder(labels)
        condition = self.t_embedder(sigma) + label
        latents = self.x_embedder(x_t.to(dtype)) + self.pos_embed.to(dtype)
        tokens = pixel_condition = None
        if pixels is not None:
            pixel_condition = self._pixel_condition(sigma, label, rows, pixel_sigma)
            tokens = self.pixel_embedder(pixels.to(dtype))
            if adds:
                latents, tokens = _added(latents, tokens, rows), None
            else:
                tokens = tokens + (self.pos_embed.to(dtype) + self.pixel_type)
        features: tuple[Tensor, ...] = ()
        for depth, block in enumerate(self.blocks, 1):
            latents, tokens = block(latents, condition, tokens, pixel_condition, rows)
            if with_features and depth == self.config.encoder_depth:
                features = tuple(project(latents).float() for project in self.projectors)
        velocity = self._picture(self.final_layer(latents, condition)).to(x_t.dtype)
        if pixels is None:
            return Prediction(velocity, features)
        clean = self.pixel_head(take(latents, rows) if adds else tokens, pixel_condition)
        return Prediction(velocity, features, clean.to(pixels.dtype))

    def normalise(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """What the VAE encodes, to mean 0 and deviation 1 in every channel; at least fp32."""
        mean, variance = self._statistics(latents)
        return (latents - mean) / (variance + EPS).sqrt()

    def denormalise(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """What the VAE decodes. By the plain deviation, without `EPS`, as REPA-E does it."""
        mean, variance = self._statistics(latents)
        return latents * variance.sqrt() + mean

    @torch.no_grad()
    def set_statistics(self, mean: Float[Tensor, " c"], std: Float[Tensor, " c"]) -> None:
        """Of the latents that the network will see: see `weights.read_stats`."""
        self.bn.running_mean.copy_(mean)
        self.bn.running_var.copy_(std.square())

    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights and statistics: no block changes a token, velocity and pixels are 0."""
        init_latents(self, generator)
        self.init_pixels(generator)

    def init_pixels(self, generator: torch.Generator) -> None:
        """A fresh pixel branch, which predicts mid-grey, x0 = 0; the rest stays as it is."""
        init_pixels(self, generator)

    def _pixel_condition(
        self, sigma: Tensor, label: Tensor, rows: Tensor | None, level: Tensor | None
    ) -> Tensor:
        rescaled = self.config.pixel_clock == "rescaled"
        embedder = self.pixel_t_embedder if rescaled else self.t_embedder
        level = pixel_noise_level(take(sigma, rows), self.config) if level is None else level
        return embedder(level) + take(label, rows)

    def _picture(self, patches: Float[Tensor, "b l p"]) -> Float[Tensor, "b c h w"]:
        return rearrange(
            patches,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=self.config.grid,
            p=self.config.patch_size,
            q=self.config.patch_size,
        )

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(latents.dtype, torch.float32)
        mean, variance = self.bn.running_mean.to(dtype), self.bn.running_var.to(dtype)
        return mean[:, None, None], variance[:, None, None]


def new_hidit(
    config: HiDiTConfig, generator: torch.Generator, attention_backend: Backend = "auto"
) -> HiDiT:
    """A model with fresh weights, a function of the generator alone, on its device."""
    with torch.device("meta"):  # so that no weight is drawn twice
        model = HiDiT(config, attention_backend)
    model.to_empty(device=generator.device)
    model.init_weights(generator)
    return model


def pixel_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The pixel branch's, in the model's order."""
    return [p for name, p in model.named_parameters() if name.startswith(PIXEL_PREFIX)]


def freeze_pixels(model: nn.Module, frozen: bool = True) -> None:
    """Stage 1 leaves the pixel branch without gradients: nothing that it is for runs there."""
    for parameter in pixel_parameters(model):
        parameter.requires_grad_(not frozen)


def has_trained_pixels(model: HiDiT) -> bool:
    """Whether the pixel branch has learnt: a fresh one's last convolution is all zeros."""
    return any(bool(weight.any()) for weight in model.pixel_head.convs[-1].parameters())


def _added(latents: Tensor, tokens: Tensor, rows: Tensor | None) -> Tensor:
    tokens = tokens.to(latents.dtype)
    return latents + tokens if rows is None else latents.index_add(0, rows, tokens)
