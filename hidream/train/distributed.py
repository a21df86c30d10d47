"""Several processes joined by one all-reduce a step: our own, torchrun's or accelerate's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hidream.errors import HidreamError, InputError, UsageError
from hidream.train.sharding import local


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place: `rank` of `size`, on `device`. Size 1 needs no process group.

    `group`: who these processes are; without one, all that there are.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def start_sums(self, *values: float) -> "PendingSums":
        """Begin to sum each value over all processes; `.wait()` gives the results."""
        tensor = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(tensor, group=self.group, async_op=True) if self.size > 1 else None
        return PendingSums(tensor, work, self.size)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its mean over the processes: one flat fp32 all-reduce.

        A parameter without a gradient keeps none: all processes must agree on which those are. Of
        a sharded one, each has its own shard's.
        """
        self._reduce_gradients(parameters, self.size)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """The same with the sum instead of the mean."""
        self._reduce_gradients(parameters, 1)

    @torch.no_grad()
    def _reduce_gradients(self, parameters: Sequence[Tensor], divisor: int) -> None:
        if self.size == 1:
            return
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat, group=self.group)
        flat /= divisor
        pieces = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(
            gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)]
        )

    def sum_in_place(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier(group=self.group)


@dataclass(frozen=True)
class PendingSums:
    """Sums over the processes that are under way."""

    tensor: Tensor
    work: dist.Work | None
    num_processes: int = 1

    def wait(self) -> list[float]:
        """The finished sums."""
        if self.work is not None:
            self.work.wait()
        return self.tensor.tolist()


def join(rank: int, size: int, store: str) -> World:
    """Join the group of `size` processes that meet in the file `store` (a path that is fresh)."""
    if size > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on this machine
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(minutes=30),
        )
    return World(rank=rank, size=size)


def leave(world: World) -> None:
    """End this process's part in the group."""
    if world.size > 1:
        dist.destroy_process_group()


def first_alone(world: World, work: Callable[[], None]) -> None:
    """Let the first process do some work, for up to a week, while all others wait.

    Its HidreamError is raised there; in the others an InputError that says so.
    """
    group, failure = world.group, None
    if world.size > 1:
        group = dist.new_group(timeout=timedelta(days=7), backend="gloo")
    if world.main:
        try:
            work()
        except HidreamError as error:
            failure = error
    failed = replace(world, group=group).sum([float(failure is not None)])[0]
    if failure is not None:
        raise failure
    if failed:
        raise InputError("the first process found something wrong.", "It says what, above.")


@contextmanager
def launched(device: str = "cpu") -> Iterator[World]:
    """The group that `torchrun` or `accelerate launch` started this process for; alone without one.

    Both say who is who in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
    With "cuda" each process takes the GPU of its local rank. Raises UsageError for an environment
    that is not whole.
    """
    try:
        rank, size, local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size}")
        if size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise ValueError("no MASTER_ADDR and MASTER_PORT")
    except ValueError as error:
        raise UsageError(
            f"the environment names no place in a group of processes ({error}).",
            "Start with torchrun or accelerate launch, or unset RANK and WORLD_SIZE.",
        ) from error
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if size > 1:
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"  # counts are summed on CPUs
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(minutes=30))
    try:
        yield World(rank=rank, size=size, device=device)
    finally:
        if size > 1:
            dist.destroy_process_group()
