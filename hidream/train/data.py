"""The samples of a step: a pure function of (recipe, step, rank), drawn ahead in a thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hidream.errors import ModelError
from hidream.models.o1.batch import IGNORE, Batch, collate
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
    MAX_DRAWS,
    REDRAW,
    Stream,
    candidate,
    draw_noise,
    draw_place,
    generator,
    noise_levels,
    task_of,
)
from hidream.train.objective import Objective
from hidream.world.tasks import Sample

TEXT_TASKS = ("language", "understanding")
WHOLE = 8  # the words of a dataset's samples are padded to a multiple of it: shapes stay few


@dataclass(frozen=True)
class TrainBatch:
    """One process's share of a step; all its samples are of one task.

    `picture` is false for tasks of text alone: x0 and noise are then empty. `levels` are the
    sigmas of all processes' samples, `places` where in its picture LPIPS looks.
    `num_labels` counts the positions with a text loss. `redrawn`: samples longer than every bucket
    that were replaced before the step's first one was found; `corrupt`: pictures that could not be
    read, and were.
    """

    task: str
    objective: Objective
    batch: Batch
    x0: Float[Tensor, "b n p"]
    noise: Float[Tensor, "b n p"]
    sigma: Float[Tensor, " b"]
    levels: Float[Tensor, " n"]
    places: Float[Tensor, "b 2"]
    grid: tuple[int, int]
    num_labels: int
    redrawn: int
    sparsity: float = 0.0
    corrupt: int = 0

    @property
    def picture(self) -> bool:
        return self.x0.shape[1] > 0

    def to(self, device: torch.device | str) -> TrainBatch:
        """The same on another device."""
        return replace(
            self,
            batch=self.batch.to(device),
            x0=self.x0.to(device),
            noise=self.noise.to(device),
            sigma=self.sigma.to(device),
            levels=self.levels.to(device),
            places=self.places.to(device),
        )


@dataclass(frozen=True)
class Shape:
    """What the samples of a step have in common: between how many tokens of words, how many
    reference pictures, and what that means for the padded batch."""

    shortest: int
    longest: int
    num_pictures: int

    def holds(self, num_words: int, num_pictures: int) -> bool:
        """Whether a sample with so many tokens of words and reference pictures has this shape."""
        return self.shortest <= num_words <= self.longest and num_pictures == self.num_pictures


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

    Sample i of the run is the same whatever the number of processes. The first sample of a step
    decides its shape; the others are drawn until they have it, so each is distributed as if it
    were drawn alone. With `data`, they come from there, and share a size alone.
    """
    recipe, (number, _) = recipe.at(step), recipe.locate(step)
    if data is not None:
        return _data_batch(recipe, config, tokenizer, data, step, rank, world)
    stage, task = recipe.stages[number], task_of(recipe, step)
    first = recipe.first_sample(step)
    places = range(rank, stage.batch_size, world)
    leader, redrawn = _draw(recipe, tokenizer, stage, task, first, None)
    shape = _shape_of(recipe, tokenizer, task, leader)
    assert shape is not None
    samples = [_draw(recipe, tokenizer, stage, task, first + place, shape)[0] for place in places]
    size = (stage.size, stage.size)
    encoded = [
        encode_sample(recipe, config, tokenizer, size, sample, first + place)
        for sample, place in zip(samples, places, strict=True)
    ]
    lengths = padded_lengths(config, tokenizer, stage.size, task, shape)
    made = _together(recipe, config, task, size, samples, encoded, lengths, step, rank, world)
    return replace(made, redrawn=redrawn)


def _data_batch(
    recipe: Recipe,
    config: O1Config,
    tokenizer: Tokenizer,
    data: TrainingData,
    step: int,
    rank: int,
    world: int,
) -> TrainBatch:
    """As `make_batch`, of samples that differ in the lengths of words and references."""
    drawn, first = data.draw(step, rank, world), recipe.first_sample(step)
    encoded = [
        encode_sample(recipe, config, tokenizer, drawn.size, sample, first + rank + i * world)
        for i, sample in enumerate(drawn.samples)
    ]
    num_text = max(len(tokens.input_ids) for tokens, _ in encoded)
    num_references = max(len(tokens.references) for tokens, _ in encoded)
    lengths = (-(-num_text // WHOLE) * WHOLE, num_references)
    made = _together(
        *(recipe, config, drawn.task, drawn.size, drawn.samples, encoded, lengths),
        *(step, rank, world),
    )
    return replace(made, corrupt=drawn.corrupt)


def _together(
    recipe: Recipe,
    config: O1Config,
    task: str,
    size: Size,
    samples: Sequence[Sample | Pictured],
    encoded: Sequence[tuple[Tokens, slice]],
    lengths: tuple[int, int],
    step: int,
    rank: int,
    world: int,
) -> TrainBatch:
    """Encoded samples of one size as a batch, padded to `lengths` (text, reference patches), with
    pictures, noise and noise levels."""
    number, _ = recipe.locate(step)
    batch_size, first = recipe.stages[number].batch_size, recipe.first_sample(step)
    places = range(rank, batch_size, world)
    num_text, num_references = lengths
    batch = collate(
        [tokens for tokens, _ in encoded],
        num_text=num_text,
        num_references=num_references,
        labels=[labels for _, labels in encoded],
    )
    if task in TEXT_TASKS:
        x0 = noise = torch.zeros(len(samples), 0, config.patch_dim)
        levels = torch.zeros(batch_size)
    else:
        pictures = [Image.fromarray(s.target(*size)) for s in samples]
        x0 = patchify(torch.stack([to_tensor(p) for p in pictures]), config.patch_size)
        noise = torch.stack(
            [draw_noise(recipe.seed, first + i, tuple(x0.shape[1:])) for i in places]
        )
        levels = noise_levels(recipe, batch_size, step, x0.shape[1])
    return TrainBatch(
        task=task,
        objective=recipe.objective,
        batch=batch,
        x0=x0,
        noise=noise,
        sigma=levels[rank::world],
        levels=levels,
        places=torch.stack([draw_place(recipe.seed, first + place) for place in places]),
        grid=encoded[0][0].grid,
        num_labels=int((batch.labels != IGNORE).sum()),
        redrawn=0,
        sparsity=recipe.stages[number].sparsity,
    )


@lru_cache(maxsize=256)
def padded_lengths(
    config: O1Config, tokenizer: Tokenizer, size: int, task: str, shape: Shape
) -> tuple[int, int]:
    """(text positions, reference patches) of a batch: those of its longest possible sample."""
    blank = [Image.new("RGB", (size, size))] * shape.num_pictures
    if task in TEXT_TASKS:
        tokens = encode_text(tokenizer, config, "", blank, [tokenizer.special["<|im_end|>"]])
    else:
        # a layout's picture is as large as a reference
        prepared = _prepare(config, (size, size), blank)
        tokens = encode_prepared(tokenizer, config, "", prepared, width=size, height=size)
    return len(tokens.input_ids) + shape.longest, len(tokens.references)


def _prepare(
    config: O1Config, size: Size, pictures: list[Image.Image], layout: Sequence[Box] = ()
) -> list[Image.Image]:
    return prepare_references(
        pictures,
        layout,
        width=size[0],
        height=size[1],
        patch_size=config.patch_size,
        budgets=config.budgets,
    )


def _draw(
    recipe: Recipe,
    tokenizer: Tokenizer,
    stage: Stage,
    task: str,
    index: int,
    shape: Shape | None,
) -> tuple[Sample, int]:
    """Sample `index`, or its first replacement that the stage's filter admits and that has `shape`
    (any, if None), and how many of those before it were too long for every bucket."""
    too_long = 0
    for draw in range(MAX_DRAWS):
        sample = candidate(recipe, stage, task, index + draw * REDRAW)
        if not stage.filter.admits(sample.prompt):
            continue
        if shape is not None:
            if shape.holds(_num_words(tokenizer, sample), _num_pictures(sample)):
                return sample, too_long
        elif _shape_of(recipe, tokenizer, task, sample) is not None:
            return sample, too_long
        else:
            too_long += 1
    raise ModelError(
        f"no sample of task {task} passes the stage's filter and fits buckets.{task} = "
        f"{list(recipe.buckets.of(task))}.",
        "Give longer buckets in the recipe, or loosen [stages.filter].",
    )


def _shape_of(recipe: Recipe, tokenizer: Tokenizer, task: str, sample: Sample) -> Shape | None:
    """The shape of a step that begins with `sample`; None if it is longer than every bucket."""
    shortest, num_words = 0, _num_words(tokenizer, sample)
    for longest in recipe.buckets.of(task):
        if num_words <= longest:
            return Shape(shortest, longest, _num_pictures(sample))
        shortest = longest + 1
    return None


def _num_words(tokenizer: Tokenizer, sample: Sample) -> int:
    """Tokens of prompt and answer; a dropped caption counts as it was before."""
    num_answer = len(tokenizer.encode(sample.answer)) if sample.answer else 0
    return len(tokenizer.encode(sample.prompt)) + num_answer


def _num_pictures(sample: Sample) -> int:
    if sample.task in ("edit", "understanding"):
        return 1
    return len(sample.subjects) + bool(sample.layout)  # a layout is one more picture


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
    layout = sample.layout if isinstance(sample, Sample) else ()
    drop_caption, drop_references = generator(recipe.seed, Stream.DROPOUT, index).random(2)
    if drop_caption < objective.caption_dropout:
        prompt = UNCONDITIONAL_PROMPT
        if drop_references < objective.reference_dropout / max(objective.caption_dropout, 1e-9):
            pictures, layout = [], ()
    tokens = encode_prepared(
        tokenizer,
        config,
        prompt,
        _prepare(config, size, pictures, layout),
        width=size[0],
        height=size[1],
    )
    dropped = prompt is UNCONDITIONAL_PROMPT or not objective.caption_weight
    end = tokens.caption.stop
    return tokens, slice(1, 1) if dropped else slice(tokens.caption.start, end + 1)
