"""I1 in training: latents of a frozen autoencoder, words of frozen encoders, balanced experts."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from hidream import registry
from hidream.errors import UsageError
from hidream.folder import read_config
from hidream.lora_file import linear_layers
from hidream.models.i1.config import SIZES, I1Config
from hidream.models.i1.model import I1, Features
from hidream.models.i1.text import TextEncoders, Texts
from hidream.models.i1.weights import load_i1, open_i1, save_i1
from hidream.models.vae import LatentCodec
from hidream.nn.moe import MixtureOfExperts
from hidream.pipelines.base import Counter
from hidream.pipelines.i1 import I1Pipeline
from hidream.pipelines.latent import LatentJob, denoise_latents
from hidream.request import GenerateRequest, resolve
from hidream.sampling import add_noise
from hidream.train import encoders
from hidream.train.checks import check_sizes
from hidream.train.config import Recipe
from hidream.train.datasets import Pictured, Size, TrainingData
from hidream.train.distributed import PendingSums, World
from hidream.train.draws import (
    Stream,
    draw_noise,
    draw_sample,
    draw_task,
    generator,
    noise_levels,
)
from hidream.train.export import put_in_place
from hidream.train.flops import i1_step
from hidream.train.grids import PROMPTS, montage
from hidream.train.learner import Learner, Losses
from hidream.train.losses import velocity_loss
from hidream.train.objective import Objective
from hidream.train.vae import pixels
from hidream.world.tasks import Sample

MAX_KEPT = 64 * 1024**2  # bytes of encoded prompts: some thousands
SKEW_SHIFT = 0.5


@dataclass(frozen=True)
class LatentBatch:
    """One process's share of a step; all its samples are of one task.

    `source`: the latents beside an edit's, none (b, 0, …) for other tasks; `weight`: how much each
    latent's error counts.
    """

    task: str
    objective: Objective
    features: Features
    x0: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    sigma: Float[Tensor, " b"]
    source: Float[Tensor, "b c h w"] | None = None
    weight: Float[Tensor, "b 1 h w"] | None = None
    counts: tuple[int, ...] = ()
    redrawn: int = 0
    corrupt: int = 0

    def to(self, device: torch.device | str) -> LatentBatch:
        """The same on another device; the features follow the network by themselves."""
        return replace(
            self,
            x0=self.x0.to(device),
            noise=self.noise.to(device),
            sigma=self.sigma.to(device),
            source=None if self.source is None else self.source.to(device),
            weight=None if self.weight is None else self.weight.to(device),
        )


class I1Learner(Learner):
    """Velocity of latents, by flow matching, beside the loss that balances the experts.

    What is frozen comes from `init`; without it, the autoencoder from the run before this one, and
    the text encoders are made in `RUN/encoders`.
    """

    task = "text_to_image"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t"),
        *("w1", "w2", "w3"),  # of experts and all others; a gate keeps its choices
    )

    def __init__(self, recipe: Recipe, world: World | None = None):
        super().__init__(recipe, world)
        self.data = self.open_data(recipe)
        world = world or World()
        self.config = model_config(recipe)
        _check_tasks(recipe, self.task)
        texts, vae = Path(recipe.init), Path(recipe.init) / "vae"
        if not recipe.init:
            texts, vae = recipe.run_dir / "encoders", recipe.run_dir / "vae" / "model"
        _check_autoencoder(vae)
        if world.main and not texts.exists():
            encoders.write_encoders(
                texts, self.config, num_tokens=recipe.num_tokens, seed=recipe.seed
            )
        world.barrier()
        self.texts, self.vae = texts, vae
        self.codec = LatentCodec.open(vae)
        self.encoders = self._open_encoders()
        if self.codec.channels != self.config.in_channels:
            raise UsageError(
                f"{recipe.model} draws {self.config.in_channels} channels; the autoencoder in "
                f"{vae} has {self.codec.channels}.",
                "Give vae.channels as many.",
            )

    @classmethod
    def open_data(cls, recipe: Recipe, *, unpack: bool = False) -> TrainingData | None:
        if not recipe.data.path:
            return None
        if not recipe.init:
            raise UsageError(
                "data.path needs a whole model to begin with.",
                "Give init = FOLDER: an autoencoder learns on the world alone.",
            )
        _check_autoencoder(Path(recipe.init) / "vae")
        read = TextEncoders.open(recipe.init, device="cpu", dtype=torch.float32)

        def fits(task: str, caption: str) -> str:
            cut = read.cut(Texts.of(caption))
            whole = len(cut) < len(encoders.PARTS)  # one of them reads all of it
            return "" if whole else f"its caption is too long: {cut[-1].rstrip('.')}"

        return TrainingData(recipe, patch_side(recipe), fits, unpack=unpack)

    def lora_layers(self) -> list[str]:
        folder, _ = open_i1(self.recipe.init)
        shapes = {name: info.shape for name, info in folder.tensors.items()}
        return list(linear_layers(shapes))

    def describe(self) -> None:
        if self.data is not None:
            self.data.describe()

    def _open_encoders(self) -> TextEncoders:
        opened = TextEncoders.open(self.texts, device="cpu", dtype=torch.float32, max_kept=MAX_KEPT)
        opened.check(self.config)
        return opened

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        check_sizes(recipe, patch_side(recipe))

    def build(self) -> I1:
        if self.recipe.init:
            model = load_i1(self.recipe.init, config=self.config)
        else:
            model = I1(self.config)
            model.init_weights(torch.Generator().manual_seed(self.recipe.seed))
            if self.recipe.gate_skew:
                skew_gates(model, self.recipe.gate_skew)
        return model.requires_grad_(True).train()

    def network(self) -> I1:
        return I1(self.config).requires_grad_(True).train()

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> LatentBatch:
        recipe = self.recipe.at(step)
        number, _ = recipe.locate(step)
        stage, first = recipe.stages[number], recipe.first_sample(step)
        task = draw_task(recipe, stage, step)
        indices = [first + place for place in range(rank, stage.batch_size, world)]
        size, corrupt = (stage.size, stage.size), 0
        samples: Sequence[Sample | Pictured]
        if self.data is None:
            samples = [draw_sample(recipe, stage, task, index) for index in indices]
        else:
            drawn = self.data.draw(step, rank, world)
            samples, size, corrupt = drawn.samples, drawn.size, drawn.corrupt
        dropped = [generator(recipe.seed, Stream.DROPOUT, index).random(2) for index in indices]
        keeps = [float(drop[0]) >= recipe.objective.caption_dropout for drop in dropped]
        prompts = [s.prompt if keep else "" for s, keep in zip(samples, keeps, strict=True)]
        x0 = self._latents([s.target(*size) for s in samples])
        shape = tuple(x0.shape[1:])
        num_tokens = shape[1] * shape[2] // self.config.patch_size**2
        batch = LatentBatch(
            task=task,
            objective=recipe.objective,
            features=self.encoders.encode([Texts.of(prompt) for prompt in prompts]),
            x0=x0,
            noise=torch.stack([draw_noise(recipe.seed, index, shape) for index in indices]),
            sigma=noise_levels(recipe, stage.batch_size, step, num_tokens)[rank::world],
            corrupt=corrupt,
        )
        return self._with_sources(batch, samples, size, [float(drop[1]) for drop in dropped])

    def _with_sources(
        self,
        batch: LatentBatch,
        samples: Sequence[Sample | Pictured],
        size: Size,
        dropped: Sequence[float],
    ) -> LatentBatch:
        """The batch with what an edit has besides."""
        return batch

    def _latents(self, pictures: Sequence[Any]) -> Float[Tensor, "b c h w"]:
        return self.codec.encode(torch.stack([pixels(picture) for picture in pictures]))

    def losses(self, model: I1, batch: LatentBatch, sums: PendingSums) -> Losses:
        """`load_max`: of the busiest expert of all blocks, over the mean."""
        objective = batch.objective
        x_t = add_noise(batch.x0, batch.noise, batch.sigma)
        with self.precision():
            prediction = model(x_t, batch.sigma, batch.features, source=batch.source)
        velocity = batch.noise - batch.x0
        total = velocity_loss(
            prediction.velocity, velocity, batch.sigma, objective.t_power, batch.weight
        )
        parts = {f"loss_{batch.task}": total.detach()}
        if prediction.balance_loss is not None and prediction.expert_loads is not None:
            total = total + objective.balance_weight * prediction.balance_loss.float()
            parts["loss_balance"] = prediction.balance_loss.detach()
            parts["load_max"] = prediction.expert_loads.max() * self.config.num_experts
        return Losses(total, parts)

    def flops(self, batch: LatentBatch) -> int:
        patches = batch.x0[0, 0].numel() // self.config.patch_size**2
        return i1_step(
            self.config,
            samples=len(batch.x0),
            patches=patches,
            t5=batch.features.t5.shape[1],
            llama=batch.features.llama.shape[2],
            source=0 if batch.source is None else patches,
        )

    def blocks(self, model: I1) -> Sequence[nn.Module]:
        return model.blocks

    def units(self, model: I1) -> Sequence[nn.Module]:
        """Modulations of all blocks are computed before the first block."""
        return [part for block in model.blocks for part in (block.adaLN_modulation, block)]

    def grid(self, model: I1, step: int) -> Image.Image:
        number, _ = self.recipe.locate(step - 1)
        size = self.recipe.stages[number].size
        prompts: tuple[str, ...] = PROMPTS
        if self.data is not None:
            own = [item.caption for item in self.data.first(self.task, len(PROMPTS) // 2)]
            prompts = (*own, *PROMPTS)[: len(PROMPTS)]
        requests = [self._resolved(prompt, i, size) for i, prompt in enumerate(prompts)]
        jobs = [self._job(request) for request in requests]
        return montage(self._drawn(model, jobs), size)

    def _resolved(self, prompt: str, seed: int, size: int, **more: Any) -> GenerateRequest:
        """A request at the settings with which the model is exported."""
        spec = registry.of_folder(self.settings(), family=self.recipe.family)
        request = GenerateRequest(prompt=prompt, seed=seed, width=size, height=size, **more)
        return resolve(request, spec.defaults, spec.patch_size)

    def _job(self, request: GenerateRequest, **more: Any) -> LatentJob:
        negative = Texts.of((request.negative_prompt or "").strip())
        return LatentJob(request, request.seeds[0], Texts.of(request.prompt), negative, **more)

    @torch.no_grad()
    def _drawn(self, model: I1, jobs: Sequence[LatentJob]) -> list[Image.Image]:
        """With encoders of their own: the others' thread may be at work."""
        codec = LatentCodec.open(self.vae, device=self.recipe.device)
        return denoise_latents(model, self._open_encoders(), codec, jobs, counter=Counter())

    def pipeline(self, model: I1) -> I1Pipeline:
        """With encoders of its own: see `_drawn`."""
        spec = registry.of_folder(self.settings(), family=self.recipe.family)
        codec = LatentCodec.open(self.vae, device=self.recipe.device)
        return I1Pipeline(spec, model, self._open_encoders(), codec)

    def settings(self) -> dict[str, Any]:
        """hidream.json: how it draws."""
        size = self.recipe.stages[-1].size
        return {
            "name": self.recipe.name.replace("_", "-"),
            "variant": "full",
            "sampler": "flash",
            "num_inference_steps": 40,
            "guidance_scale": 3.0,
            "shift": 4.0,
            "width": size,
            "height": size,
        }

    def export(self, model: I1, out_dir: Path) -> Path:
        """The whole repository: the network in bf16, and what is frozen as it was."""
        draft = out_dir.with_name(f".{out_dir.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_i1(copy.deepcopy(model).to("cpu", torch.bfloat16), draft / "transformer")
        shutil.copytree(self.vae, draft / "vae")
        for part in encoders.CLASSES:
            shutil.copytree(self.texts / part, draft / part)
        shift = self.settings()["shift"]
        scheduler = {
            "_class_name": "UniPCMultistepScheduler",
            "flow_shift": shift,
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "solver_order": 2,
            "solver_type": "bh2",
            "use_flow_sigmas": True,
        }
        index = {
            "_class_name": "HiDreamImagePipeline",
            "scheduler": ("diffusers", scheduler["_class_name"]),
            "transformer": ("diffusers", "HiDreamImageTransformer2DModel"),
            "vae": ("diffusers", "AutoencoderKL"),
            **{part: ("transformers", name) for part, name in encoders.CLASSES.items()},
        }
        _write_json(draft / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(draft / "model_index.json", index)
        _write_json(draft / "hidream.json", self.settings())
        return put_in_place(draft, out_dir)


def _check_autoencoder(vae: Path) -> None:
    if not vae.is_dir():
        raise UsageError(
            f"there is no autoencoder in {vae}.",
            "Give the recipe [[vae.stages]], or init=FOLDER with a whole I1.",
        )


def patch_side(recipe: Recipe) -> int:
    """Pixels of a picture that a patch's side stands for: by the VAE in `init` if there is one,
    else by the recipe's own."""
    place, num_levels = Path(recipe.init) / "vae", len(recipe.vae.widths)
    if recipe.init and place.is_dir():
        num_levels = len(read_config(place)[0]["block_out_channels"])
    return 2 ** (num_levels - 1) * model_config(recipe).patch_size


def model_config(recipe: Recipe) -> I1Config:
    """The named size; UsageError for one that does not exist."""
    if recipe.model not in SIZES:
        raise UsageError(f'unknown model "{recipe.model}"; sizes are {", ".join(SIZES)}.')
    return SIZES[recipe.model]


def _check_tasks(recipe: Recipe, task: str) -> None:
    for number, stage in enumerate(recipe.stages):
        others = [name for name, weight in stage.tasks.items() if weight and name != task]
        if others:
            raise UsageError(
                f"stages.{number}.tasks has {others[0]}; {recipe.model} learns {task} alone.",
                f"Write tasks = {{ {task} = 1.0 }}.",
            )


@torch.no_grad()
def skew_gates(model: I1, score: float) -> None:
    """Have every gate prefer its first expert by `score`, for every token.

    A gate has no bias and what it reads has mean 0; a shift of all of a token's values, by the
    modulation before it, is something that the normalised token cannot hold, and serves as one.
    """
    size = model.config.size
    for block in model.blocks:
        if isinstance(block.ff_i, MixtureOfExperts):
            shifts = block.adaLN_modulation.get_parameter("1.bias").view(-1, size)
            shifts[3] += SKEW_SHIFT  # of the picture's tokens, before the experts
            block.ff_i.gate.weight[0] += score / (SKEW_SHIFT * size)


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
