"""What evaluate and stats have in common: the network that looks at pictures, and their files."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.cli.arguments import DEVICES
from hidream.errors import InputError, MemoryExceeded, ModelError, UsageError
from hidream.registry import nearest

if TYPE_CHECKING:
    from hidream.eval.picture_set import Measured, PictureSet
    from hidream.folder import Folder

STAND_IN = "stand-in"


def add_network(parser: argparse.ArgumentParser, *, beside: str) -> None:
    """--inception, --device, --batch-size."""
    parser.add_argument(
        "--inception",
        metavar="FILE",
        help=f"Inception's weights as safetensors (default: those beside {beside}), or "
        f"{STAND_IN}: a random network, for tests",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help=", ".join(DEVICES))
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="(default 64)")


def check_network(arguments: argparse.Namespace) -> None:
    """UsageError for a batch size or device that cannot be."""
    if not 1 <= arguments.batch_size <= 4096:
        raise UsageError(f"--batch-size {arguments.batch_size} is out of range: 1 … 4096.")
    device = arguments.device
    if device.split(":")[0] not in DEVICES:
        raise UsageError(f'--device: unknown device "{device}"; {nearest(device, DEVICES)}')


@dataclass(frozen=True)
class Chosen:
    """The network that was asked for, not loaded yet: Inception's checked headers, or None for
    the stand-in."""

    folder: Folder | None

    @property
    def is_stand_in(self) -> bool:
        return self.folder is None

    @property
    def name(self) -> str:
        from hidream.eval import inception, stand_in

        return stand_in.StandIn.name if self.folder is None else inception.NAME

    @property
    def num_features(self) -> int:
        from hidream.eval import inception, stand_in

        return stand_in.StandIn.num_features if self.folder is None else inception.NUM_FEATURES

    def identity(self) -> dict[str, str]:
        """The weights' file and SHA-256."""
        if self.folder is None:
            from hidream.eval.stand_in import StandIn

            return {"file": STAND_IN, "sha256": StandIn().digest()}
        return {"file": str(self.folder.path), "sha256": sha256(self.folder.path)}


def choose(given: str | None, *, beside: Path) -> Chosen:
    """The network of `--inception`; without it Inception's weights in the folder of `beside`.

    Raises ModelError: there are none, or they are not Inception's; the message says how to get
    them.
    """
    from hidream.eval.inception import CONVERTED, HOW_TO_GET, open_inception

    if given == STAND_IN:
        return Chosen(None)
    if given is not None:
        return Chosen(open_inception(given))
    place = beside.parent / CONVERTED
    if not place.is_file():
        raise ModelError(f"there are no Inception weights: no --inception, no {place}.", HOW_TO_GET)
    return Chosen(open_inception(place))


def look_at(
    pictures: PictureSet, chosen: Chosen, arguments: argparse.Namespace, *, with_score: bool
) -> Measured:
    """Load the network and show it every picture, with progress on stderr."""
    import torch

    from hidream.eval.inception import load_inception
    from hidream.eval.picture_set import Network, measure
    from hidream.eval.stand_in import StandIn
    from hidream.pipelines.devices import find_device

    device = find_device(arguments.device)
    if chosen.is_stand_in:
        console.warn("the stand-in is a random network: its distance is no FID.")
    console.say(f"looking at {len(pictures)} pictures with {chosen.name} on {device}")
    progress = console.Progress(1)
    try:
        network: Network = (
            StandIn().to(device)
            if chosen.folder is None
            else load_inception(chosen.folder, device=device)
        )
        return measure(
            pictures,
            network,
            device=device,
            batch_size=arguments.batch_size,
            with_score=with_score,
            on_batch=progress.step,
        )
    except torch.OutOfMemoryError as error:
        raise MemoryExceeded(
            f"{arguments.batch_size} pictures at a time do not fit the memory of {device}.",
            "Lower --batch-size.",
        ) from error
    finally:
        progress.close()


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Find out before the work whether `path` can be written; makes missing folders.

    Raises InputError: a folder, existing without `overwrite`, or in a place that takes no files.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder.", "Name a file in it.")
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists already.", "Choose another name, or say --overwrite.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "the folder may not be written")
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {path}: {reason}.", "Choose another place.") from error


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write `result` whole or not at all. InputError where it cannot be written."""
    temporary = path.with_name(f".hidream-{secrets.token_hex(8)}.tmp")
    try:
        text = json.dumps(result, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
