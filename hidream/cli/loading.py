"""What the commands that need a model share: its flags checked, its pipeline loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hidream.cli import console
from hidream.memory import find_policy

if TYPE_CHECKING:
    from hidream.pipelines import Pipeline


def check_memory(arguments: argparse.Namespace) -> None:
    """UsageError for a memory policy that is unknown, or that lacks its package here."""
    arguments.memory = find_policy(arguments.memory).name


def load_pipeline(arguments: argparse.Namespace, model: str, name: str | None = None) -> Pipeline:
    """The pipeline of `model`, which the message calls `name`, as `add_model`'s flags say."""
    from hidream.pipelines import load

    console.say(f"loading {name or model}")
    return load(
        model,
        device=arguments.device,
        dtype=None if arguments.dtype == "auto" else arguments.dtype,
        memory=arguments.memory,
        variant=arguments.variant,
    )
