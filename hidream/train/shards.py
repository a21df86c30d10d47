"""Checkpoints in shards: every process writes its part, any number of processes read them again.

torch's distributed checkpoints with their safetensors storage: one file a process, whose header
says where in the whole tensors its parts lie. No process ever holds all of a model.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from hidream.train.distributed import World

PATTERN = "shard-*.safetensors"


def copied(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """This process's part of the tensors in memory that training does not change."""
    return {f"{prefix}/{name}": _copy(tensor.detach()) for name, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


def write(folder: Path, tensors: dict[str, Tensor], world: World) -> dict[str, str]:
    """Write the parts of every process of `world` into `folder`, which is there.

    All must call it. Returns the files' SHA-256, of all of them. Raises OSError in each where one
    of them fails.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _alone():
            dcp.save(
                tensors,
                storage_writer=writer,
                process_group=world.group,
                no_dist=world.size == 1,
            )
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise OSError(str(first)) from error
    own = sorted(folder.glob(PATTERN.replace("*", f"{world.rank + 1:05d}-*")))
    digests = {file.name: digest(file) for file in own}
    if world.size == 1:
        return digests
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, digests, group=world.group)
    return {name: value for one in found for name, value in one.items()}


def shapes(folder: Path) -> dict[str, torch.Size]:
    """The whole tensors in a folder, by name; OSError or SafetensorError for one that is broken."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {name: tensor.size for name, tensor in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]


def read(folder: Path, targets: dict[str, Tensor]) -> None:
    """Fill tensors that are whole or in any shards; every process must call it.

    Raises OSError or SafetensorError for files that are broken.
    """
    try:
        reader = HuggingFaceStorageReader(str(folder))
        with _alone():
            dcp.load(targets, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise SafetensorError(str(first)) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def below(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Those whose names begin with `prefix/`, without it."""
    start = f"{prefix}/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
