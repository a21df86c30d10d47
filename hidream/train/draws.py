"""What a run draws, by counter: there is no state to save, and no order to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hidream.errors import ModelError
from hidream.sampling.schedules import shift_sigma
from hidream.train.config import Recipe, Stage
from hidream.world import tasks
from hidream.world.composed import composed
from hidream.world.tasks import Sample

MAX_DRAWS = 10_000
REDRAW = 1 << 40  # replacement samples lie beyond every index that a run reaches


class Stream(IntEnum):
    """What a random number is for; each stream is independent of the others."""

    TASK = 0
    LEVEL = 1
    DROPOUT = 2
    NOISE = 3
    CATEGORY = 4
    PIXELS = 5
    ORDER = 6
    ADAPTERS = 7
    SOURCE = 8
    FLIP = 9
    CROP = 10


def generator(seed: int, stream: Stream, index: int) -> np.random.Generator:
    """Counter-based random numbers for one purpose and one index: there is no state to save."""
    return np.random.Generator(np.random.Philox(key=[(seed << 8) | stream, index]))


def draw_task(recipe: Recipe, stage: Stage, index: int) -> str:
    """The task of a sample, or of a step all of whose samples have one, by the stage's weights."""
    return weighted(stage.tasks, generator(recipe.seed, Stream.TASK, index))


def weighted(weights: dict[str, float], dice: np.random.Generator) -> str:
    """A key, drawn by its weight; the order of the keys does not matter."""
    names, values = zip(*sorted(weights.items()), strict=True)
    shares = np.cumsum(values) / sum(values)
    return str(names[int(np.searchsorted(shares, dice.random(), side="right"))])


def draw_sample(recipe: Recipe, stage: Stage, task: str, index: int) -> Sample:
    """The first of `candidates`; ModelError where there is none."""
    for sample in candidates(recipe, stage, task, index):
        return sample
    raise ModelError(
        f"no sample of task {task} passes the stage's filter.", "Loosen [stages.filter]."
    )


def candidates(recipe: Recipe, stage: Stage, task: str, index: int) -> Iterator[Sample]:
    """The world's sample `index` of a task, then its replacements: those of very many that the
    stage's filter admits. They are of one of the stage's categories if it names some, and composed
    if it says so."""
    own = {name: w for name, w in stage.categories.items() if w and tasks.task_of(name) == task}
    for number in range(index, index + MAX_DRAWS * REDRAW, REDRAW):
        category = None
        if own:
            category = weighted(own, generator(recipe.seed, Stream.CATEGORY, number))
        sample = tasks.sample(task, recipe.seed, number, category=category)
        if stage.filter.admits(sample.prompt):
            yield composed(sample) if stage.composed else sample


def noise_levels(
    recipe: Recipe, batch_size: int, step: int, num_tokens: int | Sequence[int]
) -> Float[Tensor, " b"]:
    """sigma = 1 - t of a step's samples, whose pictures have `num_tokens` (each, or all alike).

    t = F^-1((i + U) / B) is stratified over the B samples, F being the objective's distribution;
    then shifted (see `Objective`). The samples are independent of their place i in the batch, so
    the strata need no shuffling.
    """
    objective = recipe.at(step).objective
    draws = generator(recipe.seed, Stream.LEVEL, step).random(batch_size)
    t = np.clip((np.arange(batch_size) + draws) / batch_size, 1e-6, 1 - 1e-6)
    if objective.timesteps == "logit-normal":
        normal = np.array([NormalDist().inv_cdf(quantile) for quantile in t])
        t = 1 / (1 + np.exp(-(objective.t_mean + objective.t_std * normal)))
    lengths = [num_tokens] * batch_size if isinstance(num_tokens, int) else num_tokens
    shifted = [
        shift_sigma(1 - float(level), objective.shift_of(length))
        for level, length in zip(t, lengths, strict=True)
    ]
    return torch.tensor(shifted, dtype=torch.float32)


def draw_noise(
    seed: int, index: int, shape: tuple[int, ...], stream: Stream = Stream.NOISE
) -> Float[Tensor, "*shape"]:
    """Standard normal noise of the run's sample `index`."""
    draws = generator(seed, stream, index).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(draws)


def draw_place(seed: int, index: int) -> Float[Tensor, " 2"]:
    """Where in the picture of the run's sample `index` a crop lies: down and right, in 0 … 1."""
    return torch.from_numpy(generator(seed, Stream.CROP, index).random(2).astype(np.float32))
