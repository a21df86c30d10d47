"""An O1 whose weights are kept as a memory policy says."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hidream.folder import Folder
from hidream.memory import Policy
from hidream.models.loading import Reader, load_weights, tensor_shapes
from hidream.models.o1.memory import BLOCKS, EMBEDDINGS, TOWER, is_quantised, part_of
from hidream.models.o1.model import O1
from hidream.models.placement import Elsewhere, Lent, lend, look_up_on_cpu, place, stream_all
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
    lent, tied = model.elsewhere.lent, model.config.tie_word_embeddings
    if policy.lends:
        lent[TOWER] = lend(model.model.visual, TOWER, read, like.dtype)
        if model.lm_head is not None and not tied:
            lent["lm_head"] = lend(model.lm_head, "lm_head", read, like.dtype)
    if policy.piecewise:
        table = decoder.embed_tokens
        place(table, {"weight": source.read(EMBEDDINGS)})
        look_up_on_cpu(table, like.device, like.dtype)
        if model.lm_head is not None and tied:
            absent = {"weight": table.weight}
            place(model.lm_head, absent)
            lent["lm_head"] = Lent(model.lm_head, absent, lambda: {"weight": read(EMBEDDINGS)})
    blocks = {}
    for index in policy.streamed_blocks(len(decoder.layers)):
        block = decoder.layers[index]
        blocks[f"{BLOCKS}.{index}"] = (block, [name for name, _ in block.named_parameters()])
    stream_all(blocks, source, like)
