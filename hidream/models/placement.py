"""Weights that are on the device only while they are used, attached to a model from outside.

A module of the model is lent its weights for the time of its forward, by hooks; between uses it
holds tensors on the meta device, which can be named and measured but not computed with. The model's
own code does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hidream.memory import Policy

Tensors = Mapping[str, Tensor]


def place(module: nn.Module, tensors: Tensors) -> None:
    """Put these tensors where the module's parameters of these names are."""
    for name, tensor in tensors.items():
        owner, _, own_name = name.rpartition(".")
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(module.get_submodule(owner), own_name, tensor)


def empty_out(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Leave only names, shapes and dtype of a module's parameters; returns what it holds now."""
    shapes = {name: weight.shape for name, weight in module.named_parameters()}
    place(module, {n: torch.empty(s, dtype=dtype, device="meta") for n, s in shapes.items()})
    return dict(module.named_parameters())


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


class Ahead:
    """Equal blocks in pinned CPU memory, copied to a GPU one ahead of their turn.

    There are two sets of buffers: while a block is computed from one, the next is copied into the
    other on a stream of its own, as soon as the block computed from it before is finished. The
    turn goes round: after the last block comes the first.
    """

    def __init__(self, blocks: Sequence[Tensors], device: torch.device):
        self.blocks = blocks
        self.buffers = [
            {name: torch.empty_like(t, device=device) for name, t in blocks[0].items()}
            for _ in range(min(2, len(blocks)))
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
        return self.buffers[slot]

    def done(self, turn: int) -> None:
        """Block `turn` is computed with, as far as the current stream has been told."""
        if turn in self.holds:
            slot = self.holds.index(turn)
            self.computed[slot].record(torch.cuda.current_stream(self.side.device))

    def _copy(self, turn: int, slot: int) -> None:
        self.holds[slot] = turn
        self.side.wait_event(self.computed[slot])
        with torch.cuda.stream(self.side):
            for name, weight in self.blocks[turn].items():
                self.buffers[slot][name].copy_(weight, non_blocking=True)
            self.copied[slot].record(self.side)


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
