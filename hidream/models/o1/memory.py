"""What O1 needs of a device under a memory policy: counted from its configuration."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from hidream.memory import Policy
from hidream.models.loading import tensor_shapes
from hidream.models.machine import Need, check_room, runtime_bytes
from hidream.models.o1.config import O1Config
from hidream.models.o1.model import O1
from hidream.models.placement import num_aligned
from hidream.models.quantise import quantised_bytes

EMBEDDINGS = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
TOWER = "model.visual"
BLOCKS = "model.language_model.layers"
_BLOCK = re.compile(re.escape(BLOCKS) + r"\.(\d+)\.")

Part = Literal["resident", "embeddings", "head", "tower", "streamed"]
_STATES = 12  # copies of a picture's patches, fp32: state, noise, both branches, solver's history


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of a model's weights on the device: `resident` always, the others for a time.

    `streaming`: buffers of blocks that live in CPU memory. `tower`: while references are read.
    `head`: while text is written. `unpacked`: a quantised layer's weight while it multiplies.
    `cpu` is beside the device, in CPU memory.
    """

    resident: int
    streaming: int
    tower: int
    head: int
    unpacked: int
    cpu: int

    @property
    def always(self) -> int:
        return self.resident + self.streaming + self.unpacked


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """What is computed together: pictures, guidance branches, and the tokens of each.

    `references` are patches, `prefix` the causal tokens; `vision_patches` the tower's, of all
    references.
    """

    num_pictures: int
    num_branches: int
    num_target: int
    num_references: int
    num_prefix: int
    num_vision_patches: int


def part_of(name: str, policy: Policy, num_blocks: int) -> Part:
    """Where a tensor is under a policy, by its name."""
    block = _BLOCK.match(name)
    if block:
        streamed = int(block[1]) in policy.streamed_blocks(num_blocks)
        return "streamed" if streamed else "resident"
    if policy.piecewise and name == EMBEDDINGS:
        return "embeddings"
    if policy.lends:
        if name == HEAD:
            return "head"
        if name.startswith(TOWER + "."):
            return "tower"
    return "resident"


def is_quantised(name: str, shape: list[int], policy: Policy) -> bool:
    """Whether a policy keeps this tensor in fewer bits: the blocks' linear layers, where any."""
    return policy.weights is not None and len(shape) == 2 and _BLOCK.match(name) is not None


@lru_cache(maxsize=8)
def _shapes(config: O1Config) -> dict[str, list[int]]:
    with torch.device("meta"):
        return tensor_shapes(O1(config))


def weight_bytes(config: O1Config, policy: Policy, *, width: int, device: str) -> WeightBytes:
    """The weights at `width` bytes a value on a device of this type.

    On a CPU nothing is beside the device: what is not resident is mapped from its file.
    """
    num_blocks = config.text.num_layers
    total: dict[str, int] = dict.fromkeys(("resident", "embeddings", "head", "tower"), 0)
    blocks: dict[str, int] = {}
    unpacked = 0
    for name, shape in _shapes(config).items():
        size = math.prod(shape) * width
        if is_quantised(name, shape, policy):
            unpacked = max(unpacked, size)
            assert policy.weights is not None
            size = quantised_bytes(shape, policy.weights, width=width, device=device)
        part = part_of(name, policy, num_blocks)
        if part == "streamed":
            size = num_aligned(shape) * width if device == "cuda" else size
            block = name.removeprefix(BLOCKS + ".").split(".")[0]
            blocks[block] = blocks.get(block, 0) + size
        else:
            total[part] += size
    if config.tie_word_embeddings and policy.piecewise and config.has_lm_head:
        total["head"] = total["embeddings"]
    at_a_time = min(2, len(blocks)) if device == "cuda" else min(1, len(blocks))
    beside = total["embeddings"] + sum(blocks.values())
    return WeightBytes(
        resident=total["resident"],
        streaming=at_a_time * max(blocks.values(), default=0),
        tower=total["tower"],
        head=total["head"],
        unpacked=unpacked,
        cpu=0 if device == "cpu" else beside,
    )


def streamed_bytes(config: O1Config, policy: Policy, *, width: int) -> int:
    """Bytes of the blocks that come to the device in every pass through the decoder."""
    num_blocks = config.text.num_layers
    return width * sum(
        math.prod(shape)
        for name, shape in _shapes(config).items()
        if part_of(name, policy, num_blocks) == "streamed"
    )


def need(
    config: O1Config,
    policy: Policy,
    batch: BatchSize,
    *,
    width: int,
    device: str,
    loras: int = 0,
) -> Need:
    """What drawing a batch needs at its peak: while its prompts are read, or during a step.

    Exact for weights and for the prefix's keys and values; activations are the largest set that
    a block holds at once. `width` is bytes a value, `loras` bytes of their branches.
    """
    text, vision = config.text, config.vision
    weights = weight_bytes(config, policy, width=width, device=device)
    causal = batch.num_prefix * batch.num_branches
    kept = 2 * causal * text.num_layers * text.num_kv_heads * text.head_dim * width
    rows = batch.num_pictures * batch.num_branches
    rows *= 1 + batch.num_target + batch.num_references
    a_row = (8 * text.hidden_size + 3 * text.intermediate_size) * width
    a_patch = (8 * vision.hidden_size + 3 * vision.intermediate_size) * width
    states = _STATES * 4 * batch.num_pictures * batch.num_target * config.patch_dim
    reading = max(causal * a_row, batch.num_vision_patches * a_patch)
    tower = weights.tower if batch.num_vision_patches else 0
    stepping = rows * a_row + states
    while_reading = reading + tower > stepping
    return Need(
        weights=weights.always + (tower if while_reading else 0),
        loras=loras,
        prefix=kept,
        activations=reading if while_reading else stepping,
        runtime=runtime_bytes(device),
        cpu=weights.cpu,
    )


def check_fit(
    config: O1Config, policy: Policy, *, device: torch.device, dtype: torch.dtype
) -> None:
    """MemoryExceeded where weights alone are more than there is room for; names what would fit."""

    def least(policy: Policy) -> int:
        counted = weight_bytes(config, policy, width=dtype.itemsize, device=device.type)
        return counted.always

    beside = streamed_bytes(config, policy, width=dtype.itemsize)
    check_room(policy, least, beside=beside, device=device)
