"""Weights that are on the device only while they are used, attached to a model from outside.

A module of the model is lent its weights for the time of its forward, by hooks; between uses it
holds tensors on the meta device, which can be named and measured but not computed with. The model's
own code does not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from hidream.memory import Policy
from hidream.models.loading import Reader

Tensors = Mapping[str, Tensor]
Streamed = Mapping[str, tuple[nn.Module, Sequence[str]]]  # blocks and names of parameters
_ALIGNED = 64  # values; where a kernel may read whole lines


def place(module: nn.Module, tensors: Tensors) -> None:
    """Put these tensors where the module's parameters of these names are."""
    for name, tensor in tensors.items():
        owner, _, own_name = name.rpartition(".")
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(module.get_submodule(owner), own_name, tensor)


def empty_out(
    module: nn.Module, dtype: torch.dtype, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Leave only names, shapes and dtype of a module's parameters; returns what it holds now.

    `names`: of these parameters, default all.
    """
    names = [name for name, _ in module.named_parameters()] if names is None else names
    shapes = {name: module.get_parameter(name).shape for name in names}
    place(module, {n: torch.empty(s, dtype=dtype, device="meta") for n, s in shapes.items()})
    return {name: module.get_parameter(name) for name in names}


def lend(module: nn.Module, name: str, read: Callable[[str], Tensor], dtype: torch.dtype) -> Lent:
    """A module, of this name in its checkpoint, whose weights `read` gives while it is used."""
    absent = empty_out(module, dtype)
    return Lent(module, absent, partial(read_all, name, tuple(absent), read))


def read_all(module: str, names: Sequence[str], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    return {name: read(f"{module}.{name}") for name in names}


class Lent:
    """A module whose weights are read when it is used, and dropped after its forward.

    `with lent:` keeps them for several uses. `absent` is what the module holds in between.
    """

    def __init__(self, module: nn.Module, absent: Tensors, read: Callable[[], Tensors]):
        self.module = module
        self.absent = absent
        self.read = read
        self.num_users = 0
        module.register_forward_pre_hook(lambda *_: self._take())
        module.register_forward_hook(lambda *_: self._give_back(), always_call=True)

    def __enter__(self) -> None:
        try:
            self._take()
        except BaseException:
            self._give_back()
            raise

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def _take(self) -> None:
        self.num_users += 1
        if self.num_users == 1:
            with torch.inference_mode(False):
                place(self.module, self.read())

    def _give_back(self) -> None:
        self.num_users -= 1
        if self.num_users == 0:
            place(self.module, self.absent)


def stream(
    block: nn.Module,
    absent: Tensors,
    fetch: Callable[[], Tensors],
    done: Callable[[], None] = lambda: None,
) -> None:
    """Let a block's weights be fetched before its every forward; `done` is called after it."""

    def before(*_: object) -> None:
        with torch.inference_mode(False):
            place(block, fetch())

    def after(*_: object) -> None:
        place(block, absent)
        done()

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after, always_call=True)


def look_up_on_cpu(table: nn.Embedding, device: torch.device, dtype: torch.dtype) -> None:
    """Let a table in CPU memory take ids from, and give rows to, `device`."""
    table.register_forward_pre_hook(lambda _, ids: (ids[0].cpu(),))
    table.register_forward_hook(lambda _, ids, rows: rows.to(device, dtype))


class Flat:
    """A block's weights in one tensor, in CPU memory, so that one copy brings them all.

    They lie in the order of `shapes`, each beginning at a whole `_ALIGNED` values.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype):
        self.places: dict[str, tuple[int, Sequence[int]]] = {}
        size = 0
        for name, shape in shapes.items():
            self.places[name] = (size, shape)
            size += num_aligned(shape)
        self.values = torch.empty(size, dtype=dtype)

    def fill(self, read: Callable[[str], Tensor]) -> Flat:
        """With the tensors of these names, and pinned."""
        self.values = self.values.pin_memory()
        for name, weight in self.of(self.values).items():
            weight.copy_(read(name))
        return self

    def of(self, values: Tensor) -> dict[str, Tensor]:
        """The weights, by name, in a copy of `values`."""
        return {
            name: values[start : start + math.prod(shape)].view(*shape)
            for name, (start, shape) in self.places.items()
        }


def num_aligned(shape: Sequence[int]) -> int:
    """The values that a tensor takes in a `Flat`."""
    return -(-math.prod(shape) // _ALIGNED) * _ALIGNED


class Ahead:
    """Blocks in pinned CPU memory, copied to a GPU one ahead of their turn.

    There are two buffers, each as large as the largest block: while a block is computed from one,
    the next is copied into the other on a stream of its own, as soon as the block computed from it
    before is finished. The turn goes round: after the last block comes the first.
    """

    def __init__(self, blocks: Sequence[Flat], device: torch.device):
        self.blocks = blocks
        largest = max((block.values for block in blocks), key=len)
        self.buffers = [
            torch.empty_like(largest, device=device) for _ in range(min(2, len(blocks)))
        ]
        self.side = torch.cuda.Stream(device)
        self.side.wait_stream(torch.cuda.current_stream(device))  # the buffers may be second-hand
        self.holds: list[int | None] = [None] * len(self.buffers)
        self.copied = [torch.cuda.Event() for _ in self.buffers]
        self.computed = [torch.cuda.Event() for _ in self.buffers]

    def fetch(self, turn: int) -> Tensors:
        """The weights of block `turn`, ready for the current stream; the next set off."""
        if turn not in self.holds:
            self._copy(turn, 0)
        slot = self.holds.index(turn)
        torch.cuda.current_stream(self.side.device).wait_event(self.copied[slot])
        following = (turn + 1) % len(self.blocks)
        if following not in self.holds:
            self._copy(following, 1 - slot)
        return self.blocks[turn].of(self.buffers[slot])

    def done(self, turn: int) -> None:
        """Block `turn` is computed with, as far as the current stream has been told."""
        if turn in self.holds:
            slot = self.holds.index(turn)
            self.computed[slot].record(torch.cuda.current_stream(self.side.device))

    def _copy(self, turn: int, slot: int) -> None:
        self.holds[slot] = turn
        self.side.wait_event(self.computed[slot])
        with torch.cuda.stream(self.side):
            values = self.blocks[turn].values
            self.buffers[slot][: len(values)].copy_(values, non_blocking=True)
            self.copied[slot].record(self.side)


def stream_all(blocks: Streamed, source: Reader, like: Tensor) -> None:
    """Let these parameters of blocks come in turn; the keys are the blocks' names in `source`.

    A GPU's come from pinned CPU memory, each while the one before it is computed; elsewhere they
    are read from the file each time.
    """
    if like.is_cuda and blocks:
        stream_ahead(blocks, source, like)
        return
    read = partial(source.read, device=like.device, dtype=like.dtype)
    for name, (block, parameters) in blocks.items():
        absent = empty_out(block, like.dtype, parameters)
        stream(block, absent, partial(read_all, name, parameters, read))


def stream_ahead(blocks: Streamed, source: Reader, like: Tensor) -> Ahead:
    """`stream_all` for a GPU."""
    waiting, absent = [], []
    for name, (block, parameters) in blocks.items():
        absent.append(empty_out(block, like.dtype, parameters))
        lying = Flat({key: weight.shape for key, weight in absent[-1].items()}, like.dtype)
        waiting.append(lying.fill(partial(_read_one, source, name)))
    ahead = Ahead(waiting, like.device)
    for turn, (block, _) in enumerate(blocks.values()):
        stream(block, absent[turn], partial(ahead.fetch, turn), partial(ahead.done, turn))
    return ahead


def _read_one(source: Reader, module: str, name: str) -> Tensor:
    return source.read(f"{module}.{name}")


def layer_by_layer(module: nn.Module, device: torch.device) -> nn.Module:
    """Let a module in CPU memory compute on `device`, where one of its layers is at a time.

    Layers are the elements of its outermost lists. Tables stay on the CPU, where rows are looked
    up; what is neither moves to the device.
    """
    lists = {n: part for n, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    outer = [part for n, part in lists.items() if not any(n.startswith(f"{o}.") for o in lists)]
    staying: set[int] = set()
    for layer in (layer for part in outer for layer in part):
        held = dict(layer.named_parameters())
        staying |= {id(weight) for weight in held.values()}
        stream(layer, held, partial(_moved, held, device))
    for part in module.modules():
        if isinstance(part, nn.Embedding) and id(part.weight) not in staying:
            look_up_on_cpu(part, device, part.weight.dtype)
    staying |= {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        place(part, _moved({n: w for n, w in own.items() if id(w) not in staying}, device))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
    return module


def _moved(tensors: Tensors, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@dataclass
class Elsewhere:
    """What a model's policy keeps off the device, and how to come by it.

    `like` is an empty tensor of the dtype and on the device that the model computes with. `read`
    gives a tensor of the checkpoint by its name, as `like`.
    """

    policy: Policy
    like: Tensor
    read: Callable[[str], Tensor]
    lent: dict[str, Lent] = field(default_factory=dict)  # by the module's name

    def in_use(self, module: str) -> AbstractContextManager[None]:
        """While this lasts the module's weights stay, if they are lent at all."""
        return self.lent.get(module, nullcontext())
