"""O1 in training: its samples, its losses, its pictures, its folder."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from hidream import registry
from hidream.errors import UsageError
from hidream.folder import open_folder
from hidream.limits import SPARSE_BLOCK, skipped_blocks
from hidream.locating import locate
from hidream.lora_file import linear_layers
from hidream.models.o1.config import SIZES, O1Config
from hidream.models.o1.decoder import Decoder
from hidream.models.o1.model import O1
from hidream.models.o1.patches import unpatchify
from hidream.models.o1.tokens import UNCONDITIONAL_PROMPT, Tokenizer, Tokens, encode
from hidream.models.o1.weights import config_of, load_o1, save_o1
from hidream.nn.attention import Backend
from hidream.pipelines.base import Counter
from hidream.pipelines.denoise import O1Job, denoise_batch
from hidream.pipelines.o1 import O1Pipeline
from hidream.pipelines.prefixes import Prefixes
from hidream.request import GenerateRequest
from hidream.sampling import add_noise
from hidream.train.checks import check_sizes
from hidream.train.config import Recipe
from hidream.train.data import SAID, TrainBatch, make_batch
from hidream.train.datasets import TrainingData
from hidream.train.distributed import PendingSums, World
from hidream.train.export import put_in_place
from hidream.train.flops import o1_step
from hidream.train.grids import PROMPTS, montage
from hidream.train.learner import Learner, Losses
from hidream.train.losses import picture_losses, text_loss
from hidream.train.perceptual import PerceptualLosses
from hidream.world.tasks import TEXT_TASKS

PACKAGE = Path(__file__).parents[1]
MATH_ATTENTION_BELOW = 200  # tokens; see hidream.nn.attention


class O1Learner(Learner):
    """O1 on all tasks of the world, or on a dataset."""

    lora_targets = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
    lora_keys = "comfyui"

    def __init__(self, recipe: Recipe, world: World | None = None):
        super().__init__(recipe, world)
        self.tokenizer = Tokenizer(tokenizer_folder(recipe))
        self.data = self.open_data(recipe)
        self.config: O1Config | None = None  # known once a model was built
        stages = range(len(recipe.stages))
        wanted = any(recipe.objective_of(number).perceptual for number in stages)
        self.perceptual = PerceptualLosses(recipe) if wanted else None

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        check_sizes(recipe, model_config(recipe).patch_size)
        if recipe.lora.rank:
            _check_noise(recipe)

    def build(self) -> O1:
        recipe = self.recipe
        if recipe.init:
            model, _ = load_o1(_found(recipe.init), attention_backend=_backend(recipe))
        else:
            model = O1(model_config(recipe), _backend(recipe))
            model.init_weights(torch.Generator().manual_seed(recipe.seed))
        return self._to_train(model)

    def network(self) -> O1:
        init = self.recipe.init
        config = config_of(open_folder(_found(init))) if init else model_config(self.recipe)
        return self._to_train(O1(config, _backend(self.recipe)))

    def _to_train(self, model: O1) -> O1:
        self.config = model.config
        _check_sparsity(self.recipe, model.config)
        return model.requires_grad_(True).train()

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> TrainBatch:
        config = self.config or model_config(self.recipe)
        return make_batch(self.recipe, config, self.tokenizer, step, rank, world, self.data)

    @classmethod
    def open_data(cls, recipe: Recipe, *, unpack: bool = False) -> TrainingData | None:
        if not recipe.data.path:
            return None
        tokenizer = Tokenizer(tokenizer_folder(recipe))

        def fits(task: str, caption: str) -> str:
            most, there = recipe.max_text, len(tokenizer.encode(caption))
            return f"its caption has {there} tokens; max_text is {most}" * (there > most)

        return TrainingData(recipe, model_config(recipe).patch_size, fits, unpack=unpack)

    def lora_layers(self) -> list[str]:
        tensors = open_folder(_found(self.recipe.init)).tensors
        return list(linear_layers({name: info.shape for name, info in tensors.items()}))

    def describe(self) -> None:
        if self.data is not None:
            self.data.describe()

    def losses(self, model: O1, batch: TrainBatch, sums: PendingSums) -> Losses:
        """The mean over all samples of the step: a picture's loss weighs 1, its caption's
        `caption_weight`, text alone `lm_weight`; of a task's text, every label counts alike."""
        objective, x_t = batch.objective, None
        if batch.pictured:
            x_t = add_noise(batch.x0, batch.noise, batch.sigma_of_patches, objective.noise_scale)
        with self.precision():
            prediction = model(batch.batch, x_t, batch.sigma, torch.cat([*batch.said.values()]))
        total = torch.zeros((), device=batch.x0.device)
        parts: dict[str, Tensor] = {}
        if prediction.x0 is not None:
            losses = picture_losses(
                *(prediction.x0, batch.x0, batch.batch.targets, batch.sigma),
                *(objective.delta, objective.t_power),
            )
            total = total + losses.sum() / len(batch.tasks)
            parts |= _by_task(losses.detach(), batch.tasks)
            times = len(batch.levels) / len(batch.tasks)  # a sum's part in the mean over samples
            for name, (weight, loss) in self._perceptual(prediction.x0, batch).items():
                total = total + times * weight * loss
                parts[name] = loss.detach() * (times / batch.pictured)
        if prediction.logits is not None:
            for name, (weight, loss) in _text_losses(prediction.logits, batch, sums).items():
                total = total + weight * loss
                parts[name] = loss.detach()
        if batch.may_see and batch.batch.pixel_values is None:  # all references were dropped here
            tower = model.model.visual.parameters()  # others have gradients there: so must this one
            total = total + 0 * torch.stack([p.sum() for p in tower]).sum()
        return Losses(total, parts)

    def flops(self, batch: TrainBatch) -> int:
        return o1_step(
            self.config or model_config(self.recipe),
            batch.batch.lengths,
            vision_grids=batch.batch.image_grids,
            num_logits=sum(batch.counts),
        )

    def _perceptual(self, predicted: Tensor, batch: TrainBatch) -> dict[str, tuple[float, Tensor]]:
        """See `PerceptualLosses`; by their names in the log."""
        found: dict[str, tuple[float, Tensor]] = {}
        if self.perceptual is None or not batch.objective.perceptual:
            return found
        pictures = [part.split(batch.batch.targets) for part in (predicted, batch.x0)]
        patch_size = model_config(self.recipe).patch_size
        for grid in dict.fromkeys(batch.grids):  # those of one size together
            own = [i for i, other in enumerate(batch.grids) if other == grid]
            ours, theirs = (
                unpatchify(torch.stack([patches[i] for i in own]), grid, patch_size)
                for patches in pictures
            )
            sigma, crops = (torch.stack([t[i] for i in own]) for t in (batch.sigma, batch.crops))
            for name, weight, loss in self.perceptual(
                *(ours, theirs, sigma, crops, batch.objective, batch.levels)
            ):
                found[name] = (weight, found[name][1] + loss if name in found else loss)
        return found

    def blocks(self, model: O1) -> Sequence[nn.Module]:
        return list(model.model.language_model.layers)  # one block compiles 8 times faster

    def decoder_sizes(self) -> tuple[int, int, int]:
        text = model_config(self.recipe).text
        return text.num_heads, text.num_kv_heads, text.intermediate_size

    def decoder(self, model: O1) -> Decoder:
        return model.model.language_model

    def grid(self, model: O1, step: int) -> Image.Image:
        number, _ = self.recipe.locate(step - 1)
        stage = self.recipe.stages[number]
        prompts: tuple[str, ...] = PROMPTS
        if self.data is not None:
            own = [item.caption for item in self.data.first("text_to_image", len(PROMPTS) // 2)]
            prompts = (*own, *PROMPTS)[: len(PROMPTS)]
        pictures = sample_pictures(
            model,
            self.tokenizer,
            prompts,
            size=stage.size,
            noise_scale=self.recipe.objective_of(number).noise_scale,
            sparsity=stage.sparsity,
        )
        return montage(pictures, stage.size)

    def pipeline(self, model: O1) -> O1Pipeline:
        spec = registry.of_folder(settings(model.config, self.recipe))
        return O1Pipeline(spec, model, self.tokenizer, Prefixes(0))

    def export(self, model: O1, out_dir: Path) -> Path:
        """In bf16, with tokenizer and hidream.json."""
        draft = out_dir.with_name(f".{out_dir.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        half = copy.deepcopy(model).to("cpu", torch.bfloat16)
        told = settings(model.config, self.recipe)
        save_o1(half, draft, tokenizer=self.tokenizer, settings=told)
        return put_in_place(draft, out_dir)


def _text_losses(
    logits: Float[Tensor, "m v"], batch: TrainBatch, sums: PendingSums
) -> dict[str, tuple[float, Tensor]]:
    """(weight, loss) of all text that has a weight, by its name in the log.

    A loss is a process's share of the mean over the labels of all, times their number.
    """
    objective, found = batch.objective, {}
    weights = {"caption": objective.caption_weight * batch.pictured}
    weights |= {task: objective.lm_weight * batch.shares.get(task, 0) for task in TEXT_TASKS}
    for name, own, count in zip(SAID, logits.split(batch.counts), sums.wait(), strict=False):
        if weights[name]:
            following = batch.batch.input_ids[batch.said[name] + 1]
            loss = text_loss(own, following, count / sums.num_processes)
            found[f"loss_{name}"] = (weights[name], loss)
    return found


def _by_task(losses: Float[Tensor, " s"], tasks: Sequence[str]) -> dict[str, Tensor]:
    """The mean loss of each task's pictures, which come in the order of `tasks`."""
    drawn = [task for task in tasks if task not in TEXT_TASKS]
    each = list(zip(drawn, losses, strict=True))
    return {
        f"loss_{task}": torch.stack([loss for other, loss in each if other == task]).mean()
        for task in sorted(set(drawn))
    }


def model_config(recipe: Recipe) -> O1Config:
    """The named size; UsageError for one that does not exist."""
    if recipe.model not in SIZES:
        raise UsageError(f'unknown model "{recipe.model}"; sizes are {", ".join(SIZES)}.')
    return SIZES[recipe.model]


def tokenizer_folder(recipe: Recipe) -> Path:
    """`tokenizer` of the recipe: a folder, `init` when empty; relative to here or the package."""
    return _found(recipe.tokenizer or recipe.init)


def _found(folder: str) -> Path:
    path, inside = Path(folder), PACKAGE.parent / folder
    return inside if not path.exists() and inside.exists() else path


def sample_pictures(
    model: O1,
    tokenizer: Tokenizer,
    prompts: tuple[str, ...],
    *,
    size: int,
    noise_scale: float = 1.0,
    sparsity: float = 0.0,
    num_steps: int = 15,
    guidance_scale: float = 2.0,
    seed: int = 0,
) -> list[Image.Image]:
    """One square picture a prompt, by Euler steps; picture i has seed `seed + i`."""

    def tokens(prompt: str) -> Tokens:
        return encode(tokenizer, model.config, prompt, width=size, height=size)

    unconditional = tokens(UNCONDITIONAL_PROMPT)
    jobs = []
    for i, prompt in enumerate(prompts):
        request = GenerateRequest(
            prompt=prompt,
            width=size,
            height=size,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            guidance_interval=(0.0, 1.0),
            noise_scale=noise_scale,
            sampler="euler",
            shift=3.0,
            sparsity=sparsity,
        )
        jobs.append(O1Job(request, seed + i, tokens(prompt), unconditional))
    with torch.no_grad():
        return denoise_batch(model, jobs, counter=Counter())


def settings(config: O1Config, recipe: Recipe) -> dict[str, Any]:
    """hidream.json: what the published layout cannot say about this checkpoint.

    Steps and guidance are what nano does well with (docs/o1_nano.md): fewer and less where composed
    scenes leave nothing to decide.
    """
    last = recipe.stages[-1]
    size, sparsity = last.size, last.sparsity
    return {
        "name": recipe.name.replace("_", "-"),
        "family": "o1",
        "variant": "full",
        "patch_size": config.patch_size,
        "bottleneck_size": config.bottleneck_size,
        "noise_scale": recipe.objective_of(len(recipe.stages) - 1).noise_scale,
        "sampler": "flash",
        "num_inference_steps": 25 if last.composed else 50,
        "guidance_scale": 2.0 if last.composed else 3.0,
        "shift": 3.0,
        "width": size,
        "height": size,
        **({"sparsity": sparsity} if sparsity else {}),
        "reference_budgets": {
            "sides": [list(row) for row in config.budgets.sides],
            "vision_sides": [list(row) for row in config.budgets.vision_sides],
        },
    }


def _check_noise(recipe: Recipe) -> None:
    """A LoRA changes little: it must be trained with the noise that its model draws from."""
    spec, _ = locate(_found(recipe.init))
    known = {d.noise_scale for d in (spec.defaults, *spec.defaults_by_task.values())}
    for number in range(len(recipe.stages)):
        scale = recipe.objective_of(number).noise_scale
        if scale not in known:
            raise UsageError(
                f"objective.noise_scale = {scale}, and {recipe.init} draws with "
                f"{' or '.join(map(str, sorted(known)))}.",
                f"Set objective.noise_scale={spec.defaults.noise_scale}.",
            )


def _check_sparsity(recipe: Recipe, config: O1Config) -> None:
    for number, stage in enumerate(recipe.stages):
        patches = (stage.size // config.patch_size) ** 2
        if stage.sparsity and not skipped_blocks(patches, stage.sparsity):
            raise UsageError(
                f"stages.{number}.sparsity = {stage.sparsity} leaves nothing out of {patches} "
                f"patches, which are {patches // SPARSE_BLOCK} blocks of {SPARSE_BLOCK}.",
                "Give a larger size or sparsity.",
            )


def _backend(recipe: Recipe) -> Backend:
    if recipe.device != "cpu" or recipe.precision == "float32":
        return "auto"  # measured in fp32 on a CPU: as fast at 16 patches, 1.3 times at 128
    patch = SIZES[recipe.model].patch_size if recipe.model in SIZES else 16
    longest = max(96 + 2 * (stage.size // patch) ** 2 for stage in recipe.stages)
    return "math" if longest < 2 * MATH_ATTENTION_BELOW else "auto"
