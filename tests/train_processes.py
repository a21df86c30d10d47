"""One of several processes that train one tiny O1 in many ways: python -m tests.train_processes
RANK SIZE STORE FOLDER. The first process writes every step's losses to FOLDER/found-SIZE.json."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hidream.models.o1.config import O1_TINY, SIZES
from hidream.models.o1.tokens import Tokenizer, encode
from hidream.train import checkpoint
from hidream.train.config import Recipe, parse_recipe
from hidream.train.distributed import World, join, leave
from hidream.train.layout import Layout
from hidream.train.learner import learner_of
from hidream.train.loop import Trainee, make_parts
from hidream.train.optim import learning_rate
from hidream.train.parallel import Processes, checked_layout
from hidream.train.sequence_parallel import split_sequence
from hidream.train.tensor_parallel import split_matrices
from hidream.world import sprites
from tests import tiny

NUM_STEPS = 20
HALF = 10
NUM_BATCHES = 5  # which come again: to make one takes longer than a step
SIZES["o1-least"] = replace(
    O1_TINY,
    text=replace(O1_TINY.text, num_layers=2),
    vision=replace(O1_TINY.vision, num_layers=1, deepstack_layers=(0,)),
)
STAGE = {
    "size": 32,
    "steps": NUM_STEPS,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup": 5,
    "tasks": {"text_to_image": 0.4, "edit": 0.3, "language": 0.1, "understanding": 0.2},
}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ddp": {},
        "tp": {"tp": 2},
        "fsdp, selective": {"shard": 0, "activation_checkpointing": "selective"},
        "sp, full": {"sp": 2, "activation_checkpointing": "full"},
    },
    4: {
        "fsdp × tp": {"shard": 2, "tp": 2, "activation_checkpointing": "selective"},
        "hsdp": {"replicate": 2, "shard": 2},
        "fsdp × sp": {"shard": 2, "sp": 2},
        "sp × tp": {"sp": 2, "tp": 2, "activation_checkpointing": "full"},
        "ddp × tp": {"tp": 2},
        "sp 4": {"sp": 4},
    },
}


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    """A run in `folder`, whose tokenizer lies beside it."""
    plain: dict[str, Any] = {
        "name": "tiny",
        "model": "o1-least",
        "tokenizer": str(folder.parent / "tokenizer"),
        "out": str(folder),
        "precision": "float32",
        "checkpoint_every": 0,
        "grid_every": 0,
        "log_every": 1,
        "seed": 11,
        "stages": [STAGE],
    }
    return parse_recipe(plain | changes)


def trainee_of(recipe: Recipe, world: World) -> Trainee:
    learner = learner_of(recipe, world)
    processes = Processes(checked_layout(recipe, world), world)
    if processes.sharded and not world.main:
        learner.build = None  # type: ignore[method-assign, assignment]  # the first process does
    return Trainee(learner, processes)


def steps(trainee: Trainee, first: int, last: int) -> list[dict[str, float]]:
    """Train from step `first` to `last`; every step's loss over all samples, and the norm."""
    recipe, world, layout = trainee.recipe, trainee.world, trainee.processes.layout
    found = []
    for step in range(first, last):
        values = trainee.backward(
            parts_of(trainee, layout.reader(world.rank), layout.num_readers, step % NUM_BATCHES)
        )
        trainee.update(step, learning_rate(recipe.stages, step))
        names = ("loss", "grad_norm")
        totals = world.sum([float(values[name]) for name in names])
        found.append({name: t / world.size for name, t in zip(names, totals, strict=True)})
    return found


PARTS: dict[tuple[Any, ...], Any] = {}


def parts_of(trainee: Trainee, reader: int, num_readers: int, step: int) -> Any:
    """The parts of a step, made once."""
    recipe = trainee.recipe
    key = (recipe.model, recipe.accumulate, reader, num_readers, step)
    if key not in PARTS:
        PARTS[key] = make_parts(trainee.learner, reader, num_readers, step)
    return PARTS[key]


def resharded(folder: Path, world: World) -> dict[str, list[dict[str, float]]]:
    """Half a sharded run, saved in shards while it goes on, and whole; then its other half by what
    was saved: sharded again in two ways."""
    recipe = recipe_of(folder / "fsdp", parallel={"shard": 0})
    trainee = trainee_of(recipe, world)
    progress = trainee.begin(False)
    first = steps(trainee, 0, HALF)
    trainee.save(HALF)
    whole = checkpoint.contents(trainee.model, trainee.ema, trainee.optimizers)
    second = steps(trainee, HALF, NUM_STEPS)
    trainee.saver.wait()
    if world.main:
        progress = replace(progress, step=HALF, samples=recipe.first_sample(HALF))
        checkpoint.write(folder / "whole", progress, whole, keep=1)
    world.barrier()
    found = {"fsdp": first + second}
    for name, source, parallel in (
        ("fsdp of whole", "whole", {"shard": 0}),
        ("tp of shards", "fsdp", {"tp": 2}),
    ):
        start = str(checkpoint.folder_of(folder / source, HALF))
        other = trainee_of(recipe_of(folder / name, parallel=parallel, start=start), world)
        other.begin(False)
        found[name] = steps(other, HALF, NUM_STEPS)
    return found


def kept(folder: Path, world: World) -> dict[str, int]:
    """How many tensors differ once weights in shards of shards were written and read again."""
    parallel = {"shard": 2, "tp": 2}
    recipe = recipe_of(folder / "kept in shards", parallel=parallel)
    trainee = trainee_of(recipe, world)
    progress = trainee.begin(False)
    steps(trainee, 0, 2)
    trainee.save(2)
    before = checkpoint.contents(trainee.model, trainee.ema, trainee.optimizers)
    trainee.saver.wait()
    if world.main:
        progress = replace(progress, step=2, samples=recipe.first_sample(2))
        checkpoint.write(folder / "kept whole", progress, before, keep=1)
    world.barrier()
    different = {}
    for name in ("kept in shards", "kept whole"):
        start = str(checkpoint.folder_of(folder / name, 2))
        other = trainee_of(recipe_of(folder / "kept", parallel=parallel, start=start), world)
        other.begin(False)
        after = checkpoint.contents(other.model, other.ema, other.optimizers)
        different[name] = sum(
            not torch.equal(tensor, after[file][key])
            for file, tensors in before.items()
            for key, tensor in tensors.items()
        )
    return different


def i1_recipe(folder: Path, name: str, **changes: Any) -> Recipe:
    """Steps of the I1 beside `folder`; how its experts are balanced depends on who has which."""
    stage = STAGE | {"size": 64, "tasks": {"text_to_image": 1.0}}
    more = {"model": "i1-tiny", "init": str(folder / "i1"), "stages": [stage], "vae": {}}
    return recipe_of(folder / name, objective={"balance_weight": 0.0}, **more, **changes)


def others(folder: Path, world: World) -> dict[str, Any]:
    """Steps of an I1 whose weights are in shards, and of an O1 that gathers them in bf16."""
    fsdp = {"shard": 0}
    of_i1 = trainee_of(i1_recipe(folder, "i1, fsdp", parallel=fsdp), world)
    recipe = recipe_of(folder / "bf16", parallel=fsdp, precision="bfloat16")
    in_half, gathered = trainee_of(recipe, world), []
    in_half.model.model.language_model.layers[0].register_forward_pre_hook(
        lambda block, _: gathered.append(str(block.mlp.up_proj.weight.dtype))
    )
    for trainee in (of_i1, in_half):
        trainee.begin(False)
    return {
        "i1, fsdp": steps(of_i1, 0, 2),
        "fsdp, bf16": steps(in_half, 0, 4),
        "gathered": gathered,
    }


def drawn(folder: Path, world: World) -> dict[str, float]:
    """How far one denoising step of two requests, by a model in parts, is from the whole model's;
    two heads read each key. Tensor parallel keeps half of a prefix's keys in each process."""
    tokenizer, sigma = Tokenizer(folder / "tokenizer"), torch.tensor(0.7)
    requests = [
        encode(tokenizer, O1_TINY, prompt, width=64, height=48, references=tiny.pictures(1))
        for prompt in ("a red cube", "three blue spheres left of it")
    ]
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, requests[0].num_target, O1_TINY.patch_dim, generator=generator)
    whole = tiny.random_o1()
    expected = whole.velocity(x_t, sigma, whole.prefill(requests))
    tensor, sequence = (Processes(layout, world) for layout in (Layout(tp=2), Layout(sp=2)))
    errors = {}
    for name in ("tp", "sp"):
        model = tiny.random_o1()
        decoder = model.model.language_model
        if name == "tp":
            split_matrices(decoder, tensor.mesh["tp"])
        else:
            assert sequence.sharing_tokens.group is not None
            split_sequence(decoder, sequence.sharing_tokens.group)
        prefix = model.prefill(requests)
        assert prefix.keys[0][0].shape[1] == O1_TINY.text.num_kv_heads // 2
        found = model.velocity(x_t, sigma, prefix)
        errors[name] = float((found - expected).abs().max() / expected.abs().max())
    return errors


def draw_coarsely(size: int = 64) -> None:
    """The world's objects from masters of 64 pixels instead of 512, which take seconds."""
    sprites.M = size
    for drawn in vars(sprites).values():
        if hasattr(drawn, "cache_clear"):
            drawn.cache_clear()


def main(rank: int, size: int, store: str, folder: Path) -> None:
    torch.set_num_threads(1)
    draw_coarsely()
    world = join(rank, size, store)
    found: dict[str, Any] = {}
    for name, parallel in CASES[size].items():
        trainee = trainee_of(recipe_of(folder / name, parallel=parallel), world)
        trainee.begin(False)
        found[name] = steps(trainee, 0, NUM_STEPS)
    if size == 2:
        found |= resharded(folder, world)
        found |= others(folder, world)
        found["drawn"] = drawn(folder, world)
    else:
        found["kept"] = kept(folder, world)
    if world.main:
        (folder / f"found-{size}.json").write_text(json.dumps(found))
    leave(world)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
