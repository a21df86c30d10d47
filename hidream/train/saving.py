"""Saving while training goes on: values are copied at once, and a thread writes the copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from hidream.errors import InputError
from hidream.train import checkpoint
from hidream.train.checkpoint import Progress
from hidream.train.distributed import World


class Saver:
    """Writes a run's checkpoints, one at a time. Every process has one, made at the same time.

    `sharded`: every process calls `save`, with its part of the weights. `in_shards`: each writes
    its own; else the first writes everything, and is the only one to call `save` if not `sharded`.
    `ahead`: train on while it is written.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        *,
        keep: int,
        sharded: bool = False,
        in_shards: bool = False,
        ahead: bool = True,
    ):
        self.run_dir, self.keep, self.ahead = run_dir, keep, ahead
        self.sharded, self.in_shards = sharded, sharded and in_shards
        group = None  # of its own, so that it meets no one of the training's
        if self.in_shards and world.size > 1:
            group = dist.new_group(backend="gloo")
        self.world = World(rank=world.rank, size=world.size, group=group)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hidream-save")
        self._pending: tuple[int, Future[object]] | None = None

    def save(
        self,
        progress: Progress,
        model: nn.Module,
        ema: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        """Begin a checkpoint, once the one before is there; InputError where that failed."""
        self.wait()
        write: Callable[[], object]
        keep = self.keep
        if self.in_shards:
            parts = checkpoint.parts(model, ema, optimizers)
            write = partial(
                checkpoint.write_shards, self.run_dir, progress, parts, self.world, keep=keep
            )
        else:
            contents = checkpoint.contents(model, ema, optimizers)
            if not self.world.main:
                return
            write = partial(checkpoint.write, self.run_dir, progress, contents, keep=keep)
        self._pending = (progress.step, self._thread.submit(write))
        if not self.ahead:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint that was begun is there; InputError where it cannot be written."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the checkpoint of step {step} cannot be written into {self.run_dir}: "
                f"{getattr(error, 'strerror', None) or error}.",
                "Make room, and resume from the one before.",
            ) from error
