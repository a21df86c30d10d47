"""The autoencoder whose latents an I1 draws: diffusers' AutoencoderKL, learnt on the world."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from hidream.folder import DIFFUSERS_STEM
from hidream.models.loading import quiet_imports
from hidream.models.o1.patches import to_picture, to_tensor
from hidream.train.checks import check_sizes
from hidream.train.config import Autoencoder, Recipe
from hidream.train.distributed import PendingSums
from hidream.train.draws import draw_noise, draw_sample, draw_task
from hidream.train.export import put_in_place
from hidream.train.grids import montage
from hidream.train.learner import Learner, Losses

NUM_MEASURED = 256  # pictures by which latents are brought to mean 0 and deviation 1
NUM_SHOWN = 8


@dataclass(frozen=True)
class Pictures:
    """A step's pictures in [−1, 1], and the noise by which latents are drawn around their means."""

    task: str
    pictures: Float[Tensor, "b 3 h w"]
    noise: Float[Tensor, "b c height width"]
    counts: tuple[int, ...] = ()
    redrawn: int = 0
    corrupt: int = 0

    def to(self, device: torch.device | str) -> Pictures:
        return replace(self, pictures=self.pictures.to(device), noise=self.noise.to(device))


class VaeLearner(Learner):
    """mean |decode(mean + deviation · noise) − picture| + kl_weight · mean divergence."""

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        check_sizes(recipe, 2 ** (len(recipe.vae.widths) - 1))

    def build(self) -> nn.Module:
        return build_vae(self.recipe.vae, self.recipe.seed)

    def network(self) -> nn.Module:
        return self.build()

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> Pictures:
        recipe = self.recipe
        number, _ = recipe.locate(step)
        stage = recipe.stages[number]
        task = draw_task(recipe, stage, step)
        side = stage.size // 2 ** (len(recipe.vae.widths) - 1)
        shape, first = (recipe.vae.channels, side, side), recipe.first_sample(step)
        indices = [first + place for place in range(rank, stage.batch_size, world)]
        samples = [draw_sample(recipe, stage, task, index) for index in indices]
        pictures = torch.stack([pixels(s.target(stage.size, stage.size)) for s in samples])
        return Pictures(
            task=task,
            pictures=pictures.contiguous(memory_format=torch.channels_last),  # a quarter faster
            noise=torch.stack([draw_noise(recipe.seed, index, shape) for index in indices]),
        )

    def losses(self, model: Any, batch: Pictures, sums: PendingSums) -> Losses:
        with self.precision():
            drawn = model.encode(batch.pictures).latent_dist
            made = model.decode(drawn.mean + drawn.std * batch.noise).sample
        error = F.l1_loss(made.float(), batch.pictures)
        divergence = drawn.kl().float().mean() / batch.noise[0].numel()
        total = error + self.recipe.vae.kl_weight * divergence
        return Losses(total, {"loss_pixels": error.detach(), "loss_kl": divergence.detach()})

    @torch.no_grad()
    def grid(self, model: Any, step: int) -> Image.Image:
        """Pictures, and under each four what becomes of them."""
        batch = self.make_batch(step - 1)
        shown = batch.pictures[:NUM_SHOWN].to(next(model.parameters()).device)
        made = model.decode(model.encode(shown).latent_dist.mode()).sample
        rows = [t[i : i + 4] for i in range(0, len(shown), 4) for t in (shown, made)]
        pictures = [to_picture(row.float().cpu()) for part in rows for row in part]
        return montage(pictures, batch.pictures.shape[-1])

    @torch.no_grad()
    def export(self, model: Any, out_dir: Path) -> Path:
        """In fp32, with the shift and scale that give its latents mean 0 and deviation 1."""
        device, latents = next(model.parameters()).device, []
        step, found = self.recipe.num_steps - 1, 0
        while found < NUM_MEASURED and step >= 0:
            pictures = self.make_batch(step).pictures.to(device)
            latents.append(model.encode(pictures).latent_dist.mode().float().cpu())
            found, step = found + len(pictures), step - 1
        every = torch.cat(latents)
        model.register_to_config(
            shift_factor=float(every.mean()), scaling_factor=1 / float(every.std())
        )
        draft = out_dir.with_name(f".{out_dir.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        model.save_pretrained(draft)
        assert (draft / f"{DIFFUSERS_STEM}.safetensors").is_file()
        return put_in_place(draft, out_dir)


def pixels(picture: Any) -> Float[Tensor, "3 h w"]:
    """A picture of the world, in [−1, 1]."""
    return to_tensor(Image.fromarray(picture))


def build_vae(options: Autoencoder, seed: int) -> nn.Module:
    """One of FLUX's kind, with fresh weights drawn from `seed`."""
    with quiet_imports():
        from diffusers import AutoencoderKL

    num_levels = len(options.widths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # its modules draw their weights from the global generator
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * num_levels,
            up_block_types=("UpDecoderBlock2D",) * num_levels,
            block_out_channels=options.widths,
            layers_per_block=1,
            latent_channels=options.channels,
            norm_num_groups=8,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=False,
        )
    built: nn.Module = vae.train()
    return built
