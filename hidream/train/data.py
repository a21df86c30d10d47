"""O1's samples of a step: a pure function of (recipe, step, rank), drawn ahead in a thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from hidream.errors import ModelError
from hidream.models.o1.batch import Batch, collate
from hidream.models.o1.config import O1Config
from hidream.models.o1.patches import patchify, to_tensor
from hidream.models.o1.references import Box, prepare_references
from hidream.models.o1.tokens import (
    UNCONDITIONAL_PROMPT,
    Tokenizer,
    Tokens,
    encode_prepared,
    encode_text,
)
from hidream.train.config import Recipe, Stage
from hidream.train.datasets import Pictured, Size, TrainingData
from hidream.train.draws import (
    Stream,
    candidates,
    draw_noise,
    draw_place,
    draw_task,
    generator,
    noise_levels,
)
from hidream.train.objective import Objective
from hidream.world.tasks import TEXT_TASKS, Sample

SAID = ("caption", *TEXT_TASKS)  # what there is text of: captions of pictures, and text alone
REFERRING = ("edit", "subject", "understanding")  # whose samples have reference pictures


@dataclass(frozen=True)
class TrainBatch:
    """One process's share of a step, or a part of it: samples of any tasks and sizes, packed.

    Of those with a picture to draw, one after the other: `x0` and `noise` of their patches, their
    `sigma`, `grids` of patches, and `crops`, where in its picture LPIPS looks; `levels` are the
    sigmas of all processes' such samples. `shares`: how many of all processes' samples are of each
    task. `said`: the text positions with a loss, by `SAID`. `redrawn`: samples of the world that
    were too long and were replaced; `corrupt`: pictures that could not be read, and were.
    """

    tasks: tuple[str, ...]
    objective: Objective
    batch: Batch
    x0: Float[Tensor, "n p"]
    noise: Float[Tensor, "n p"]
    sigma: Float[Tensor, " s"]
    grids: tuple[tuple[int, int], ...]
    crops: Float[Tensor, "s 2"]
    levels: Float[Tensor, " m"]
    shares: dict[str, float]
    said: dict[str, Int[Tensor, " _"]]
    redrawn: int
    corrupt: int

    @property
    def counts(self) -> list[int]:
        """Of positions with a loss."""
        return [len(positions) for positions in self.said.values()]

    @property
    def pictured(self) -> float:
        """The share of samples with a picture to draw."""
        return sum(share for task, share in self.shares.items() if task not in TEXT_TASKS)

    @property
    def sigma_of_patches(self) -> Float[Tensor, " n"]:
        """The noise level of each patch's picture."""
        each = zip(self.sigma, self.batch.targets, strict=True)
        return torch.cat([self.sigma[:0], *(sigma.expand(count) for sigma, count in each)])

    @property
    def may_see(self) -> bool:
        """Whether any process's samples may have reference pictures."""
        return any(task in self.shares for task in REFERRING)

    def to(self, device: torch.device | str) -> TrainBatch:
        """The same on another device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            batch=self.batch.to(device),
            x0=moved(self.x0),
            noise=moved(self.noise),
            sigma=moved(self.sigma),
            crops=moved(self.crops),
            levels=moved(self.levels),
            said={name: moved(positions) for name, positions in self.said.items()},
        )


@dataclass(frozen=True)
class _Found:
    """A sample, the size of its picture, and what it took to find it."""

    task: str
    sample: Sample | Pictured
    size: Size
    redrawn: int = 0
    corrupt: int = 0


def make_batch(
    recipe: Recipe,
    config: O1Config,
    tokenizer: Tokenizer,
    step: int,
    rank: int = 0,
    world: int = 1,
    data: TrainingData | None = None,
) -> TrainBatch:
    """Process `rank`'s samples of `step`: rank, rank + world, … of the step's global batch.

    Sample i of the run, with its task, is the same whatever the number of processes. With `data`,
    samples come from there, each at the size nearest to its own.
    """
    recipe, (number, _) = recipe.at(step), recipe.locate(step)
    stage, first = recipe.stages[number], recipe.first_sample(step)
    own = range(first + rank, first + stage.batch_size, world)
    drawn = [_draw(recipe, tokenizer, stage, number, index, data) for index in own]
    encoded = [
        encode_sample(recipe, config, tokenizer, d.size, d.sample, index)
        for d, index in zip(drawn, own, strict=True)
    ]
    batch = collate([tokens for tokens, _ in encoded], stage.sparsity)
    nothing = torch.zeros(0, config.patch_dim)
    patches, noise, crops = [nothing], [nothing], [torch.zeros(0, 2)]
    for d, index in zip(drawn, own, strict=True):
        if d.task not in TEXT_TASKS:
            picture = to_tensor(Image.fromarray(d.sample.target(*d.size)))
            patches.append(patchify(picture[None], config.patch_size)[0])
            noise.append(draw_noise(recipe.seed, index, tuple(patches[-1].shape)))
            crops.append(draw_place(recipe.seed, index)[None])
    tasks = [draw_task(recipe, stage, first + i) for i in range(stage.batch_size)]
    pictured = torch.tensor([task not in TEXT_TASKS for task in tasks])
    sizes = _sizes(stage, number, first, tasks, data)
    levels = noise_levels(
        recipe, stage.batch_size, step, [w * h // config.patch_size**2 for w, h in sizes]
    )
    return TrainBatch(
        tasks=tuple(d.task for d in drawn),
        objective=recipe.objective,
        batch=batch,
        x0=torch.cat(patches),
        noise=torch.cat(noise),
        sigma=levels[rank::world][pictured[rank::world]],
        grids=tuple(tokens.grid for tokens, _ in encoded if tokens.num_target),
        crops=torch.cat(crops),
        levels=levels[pictured],
        shares={task: count / len(tasks) for task, count in sorted(Counter(tasks).items())},
        said=_said(encoded, drawn),
        redrawn=sum(d.redrawn for d in drawn),
        corrupt=sum(d.corrupt for d in drawn),
    )


def _sizes(
    stage: Stage, number: int, first: int, tasks: Sequence[str], data: TrainingData | None
) -> list[Size]:
    """Of the pictures of all the step's samples."""
    if data is None:
        return [(stage.size, stage.size)] * len(tasks)
    return [data.size_at(number, task, first + i) for i, task in enumerate(tasks)]


def _said(
    encoded: Sequence[tuple[Tokens, slice]], drawn: Sequence[_Found]
) -> dict[str, Int[Tensor, " _"]]:
    """See `TrainBatch.said`."""
    found: dict[str, list[Tensor]] = {name: [torch.zeros(0, dtype=torch.long)] for name in SAID}
    first = 0
    for (tokens, labels), d in zip(encoded, drawn, strict=True):
        positions = torch.arange(len(tokens.input_ids))[labels]  # never the first: chats begin so
        found[d.task if d.task in TEXT_TASKS else "caption"].append(first + positions - 1)
        first += len(tokens.input_ids)
    return {name: torch.cat(positions) for name, positions in found.items()}


def _draw(
    recipe: Recipe,
    tokenizer: Tokenizer,
    stage: Stage,
    number: int,
    index: int,
    data: TrainingData | None,
) -> _Found:
    """Sample `index` of the run."""
    task = draw_task(recipe, stage, index)
    if data is not None and not data.from_world(number, task, index):
        sample, corrupt = data.sample(number, task, index)
        return _Found(task, sample, sample.size, corrupt=corrupt)
    return _draw_world(recipe, tokenizer, stage, task, index)


def _draw_world(
    recipe: Recipe, tokenizer: Tokenizer, stage: Stage, task: str, index: int
) -> _Found:
    """The first of the world's candidates whose words are no more than `max_text`."""
    for too_long, sample in enumerate(candidates(recipe, stage, task, index)):
        if num_words(tokenizer, sample) <= recipe.max_text:
            return _Found(task, sample, (stage.size, stage.size), redrawn=too_long)
    raise ModelError(
        f"no sample of task {task} passes the stage's filter and has at most max_text = "
        f"{recipe.max_text} tokens.",
        "Give a larger max_text in the recipe, or loosen [stages.filter].",
    )


def num_words(tokenizer: Tokenizer, sample: Sample | Pictured) -> int:
    """Tokens of prompt and answer; a dropped caption counts as it was before."""
    num_answer = len(tokenizer.encode(sample.answer)) if sample.answer else 0
    return len(tokenizer.encode(sample.prompt)) + num_answer


def encode_sample(
    recipe: Recipe,
    config: O1Config,
    tokenizer: Tokenizer,
    size: Size,
    sample: Sample | Pictured,
    index: int,
) -> tuple[Tokens, slice]:
    """A sample's tokens and the stretch of its text that carries a loss: caption or answer."""
    pictures = [Image.fromarray(p) for p in sample.reference_pictures(*size)]
    if sample.task in TEXT_TASKS:
        answer = [*tokenizer.encode(sample.answer), tokenizer.special["<|im_end|>"]]
        tokens = encode_text(tokenizer, config, sample.prompt, pictures, answer)
        num_text = len(tokens.input_ids)
        return tokens, slice(num_text - len(answer), num_text)
    prompt, objective = sample.prompt, recipe.objective
    layout: Sequence[Box] = sample.layout if isinstance(sample, Sample) else ()
    drop_caption, drop_references = generator(recipe.seed, Stream.DROPOUT, index).random(2)
    if drop_caption < objective.caption_dropout:
        prompt = UNCONDITIONAL_PROMPT
        if drop_references < objective.reference_dropout / max(objective.caption_dropout, 1e-9):
            pictures, layout = [], ()
    prepared = prepare_references(
        pictures,
        layout,
        width=size[0],
        height=size[1],
        patch_size=config.patch_size,
        budgets=config.budgets,
    )
    tokens = encode_prepared(tokenizer, config, prompt, prepared, width=size[0], height=size[1])
    dropped = prompt is UNCONDITIONAL_PROMPT or not objective.caption_weight
    end = tokens.caption.stop
    return tokens, slice(1, 1) if dropped else slice(tokens.caption.start, end + 1)
