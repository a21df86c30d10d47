"""FSDP2: weights, averages and optimizer states in shards, one a process, whole only where needed.

Checkpoints hold whole tensors, so that a run goes on with any number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hidream.train.distributed import World


def shard(model: nn.Module, blocks: Sequence[nn.Module], world: World) -> None:
    """Keep a share of every parameter in each process; `blocks` are gathered one by one."""
    mesh = init_device_mesh(world.device.partition(":")[0], (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """This process's share, which is all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor from its shares; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, sharded as `model` is if it is; every process must call it."""
    tensor = tensor.to(model.device)
    if isinstance(model, DTensor) and tensor.shape == model.shape:
        return distribute_tensor(tensor, model.device_mesh, model.placements)
    return tensor
