"""Hi-DiT in training: latents that a VAE cached, aligned features, and pixels in little noise."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn

from hidream.data.latents import stats_file
from hidream.data.packed import open_packed
from hidream.errors import InputError, ModelError, UsageError
from hidream.models.hidit.config import HiDiTConfig, size_of
from hidream.models.hidit.encoder import open_encoder
from hidream.models.hidit.files import write_json
from hidream.models.hidit.model import HiDiT, freeze_pixels, pixel_parameters
from hidream.models.hidit.pixels import pixel_noise_level
from hidream.models.hidit.vae import check_latents, load_vae
from hidream.models.hidit.weights import load_hidit, read_stats, save_hidit
from hidream.pipelines.hidit import SamplingOptions, draw
from hidream.sampling import add_noise
from hidream.train.config import HiDiTOptions, Recipe
from hidream.train.distributed import PendingSums, World
from hidream.train.draws import Stream, draw_noise, generator
from hidream.train.export import put_in_place
from hidream.train.flops import hidit_step
from hidream.train.grids import montage
from hidream.train.learner import Learner, Losses
from hidream.train.losses import alignment_loss, pixel_loss, weighted_mean

NUM_SHOWN = 16
SHOWN = SamplingOptions(mode="ode", num_steps=50, cfg_scale=4.0)


@dataclass(frozen=True)
class HiDiTBatch:
    """One process's share of a step.

    `moments` are mean and deviation of the latents, `drawn` the noise by which latents are drawn
    around their means; `weight` how much a sample's error counts. `rows` are the samples whose
    pixels are seen too, with `pixel_noise` of their own: none in stage 1.
    """

    images: UInt8[Tensor, "b 3 height width"]
    moments: Float[Tensor, "b c2 h w"]
    drawn: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    sigma: Float[Tensor, " b"]
    weight: Float[Tensor, " b"]
    labels: Int[Tensor, " b"]
    rows: Int[Tensor, " g"]
    pixel_noise: Float[Tensor, "g 3 height width"]
    counts: tuple[int, ...] = ()
    redrawn: int = 0
    corrupt: int = 0

    def to(self, device: torch.device | str) -> HiDiTBatch:
        if torch.device(device).type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.pin_memory().to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class HiDiTLearner(Learner):
    """Velocity of latents + proj_coeff · alignment, and in stage 2 + pixel_weight · pixels.

    The alignment is REPA's (arXiv 2410.06940): features inside the network against those that a
    frozen encoder finds in the clean picture. Pixels are predicted clean, and their error counts as
    one of velocity.
    """

    may_be_new = "pixel_"

    def __init__(self, recipe: Recipe, world: World | None = None):
        super().__init__(recipe, world)
        options = self.options = recipe.hidit
        if options.weighting not in ("uniform", "lognormal"):
            raise UsageError(f'weighting "{options.weighting}" must be uniform or lognormal.')
        self.data = open_packed(
            options.data_dir, options.vae_latents_name, dtype=options.latents_dtype
        )
        if self.data.moments_shape is None or len(self.data) == 0:
            raise InputError(f"{self.data.folder} has nothing to learn from.", "Cache the latents.")
        size = size_of(recipe.model.removeprefix("hidit-"))
        self.encoder = None
        if options.proj_coeff > 0:
            self.encoder = open_encoder(
                options.enc_type,
                options.enc_path or None,
                device=recipe.device,
                grid=self.data.moments_shape[-1] // size.patch_size,
            )
        self.stats = read_stats(statistics_of(options))
        self.config = self._config(size)
        self._check_of_one_vae()

    def describe(self) -> None:
        self.recipe.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(self.recipe.run_dir / "config.json", self.config.to_dict())

    def _check_of_one_vae(self) -> None:
        """ModelError unless statistics and VAE are of latents such as those that were cached."""
        num, channels = len(self.stats[0]), self.config.in_channels
        if num != channels:
            raise ModelError(
                f"{statistics_of(self.options)} is of {num} channels; the latents have {channels}.",
                "Lay those of these latents there, or cache them again.",
            )
        if self.options.vae_ckpt:
            check_latents(self.options.vae_ckpt, self.config, self.options.vae or None)

    def _config(self, size: HiDiTConfig) -> HiDiTConfig:
        options = self.options
        assert self.data.moments_shape is not None
        _, channels, side, _ = self.data.moments_shape
        network: dict[str, Any] = {
            "in_channels": channels // 2,
            "latent_size": side,
            "image_size": self.data.resolution,
            "num_classes": self.data.num_classes,
            "qk_norm": options.qk_norm,
            "encoder_depth": options.encoder_depth,
            "projector_dims": () if self.encoder is None else (self.encoder.width,),
            "gate": options.gate,
            "attention": options.attention,
            "pixel_clock": options.pixel_clock,
        }
        try:
            return replace(size, **network)
        except ValueError as error:
            raise UsageError(f"there is no such network: {error}.") from error

    def build(self) -> HiDiT:
        if self.recipe.init:
            model = load_hidit(self.recipe.init, config=self.config, allow_no_pixels=True)
        else:
            model = HiDiT(self.config)
            model.init_weights(torch.Generator().manual_seed(self.recipe.seed))
        model.set_statistics(*self.stats)
        return self._to_train(model)

    def network(self) -> HiDiT:
        return self._to_train(HiDiT(self.config))

    def _to_train(self, model: HiDiT) -> HiDiT:
        freeze_pixels(model.requires_grad_(True).train(), self.options.ldm_only)
        return model

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> HiDiTBatch:
        recipe, options = self.recipe, self.options
        number, _ = recipe.locate(step)
        size, first = recipe.stages[number].batch_size, recipe.first_sample(step)
        drawn = [first + place for place in range(rank, size, world)]
        sigma, weight, num_gated = self._levels(size, step)
        sigma, weight = sigma[rank::world], weight[rank::world]
        rows = torch.arange(-(-(num_gated - rank) // world) if num_gated > rank else 0)
        indices = np.array([self._index(position) for position in drawn])
        moments = torch.from_numpy(self.data.moments(indices))
        images = torch.from_numpy(self.data.images(indices))
        labels = torch.from_numpy(self.data.labels[indices])
        dropped = [
            float(generator(recipe.seed, Stream.DROPOUT, position).random()) < options.cfg_prob
            for position in drawn
        ]
        shape = (2, self.config.in_channels, *moments.shape[2:])
        noise = torch.stack([draw_noise(recipe.seed, position, shape) for position in drawn])
        pixel_noise = [
            draw_noise(recipe.seed, drawn[row], tuple(images.shape[1:]), Stream.PIXELS)
            for row in rows.tolist()
        ]
        return HiDiTBatch(
            images=images,
            moments=moments,
            drawn=noise[:, 0],
            noise=noise[:, 1],
            sigma=sigma,
            weight=weight,
            labels=labels.masked_fill(torch.tensor(dropped), self.config.num_classes),
            rows=rows,
            pixel_noise=torch.stack(pixel_noise)
            if pixel_noise
            else torch.empty(0, *images.shape[1:]),
        )

    def _index(self, position: int) -> int:
        """The picture at a place of the run: every epoch has an order of its own."""
        epoch, place = divmod(position, len(self.data))
        if epoch not in self._orders:
            dice = generator(self.recipe.seed, Stream.ORDER, epoch)
            self._orders[epoch] = dice.permutation(len(self.data))
            self._orders.pop(epoch - 2, None)
        return int(self._orders[epoch][place])

    @cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        return {}

    def _levels(self, size: int, step: int) -> tuple[Tensor, Tensor, int]:
        """sigma and weight of a step's samples, and how many, all in front, are at most the gate.

        Stratified: sample i lies in the i-th part of the distribution. In stage 2 a whole number
        of them lies below the gate in every step, so that shapes stay what they are; weights make
        up for the rounding.
        """
        u = generator(self.recipe.seed, Stream.LEVEL, step).random(size)
        below = 0.0 if self.options.ldm_only else self._share_below_gate()
        num_gated = 0 if below == 0 else min(max(round(below * size), 1), size)
        rest = size - num_gated
        quantiles, weight = np.empty(size), np.ones(size)
        if num_gated:
            quantiles[:num_gated] = below * (np.arange(num_gated) + u[:num_gated]) / num_gated
            weight[:num_gated] = below * size / num_gated
        if rest:
            quantiles[num_gated:] = below + (1 - below) * (np.arange(rest) + u[num_gated:]) / rest
            weight[num_gated:] = (1 - below) * size / rest
        quantiles = quantiles.clip(1e-6, 1 - 1e-6)
        sigma = quantiles
        if self.options.weighting == "lognormal":
            normal = np.array([NormalDist().inv_cdf(q) for q in quantiles])
            sigma = 1 / (1 + np.exp(-normal))
        return (
            torch.from_numpy(sigma.astype(np.float32)),
            torch.from_numpy(weight.astype(np.float32)),
            num_gated,
        )

    def _share_below_gate(self) -> float:
        gate = self.config.gate
        if self.options.weighting == "uniform" or not 0 < gate < 1:
            return gate
        return NormalDist().cdf(math.log(gate / (1 - gate)))

    def losses(self, model: HiDiT, batch: HiDiTBatch, sums: PendingSums) -> Losses:
        options, gated = self.options, len(batch.rows) > 0
        mean, deviation = batch.moments.chunk(2, dim=1)
        x0 = model.normalise(mean + deviation * batch.drawn)
        x_t = add_noise(x0, batch.noise, batch.sigma)
        pixels, noisy, pixel_sigma = None, None, None
        if gated:
            pixels = batch.images[batch.rows].float() / 127.5 - 1
            pixel_sigma = pixel_noise_level(batch.sigma[batch.rows], self.config)
            noisy = add_noise(pixels, batch.pixel_noise, pixel_sigma)
        with self.precision():
            found = model(
                x_t,
                batch.sigma,
                batch.labels,
                noisy,
                rows=batch.rows if gated else None,
                pixel_sigma=pixel_sigma,
                with_features=self.encoder is not None,
            )
        error = (found.velocity.float() - (batch.noise - x0)).square().flatten(1).mean(1)
        total = weighted_mean(error, batch.weight)
        parts = {"loss_latents": total.detach()}
        if self.encoder is not None:
            with torch.no_grad(), self.precision():
                wanted = self.encoder(batch.images)
            alignment = torch.stack([alignment_loss(f, wanted) for f in found.features]).mean()
            total = total + options.proj_coeff * alignment
            parts["loss_alignment"] = alignment.detach()
        if pixels is not None and pixel_sigma is not None:
            error = pixel_loss(found.pixels, pixels, pixel_sigma, options.pixel_delta)
            seen = weighted_mean(error, batch.weight[batch.rows], len(batch.sigma))
            total = total + options.pixel_weight * seen
            parts["loss_pixels"] = seen.detach()
        elif not options.ldm_only:  # other processes have gradients there: so must this one
            total = total + 0 * torch.stack([p.sum() for p in pixel_parameters(model)]).sum()
        return Losses(total, parts)

    def flops(self, batch: HiDiTBatch) -> int:
        samples, gated = len(batch.sigma), len(batch.rows)
        with_features = self.encoder is not None
        return hidit_step(self.config, samples=samples, gated=gated, with_features=with_features)

    def blocks(self, model: HiDiT) -> Sequence[nn.Module]:
        return list(model.blocks)

    @torch.no_grad()
    def grid(self, model: HiDiT, step: int) -> Image.Image:
        """One picture a class, of classes spread over all, as `hidream hidit sample` draws them."""
        device = next(model.parameters()).device
        vae = load_vae(self.options.vae_ckpt, self.options.vae or None, device)
        num_classes = self.config.num_classes
        labels = torch.arange(NUM_SHOWN) * max(num_classes // NUM_SHOWN, 1) % num_classes
        options = replace(SHOWN, output="vae") if self.options.ldm_only else SHOWN
        drawn = draw(model, vae.decode, labels, torch.arange(NUM_SHOWN), self.recipe.seed, options)
        pictures = [Image.fromarray(picture) for picture in drawn.cpu().numpy()]
        return montage(pictures, self.config.image_size)

    @torch.no_grad()
    def export(self, model: HiDiT, out_dir: Path) -> Path:
        """The averaged weights with their configuration, in fp32."""
        draft = out_dir.with_name(f".{out_dir.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        save_hidit(model, draft)
        return put_in_place(draft, out_dir)


def statistics_of(options: HiDiTOptions) -> Path:
    """The statistics of the latents: those that came with the VAE, else those of the cache."""
    vae = Path(options.vae_ckpt)
    if options.vae_ckpt:
        name = vae.name if vae.is_dir() else vae.stem
        beside = vae.with_name(f"{name}-latents-stats.safetensors")
        if beside.is_file():
            return beside
    return stats_file(Path(options.data_dir), options.vae_latents_name)
