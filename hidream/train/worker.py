"""One process of a training run: `hidream.train.launch` starts it, or torchrun."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hidream.errors import HidreamError
from hidream.train.config import Recipe, load_recipe, parse_recipe
from hidream.train.distributed import World, first_alone, join, launched, leave
from hidream.train.launch import INTERRUPTED, check, refuse_second_run, write_recipe
from hidream.train.log import readable
from hidream.train.loop import train
from hidream.train.parallel import checked_layout
from hidream.train.track import tracker


def main() -> int:
    """Train this process's part; exit code 0 done, 130 stopped, that of the error otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--store", default="")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)

    try:
        recipe = parse_recipe(json.loads(arguments.recipe.read_text()))
        world = join(arguments.rank, recipe.processes, arguments.store)
        finished = take_part(recipe, world, arguments.resume)
        leave(world)
    except HidreamError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0 if finished else INTERRUPTED


def run_launched(
    recipe_path: str | Path, overrides: Sequence[str] = (), resume: bool = False
) -> int:
    """This process's part of a run that torchrun or `accelerate launch` started; see `launch.run`.

    The recipe's `processes` are those that were started, here and on other machines, which see one
    file system.
    """
    with launched(load_recipe(recipe_path, [*overrides, "processes=1"]).device) as world:
        own = [f"processes={world.size}", f"device={world.device}"]
        recipe = load_recipe(recipe_path, [*overrides, *own])
        checked_layout(recipe, world)
        refuse_second_run(recipe, resume)
        first_alone(world, lambda: check(recipe))
        world.barrier()  # before one of them makes the folder
        if world.main:
            write_recipe(recipe)
        return 0 if take_part(recipe, world, resume) else INTERRUPTED


def take_part(recipe: Recipe, world: World, resume: bool) -> bool:
    """Train as one process of `world`, whose others do, too; False when a signal stopped it."""
    signals: list[int] = []
    before = {
        number: signal.signal(number, lambda received, _frame: signals.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    parent = os.getppid()

    def stop_requested() -> bool:
        return bool(signals) or os.getppid() != parent  # nobody would wait for an orphan

    if recipe.device == "cpu":
        torch.set_num_threads(1)
    kind = recipe.report_to if world.main else "none"
    try:
        with tracker(kind, recipe.run_dir, recipe.name, recipe.to_dict()) as track:

            def say(record: dict[str, Any]) -> None:
                sys.stderr.write(readable(record) + "\n")
                sys.stderr.flush()
                track(record)

            return train(recipe, world, resume=resume, stop_requested=stop_requested, on_log=say)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
