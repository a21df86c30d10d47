"""The samples of a step: a pure function of (recipe, step, rank), drawn ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hidream.errors import ModelError
from hidream.models.o1.batch import IGNORE, Batch, collate
from hidream.models.o1.config import O1Config
from hidream.models.o1.patches import patchify, to_tensor
from hidream.models.o1.references import prepare_references
from hidream.models.o1.tokens import (
    UNCONDITIONAL_PROMPT,
    Tokenizer,
    Tokens,
    encode_prepared,
    encode_text,
)
from hidream.train.config import Recipe, Stage
from hidream.world import tasks
from hidream.world.tasks import Sample

TEXT_TASKS = ("language", "understanding")
MAX_DRAWS = 10_000
REDRAW = 1 << 40  # replacement samples lie beyond every index that a run reaches


class Stream(IntEnum):
    """What a random number is for; each stream is independent of the others."""

    TASK = 0
    LEVEL = 1
    DROPOUT = 2
    NOISE = 3
    CATEGORY = 4


@dataclass(frozen=True)
class TrainBatch:
    """One process's share of a step; all its samples are of one task.

    `picture` is false for tasks of text alone: x0, noise and sigma are then empty.
    `num_labels` counts the positions with a text loss. `redrawn`: samples longer than every bucket
    that were replaced before the step's first one was found.
    """

    task: str
    batch: Batch
    x0: Float[Tensor, "b n p"]
    noise: Float[Tensor, "b n p"]
    sigma: Float[Tensor, " b"]
    num_labels: int
    redrawn: int

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
        )


def generator(seed: int, stream: Stream, index: int) -> np.random.Generator:
    """Counter-based random numbers for one purpose and one index: there is no state to save."""
    return np.random.Generator(np.random.Philox(key=[(seed << 8) | stream, index]))


def task_of(recipe: Recipe, step: int) -> str:
    """The task of all samples of a step, drawn by the stage's weights."""
    number, _ = recipe.locate(step)
    return _weighted(recipe.stages[number].tasks, generator(recipe.seed, Stream.TASK, step))


def _weighted(weights: dict[str, float], dice: np.random.Generator) -> str:
    """A key, drawn by its weight; the order of the keys does not matter."""
    names, values = zip(*sorted(weights.items()), strict=True)
    shares = np.cumsum(values) / sum(values)
    return str(names[int(np.searchsorted(shares, dice.random(), side="right"))])


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
    recipe: Recipe, config: O1Config, tokenizer: Tokenizer, step: int, rank: int = 0, world: int = 1
) -> TrainBatch:
    """Process `rank`'s samples of `step`: rank, rank + world, … of the step's global batch.

    Sample i of the run is the same whatever the number of processes. The first sample of a step
    decides its shape; the others are drawn until they have it, so each is distributed as if it
    were drawn alone.
    """
    number, _ = recipe.locate(step)
    stage, task = recipe.stages[number], task_of(recipe, step)
    first = recipe.first_sample(step)
    places = range(rank, stage.batch_size, world)
    leader, redrawn = _draw(recipe, tokenizer, stage, task, first, None)
    shape = _shape_of(recipe, tokenizer, task, leader)
    assert shape is not None
    samples = [_draw(recipe, tokenizer, stage, task, first + place, shape)[0] for place in places]
    encoded = [
        encode_sample(recipe, config, tokenizer, stage, sample, first + place)
        for sample, place in zip(samples, places, strict=True)
    ]
    num_text, num_references = padded_lengths(config, tokenizer, stage.size, task, shape)
    batch = collate(
        [tokens for tokens, _ in encoded],
        num_text=num_text,
        num_references=num_references,
        labels=[labels for _, labels in encoded],
    )
    if task in TEXT_TASKS:
        x0 = noise = torch.zeros(len(samples), 0, config.patch_dim)
        sigma = torch.zeros(len(samples))
    else:
        pictures = [Image.fromarray(s.target(stage.size, stage.size)) for s in samples]
        x0 = patchify(torch.stack([to_tensor(p) for p in pictures]), config.patch_size)
        noise = torch.stack([_noise(recipe.seed, first + i, tuple(x0.shape[1:])) for i in places])
        sigma = noise_levels(recipe, stage.batch_size, step)[rank::world]
    return TrainBatch(
        task=task,
        batch=batch,
        x0=x0,
        noise=noise,
        sigma=sigma,
        num_labels=int((batch.labels != IGNORE).sum()),
        redrawn=redrawn,
    )


def noise_levels(recipe: Recipe, batch_size: int, step: int) -> Float[Tensor, " b"]:
    """sigma = 1 - t of a step's samples; t = sigmoid(mean + std n), n stratified: Phi^-1((i+U)/B).

    The samples are independent of their place i in the batch, so the strata need no shuffling.
    """
    draws = generator(recipe.seed, Stream.LEVEL, step).random(batch_size)
    quantiles = np.clip((np.arange(batch_size) + draws) / batch_size, 1e-6, 1 - 1e-6)
    normal = np.array([NormalDist().inv_cdf(q) for q in quantiles])
    t = 1 / (1 + np.exp(-(recipe.objective.t_mean + recipe.objective.t_std * normal)))
    return torch.from_numpy((1 - t).astype(np.float32))


@lru_cache(maxsize=256)
def padded_lengths(
    config: O1Config, tokenizer: Tokenizer, size: int, task: str, shape: Shape
) -> tuple[int, int]:
    """(text positions, reference patches) of a batch: those of its longest possible sample."""
    blank = [Image.new("RGB", (size, size))] * shape.num_pictures
    if task in TEXT_TASKS:
        tokens = encode_text(tokenizer, config, "", blank, [tokenizer.special["<|im_end|>"]])
    else:
        prepared = _prepare(config, size, blank)
        tokens = encode_prepared(tokenizer, config, "", prepared, width=size, height=size)
    return len(tokens.input_ids) + shape.longest, len(tokens.references)


def _noise(seed: int, index: int, shape: tuple[int, ...]) -> Float[Tensor, "n p"]:
    draws = generator(seed, Stream.NOISE, index).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(draws)


def _prepare(config: O1Config, size: int, pictures: list[Image.Image]) -> list[Image.Image]:
    return prepare_references(
        pictures,
        (),
        width=size,
        height=size,
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
    """Sample `index`, or its first replacement that has `shape` (any, if None), and how many of
    those before it were too long for every bucket."""
    too_long = 0
    for draw in range(MAX_DRAWS):
        place = index + draw * REDRAW
        category = None
        if task == "text_to_image" and stage.categories:
            category = _weighted(stage.categories, generator(recipe.seed, Stream.CATEGORY, place))
        sample = tasks.sample(task, recipe.seed, place, category=category)
        if shape is not None:
            if shape.holds(_num_words(tokenizer, sample), _num_pictures(sample)):
                return sample, too_long
        elif _shape_of(recipe, tokenizer, task, sample) is not None:
            return sample, too_long
        else:
            too_long += 1
    raise ModelError(
        f"no sample of task {task} fits buckets.{task} = {list(recipe.buckets.of(task))}.",
        "Give longer buckets in the recipe.",
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
    return 1 if sample.task in ("edit", "understanding") else len(sample.subjects)


def encode_sample(
    recipe: Recipe,
    config: O1Config,
    tokenizer: Tokenizer,
    stage: Stage,
    sample: Sample,
    index: int,
) -> tuple[Tokens, slice]:
    """A sample's tokens and the stretch of its text that carries a loss: caption or answer."""
    pictures = [Image.fromarray(p) for p in sample.reference_pictures(stage.size, stage.size)]
    if sample.task in TEXT_TASKS:
        answer = [*tokenizer.encode(sample.answer), tokenizer.special["<|im_end|>"]]
        tokens = encode_text(tokenizer, config, sample.prompt, pictures, answer)
        num_text = len(tokens.input_ids)
        return tokens, slice(num_text - len(answer), num_text)
    prompt, objective = sample.prompt, recipe.objective
    drop_caption, drop_references = generator(recipe.seed, Stream.DROPOUT, index).random(2)
    if drop_caption < objective.caption_dropout:
        prompt = UNCONDITIONAL_PROMPT
        if drop_references < objective.reference_dropout / max(objective.caption_dropout, 1e-9):
            pictures = []
    tokens = encode_prepared(
        tokenizer,
        config,
        prompt,
        _prepare(config, stage.size, pictures),
        width=stage.size,
        height=stage.size,
    )
    dropped = prompt is UNCONDITIONAL_PROMPT or not objective.caption_weight
    end = tokens.caption.stop
    return tokens, slice(1, 1) if dropped else slice(tokens.caption.start, end + 1)


class Prefetcher:
    """Iterates over the batches of `steps`, made in order by a thread, `ahead` of them waiting."""

    def __init__(
        self,
        recipe: Recipe,
        config: O1Config,
        tokenizer: Tokenizer,
        steps: range,
        rank: int = 0,
        world: int = 1,
    ):
        self._make = lambda step: make_batch(recipe, config, tokenizer, step, rank, world)
        self._steps = steps
        self._ready: queue.Queue[TrainBatch | BaseException] = queue.Queue(max(recipe.prefetch, 1))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="hidream-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[TrainBatch]:
        for _ in self._steps:
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            for step in self._steps:
                self._put(self._make(step))
                if self._stopped.is_set():
                    return
        except BaseException as error:  # handed to the reader, which raises it
            self._put(error)

    def _put(self, item: TrainBatch | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue
