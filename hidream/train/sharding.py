"""FSDP2: weights, averages and optimizer states in shards, one a process, whole only where needed.

A checkpoint's tensors are whole, or in shards that make them whole: a run goes on with any number
of processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def shard(
    model: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Keep a share of every parameter in each process; `units` are gathered one by one.

    A mesh of two dimensions shards over the second, and averages over the first. Shares are fp32,
    and so are gradients while they are added up; what is gathered is `dtype`.
    """
    # That a result must not be changed in place: none is.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@torch.no_grad()
def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a model in shards the first process's whole values, tensor by tensor; every process must
    call it, the others with none."""
    for name, own in model.state_dict().items():
        if name in values:
            value = values[name].to(own.device).contiguous()
        else:
            value = torch.empty(own.shape, dtype=own.dtype, device=own.device)
        dist.broadcast(value, 0)
        if isinstance(own, DTensor):
            value = distribute_tensor(
                value, own.device_mesh, own.placements, src_data_rank=None
            )  # each takes its share of what it has
        own.copy_(value)


def local(tensor: Tensor) -> Tensor:
    """This process's share, which is all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor from its shares; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The tensors from their shares, on the CPU, if this process is to `keep` them; every process
    must call it."""
    found = {}
    for name, tensor in tensors.items():
        values = whole(tensor)
        if keep:
            found[name] = values.cpu()
    return found


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, sharded as `model` is if it is; every process must call it."""
    tensor = tensor.to(model.device)
    if isinstance(tensor, DTensor):
        return tensor
    if isinstance(model, DTensor) and tensor.shape == model.shape:
        return distribute_tensor(tensor, model.device_mesh, model.placements)
    return tensor


def num_copies(tensor: Tensor, num_processes: int) -> int:
    """In how many of the processes the same values of the tensor lie."""
    num_parts = 1
    if isinstance(tensor, DTensor):
        for placement, size in zip(tensor.placements, tensor.device_mesh.shape, strict=True):
            num_parts *= 1 if isinstance(placement, Replicate) else size
    return num_processes // num_parts


def by_mesh(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in groups that a fused kernel takes: those of one mesh together."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return list(groups.values())
