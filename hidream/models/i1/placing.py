"""An I1 whose weights are kept as a memory policy says."""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor, nn

from hidream.folder import Folder
from hidream.memory import Policy
from hidream.models.i1.memory import ADALN, block_name, is_quantised, part_of, streamed_blocks
from hidream.models.i1.model import I1
from hidream.models.loading import Reader, load_weights, tensor_shapes
from hidream.models.placement import Elsewhere, lend, stream_all
from hidream.models.quantise import quantised

_EXPERT = re.compile(r"\.experts\.(\d+)\.(w\d)")


def load_placed(
    model: I1, folder: Folder, policy: Policy, *, device: torch.device, dtype: torch.dtype
) -> I1:
    """Fill `model` (on meta): what is resident at once, the rest when it is used.

    Tensors are read, and made smaller, one by one: neither the device nor the CPU ever holds the
    whole model in `dtype` beside what it keeps. Raises ModelError.
    """
    shapes = tensor_shapes(model)
    resident = [n for n in shapes if part_of(n, policy, model.config) == "resident"]

    def change(name: str, weight: Tensor) -> Tensor:
        if policy.weights is None or not is_quantised(name, shapes[name], policy):
            return weight
        return quantised(weight, policy.weights)

    load_weights(model, folder, device=device, dtype=dtype, names=resident, change=change)
    attach(model, policy, Reader(folder), torch.empty(0, device=device, dtype=dtype))
    return model


def attach(model: I1, policy: Policy, source: Reader, like: Tensor) -> None:
    """Let a model whose resident weights are there come by the others, in the way of `policy`.

    They are read from `source` as tensors like `like`: what a prefill goes through, a module at a
    time; blocks, in turn.
    """
    read = partial(source.read, device=like.device, dtype=like.dtype)
    model.elsewhere = Elsewhere(policy, like, read)
    if policy.lends:
        for name, module in model.prefill_modules.items():
            parts = {name: module}
            if isinstance(module, nn.ModuleList):
                parts = {f"{name}.{i}": part for i, part in enumerate(module)}
            for part, layer in parts.items():
                model.elsewhere.lent[part] = lend(layer, part, read, like.dtype)
    blocks = {}
    for index in streamed_blocks(policy, model.config):
        name = block_name(index, model.config)
        block = model.get_submodule(name)
        names = [n for n, _ in block.named_parameters() if not n.startswith(ADALN)]
        blocks[name] = (block, sorted(names, key=_side_by_side))
    stream_all(blocks, source, like)


def _side_by_side(name: str) -> str:
    """A place in a block's order that puts all experts' weights of one kind together: so lying,
    they are one product's (see `nn.moe.side_by_side`)."""
    return _EXPERT.sub(r".experts.\2.\1", name)
