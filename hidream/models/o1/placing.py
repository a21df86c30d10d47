"""An O1 whose weights are kept as a memory policy says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hidream.folder import Folder
from hidream.memory import Policy
from hidream.models.loading import Reader, load_weights, tensor_shapes
from hidream.models.o1.memory import BLOCKS, EMBEDDINGS, TOWER, is_quantised, part_of
from hidream.models.o1.model import O1
from hidream.models.placement import (
    Ahead,
    Elsewhere,
    Lent,
    empty_out,
    look_up_on_cpu,
    place,
    stream,
)
from hidream.models.quantise import quantised


def load_placed(
    model: O1, folder: Folder, policy: Policy, *, device: torch.device, dtype: torch.dtype
) -> O1:
    """Fill `model` (on meta): what is resident at once, the rest when it is used.

    Tensors are read, and made smaller, one by one: neither the device nor the CPU ever holds the
    whole model in `dtype` beside what it keeps. Raises ModelError.
    """
    shapes, num_blocks = tensor_shapes(model), model.config.text.num_layers
    resident = [name for name in shapes if part_of(name, policy, num_blocks) == "resident"]

    def change(name: str, weight: Tensor) -> Tensor:
        if policy.weights is None or not is_quantised(name, shapes[name], policy):
            return weight
        return quantised(weight, policy.weights)

    load_weights(model, folder, device=device, dtype=dtype, names=resident, change=change)
    attach(model, policy, Reader(folder), torch.empty(0, device=device, dtype=dtype))
    return model


def attach(model: O1, policy: Policy, source: Reader, like: Tensor) -> None:
    """Let a model whose resident weights are there come by the others, in the way of `policy`.

    They are read from `source` as tensors like `like`.
    """
    read = partial(source.read, device=like.device, dtype=like.dtype)
    decoder = model.model.language_model
    model.elsewhere = Elsewhere(policy, like, read)
    if policy.lends:
        table = decoder.embed_tokens
        place(table, {"weight": source.read(EMBEDDINGS)})
        look_up_on_cpu(table, like.device, like.dtype)
        _lend(model, TOWER, read)
        if model.lm_head is not None and model.config.tie_word_embeddings:
            absent = {"weight": table.weight}
            place(model.lm_head, absent)
            model.elsewhere.lent["lm_head"] = Lent(
                model.lm_head, absent, lambda: {"weight": read(EMBEDDINGS)}
            )
        elif model.lm_head is not None:
            _lend(model, "lm_head", read)
    streamed = policy.streamed_blocks(len(decoder.layers))
    if like.is_cuda and streamed:
        _stream_ahead(decoder.layers, streamed, source, like)
        return
    for index in streamed:
        block, name = decoder.layers[index], f"{BLOCKS}.{index}"
        absent = empty_out(block, like.dtype)
        stream(block, absent, partial(_read_all, name, tuple(absent), read))


def _lend(model: O1, name: str, read: Callable[[str], Tensor]) -> None:
    assert model.elsewhere is not None
    module = model.get_submodule(name)
    absent = empty_out(module, model.elsewhere.like.dtype)
    lent = Lent(module, absent, partial(_read_all, name, tuple(absent), read))
    model.elsewhere.lent[name] = lent


def _read_all(
    module: str, names: tuple[str, ...], read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    return {name: read(f"{module}.{name}") for name in names}


def _stream_ahead(
    layers: nn.ModuleList, streamed: Sequence[int], source: Reader, like: Tensor
) -> None:
    """A GPU's blocks come from pinned CPU memory, each while the one before it is computed."""

    def pinned(name: str) -> Tensor:
        return source.read(name, dtype=like.dtype).pin_memory()

    absent = [empty_out(layers[index], like.dtype) for index in streamed]
    ahead = Ahead(
        [_read_all(f"{BLOCKS}.{index}", tuple(absent[0]), pinned) for index in streamed],
        like.device,
    )
    for turn, index in enumerate(streamed):
        stream(layers[index], absent[turn], partial(ahead.fetch, turn), partial(ahead.done, turn))
