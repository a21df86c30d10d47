"""One of several processes that train the same tiny O1 in many ways: `python -m` this, RANK, SIZE,
STORE and FOLDER. `CASES` of each SIZE are run in turn; the first process writes what came out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from hidream.train.config import Recipe, parse_recipe
from hidream.train.distributed import World, join, leave
from hidream.train.learner import learner_of
from hidream.train.loop import Trainee
from hidream.train.optim import learning_rate
from hidream.train.parallel import Processes, checked_layout

NUM_STEPS = 20
STAGE = {
    "size": 32,
    "steps": NUM_STEPS,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup": 5,
    "tasks": {"text_to_image": 0.5, "edit": 0.5},
}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ddp": {},
        "fsdp": {"shard": 0},
        "tp": {"tp": 2},
        "sp": {"sp": 2},
        "fsdp, selective": {"shard": 0, "activation_checkpointing": "selective"},
        "tp, selective": {"tp": 2, "activation_checkpointing": "selective"},
        "sp, full": {"sp": 2, "activation_checkpointing": "full"},
    },
    4: {
        "fsdp × tp": {"shard": 2, "tp": 2},
        "hsdp": {"replicate": 2, "shard": 2},
        "fsdp × sp": {"shard": 2, "sp": 2},
        "sp × tp": {"sp": 2, "tp": 2},
        "ddp × tp": {"tp": 2},
        "sp 4": {"sp": 4},
    },
}


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    """A run in `folder`, whose tokenizer lies beside it."""
    plain: dict[str, Any] = {
        "name": "tiny",
        "model": "o1-tiny",
        "tokenizer": str(folder.parent / "tokenizer"),
        "out": str(folder),
        "precision": "float32",
        "checkpoint_every": 0,
        "grid_every": 0,
        "log_every": 1,
        "seed": 11,
        "buckets": {"text_to_image": [40], "edit": [40]},
        "stages": [STAGE],
    }
    return parse_recipe(plain | changes)


def trainee_of(recipe: Recipe, world: World) -> Trainee:
    layout = checked_layout(recipe, world)
    return Trainee(learner_of(recipe, world), Processes(layout, world))


def steps(trainee: Trainee, first: int, last: int) -> list[dict[str, float]]:
    """Train from step `first` to `last`; every step's losses over all samples, and the norm."""
    recipe, world, layout = trainee.recipe, trainee.world, trainee.processes.layout
    found = []
    for step in range(first, last):
        batch = batch_of(trainee, step, layout.reader(world.rank), layout.num_readers)
        values = trainee.backward(batch)
        trainee.update(step, learning_rate(recipe.stages, step))
        means = [total / world.size for total in world.sum([float(v) for v in values.values()])]
        found.append(dict(zip(values, means, strict=True)))
    return found


BATCHES: dict[tuple[int, int, int], Any] = {}


def batch_of(trainee: Trainee, *place: int) -> Any:
    """The batch of (step, reader, number of readers), made once: it takes longer than the step."""
    if place not in BATCHES:
        BATCHES[place] = trainee.learner.make_batch(*place)
    return BATCHES[place]


def main(rank: int, size: int, store: str, folder: Path) -> None:
    torch.set_num_threads(1)
    world = join(rank, size, store)
    found = {}
    for name, parallel in CASES[size].items():
        trainee = trainee_of(recipe_of(folder / name, parallel=parallel), world)
        trainee.begin(False)
        found[name] = steps(trainee, 0, NUM_STEPS)
    if world.main:
        (folder / f"losses-{size}.json").write_text(json.dumps(found))
    leave(world)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
