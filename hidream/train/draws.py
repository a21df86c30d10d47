"""What a run draws, by counter: there is no state to save, and no order to keep."""

from __future__ import annotations

from enum import IntEnum
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hidream.train.config import Recipe, Stage
from hidream.world import tasks
from hidream.world.tasks import Sample


class Stream(IntEnum):
    """What a random number is for; each stream is independent of the others."""

    TASK = 0
    LEVEL = 1
    DROPOUT = 2
    NOISE = 3
    CATEGORY = 4
    PIXELS = 5
    ORDER = 6


def generator(seed: int, stream: Stream, index: int) -> np.random.Generator:
    """Counter-based random numbers for one purpose and one index: there is no state to save."""
    return np.random.Generator(np.random.Philox(key=[(seed << 8) | stream, index]))


def task_of(recipe: Recipe, step: int) -> str:
    """The task of all samples of a step, drawn by the stage's weights."""
    number, _ = recipe.locate(step)
    return weighted(recipe.stages[number].tasks, generator(recipe.seed, Stream.TASK, step))


def weighted(weights: dict[str, float], dice: np.random.Generator) -> str:
    """A key, drawn by its weight; the order of the keys does not matter."""
    names, values = zip(*sorted(weights.items()), strict=True)
    shares = np.cumsum(values) / sum(values)
    return str(names[int(np.searchsorted(shares, dice.random(), side="right"))])


def draw_sample(recipe: Recipe, stage: Stage, task: str, index: int) -> Sample:
    """The world's sample `index` of a task, of one of the stage's categories if it names some."""
    category = None
    own = {name: w for name, w in stage.categories.items() if w and tasks.task_of(name) == task}
    if own:
        category = weighted(own, generator(recipe.seed, Stream.CATEGORY, index))
    return tasks.sample(task, recipe.seed, index, category=category)


def noise_levels(recipe: Recipe, batch_size: int, step: int) -> Float[Tensor, " b"]:
    """sigma = 1 - t of a step's samples; t = sigmoid(mean + std n), n stratified: Phi^-1((i+U)/B).

    The samples are independent of their place i in the batch, so the strata need no shuffling.
    """
    draws = generator(recipe.seed, Stream.LEVEL, step).random(batch_size)
    quantiles = np.clip((np.arange(batch_size) + draws) / batch_size, 1e-6, 1 - 1e-6)
    normal = np.array([NormalDist().inv_cdf(q) for q in quantiles])
    t = 1 / (1 + np.exp(-(recipe.objective.t_mean + recipe.objective.t_std * normal)))
    return torch.from_numpy((1 - t).astype(np.float32))


def draw_noise(
    seed: int, index: int, shape: tuple[int, ...], stream: Stream = Stream.NOISE
) -> Float[Tensor, "*shape"]:
    """Standard normal noise of the run's sample `index`."""
    draws = generator(seed, stream, index).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(draws)
