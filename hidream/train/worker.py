"""One process of a training run; `hidream.train.launch` starts it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from hidream.errors import HidreamError
from hidream.train.config import parse_recipe
from hidream.train.distributed import join, leave
from hidream.train.launch import INTERRUPTED
from hidream.train.log import readable
from hidream.train.loop import train
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

    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: signals.append(received))
    parent = os.getppid()

    def stop_requested() -> bool:
        return bool(signals) or os.getppid() != parent  # nobody would wait for an orphan

    try:
        recipe = parse_recipe(json.loads(arguments.recipe.read_text()))
        if recipe.device == "cpu":
            torch.set_num_threads(1)
        world = join(arguments.rank, recipe.processes, arguments.store)
        kind = recipe.report_to if world.main else "none"
        with tracker(kind, recipe.run_dir, recipe.name, recipe.to_dict()) as track:

            def say(record: dict[str, Any]) -> None:
                sys.stderr.write(readable(record) + "\n")
                sys.stderr.flush()
                track(record)

            finished = train(
                recipe, world, resume=arguments.resume, stop_requested=stop_requested, on_log=say
            )
        leave(world)
    except HidreamError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0 if finished else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
