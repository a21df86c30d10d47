"""The procedural world: scenes drawn from (seed, index), with pictures, prompts and the truth."""

from hidream.world.render import render
from hidream.world.scene import WORLD_VERSION, Object, Scene, Subject
from hidream.world.tasks import CATEGORIES, EVAL_SEEDS, TASKS, TRAIN_SEEDS, Sample, sample

__all__ = [
    "CATEGORIES",
    "EVAL_SEEDS",
    "TASKS",
    "TRAIN_SEEDS",
    "WORLD_VERSION",
    "Object",
    "Sample",
    "Scene",
    "Subject",
    "render",
    "sample",
]
