"""What the commands that need a model share: its flags checked, its pipeline loaded."""

from __future__ import annotations

import argparse
import ctypes
import platform
from typing import TYPE_CHECKING

from hidream.cli import console
from hidream.locating import check_parts, locate
from hidream.memory import find_policy

if TYPE_CHECKING:
    from hidream.pipelines import Pipeline

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def check_memory(arguments: argparse.Namespace) -> None:
    """UsageError for a memory policy that is unknown, or that lacks its package here."""
    arguments.memory = find_policy(arguments.memory).name


def load_pipeline(
    arguments: argparse.Namespace,
    model: str,
    name: str | None = None,
    *,
    text_encoders: bool = True,
) -> Pipeline:
    """The pipeline of `model`, which the message calls `name`, as `add_model`'s flags say."""
    from hidream.pipelines import load

    spec = locate(model, variant=arguments.variant, components=arguments.components)[0]
    check_parts(spec, llama=arguments.llama, refiner=arguments.refiner)
    console.say(f"loading {name or model}")
    keep_freed_memory()
    return load(
        model,
        device=arguments.device,
        dtype=None if arguments.dtype == "auto" else arguments.dtype,
        memory=arguments.memory,
        variant=arguments.variant,
        llama=arguments.llama,
        refiner=arguments.refiner,
        components=arguments.components,
        text_encoders=text_encoders,
    )


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, up to 256 MiB, in blocks up to 32 MiB.

    By itself it may give them back each time, and the next step waits for the system to clear
    every page again: on a CPU our step then takes up to 1.5 times as long.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)
