"""What I1 and E1 need of a device under a memory policy: counted from the configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from hidream.errors import ModelError
from hidream.folder import open_folder
from hidream.memory import Policy, spread
from hidream.models.i1.config import I1Config
from hidream.models.i1.llama import find_llama
from hidream.models.i1.model import I1
from hidream.models.loading import tensor_shapes
from hidream.models.machine import Need, check_room, runtime_bytes
from hidream.models.placement import num_aligned
from hidream.models.quantise import quantised_bytes

ADALN = "adaLN_modulation"
_BLOCK = re.compile(r"(double|single)_stream_blocks\.(\d+)\.block\.")
_LAYER = re.compile(r".*?\b(?:layers|block)\.(\d+)\.")

Part = Literal["resident", "prefill", "streamed"]
VAE_SIZE = 83_819_683  # values of the published VAE
_VAE_WIDTH = 4 * 256  # values a pixel while it decodes: its widest layer at full size, four times
_STATES = 12  # copies of a picture's latents, fp32: state, noise, all branches, solver's history


@dataclass(frozen=True)
class EncoderSize:
    """Values of a text encoder: all that are used, and the largest layer."""

    whole: int
    layer: int


# Those that are published with I1, and Llama-3.1-8B without its language head.
ENCODERS: Mapping[str, EncoderSize] = {
    "text_encoder": EncoderSize(123_781_632, 7_087_872),
    "text_encoder_2": EncoderSize(694_840_320, 19_677_440),
    "text_encoder_3": EncoderSize(4_762_310_656, 192_946_176),
    "text_encoder_4": EncoderSize(7_504_924_672, 218_112_000),
}


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes on the device: of the transformer, `resident` always, and buffers of blocks that live
    in CPU memory (`streaming`); of others that are always there (`others`).

    For a time: `prefill`, while a prompt is prepared; `encoder`, while it is read; `vae`, while
    pictures become latents or latents pictures. `unpacked`: a quantised layer's weight while it
    multiplies. `cpu` is beside the device, in CPU memory; `blocks` the streamed blocks' part of it.
    """

    resident: int
    streaming: int
    others: int
    prefill: int
    encoder: int
    vae: int
    unpacked: int
    cpu: int
    blocks: int

    @property
    def transformer(self) -> int:
        """What the transformer takes while steps run."""
        return self.resident + self.streaming + self.unpacked

    @property
    def always(self) -> int:
        return self.transformer + self.others


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """What is computed together: pictures, guidance branches, and the tokens of each.

    `num_patches` are a picture's, its source's and the padding's; `num_text` T5's and Llama's
    tokens, each; `num_pixels` the picture's, or a tile's where it is decoded in tiles;
    `num_networks` is 2 where an I1 refines what an E1 has edited.
    """

    num_pictures: int
    num_branches: int
    num_patches: int
    num_steps: int
    num_pixels: int
    num_networks: int = 1
    num_text: int = 128
    encoders: Mapping[str, EncoderSize] = field(default_factory=lambda: ENCODERS)


def part_of(name: str, policy: Policy, config: I1Config) -> Part:
    """Where a tensor is under a policy, by its name."""
    if policy.lends and (
        ADALN in name or name.startswith(("t_embedder.", "p_embedder.", "caption_projection."))
    ):
        return "prefill"
    return "streamed" if _block_of(name, config) in streamed_blocks(policy, config) else "resident"


@lru_cache(maxsize=64)
def streamed_blocks(policy: Policy, config: I1Config) -> tuple[int, ...]:
    """Which blocks come in turn, counted through both kinds."""
    return spread(math.ceil(policy.streamed_i1 * config.num_blocks), config.num_blocks)


def block_name(index: int, config: I1Config) -> str:
    """A block's name, counted through both kinds."""
    if index < config.num_layers:
        return f"double_stream_blocks.{index}.block"
    return f"single_stream_blocks.{index - config.num_layers}.block"


def is_quantised(name: str, shape: list[int], policy: Policy) -> bool:
    """Whether a policy keeps this tensor in fewer bits: the blocks' attention and feed-forward
    layers, where any. Gates decide, and stay as they are."""
    if policy.weights is None or len(shape) != 2 or not _BLOCK.match(name):
        return False
    return ADALN not in name and not name.endswith(".gate.weight")


def encoder_sizes(folder: Path) -> dict[str, EncoderSize]:
    """A repository's text encoders, by their headers; the published ones where there are none.

    Llama may be elsewhere (see `find_llama`).
    """
    found = dict(ENCODERS)
    for name in ENCODERS:
        try:
            place = find_llama(folder)[0] if name == "text_encoder_4" else folder / name
            tensors = open_folder(place).tensors
        except ModelError:
            continue
        layers: dict[str, int] = {}
        for tensor, info in tensors.items():
            if match := _LAYER.match(tensor):
                layers[match[0]] = layers.get(match[0], 0) + math.prod(info.shape)
        used = sum(math.prod(i.shape) for n, i in tensors.items() if n != "lm_head.weight")
        found[name] = EncoderSize(used, max(layers.values(), default=used))
    return found


@lru_cache(maxsize=8)
def _shapes(config: I1Config) -> dict[str, list[int]]:
    with torch.device("meta"):
        return tensor_shapes(I1(config))


def _block_of(name: str, config: I1Config) -> int | None:
    match = _BLOCK.match(name)
    if match is None:
        return None
    return int(match[2]) + (config.num_layers if match[1] == "single" else 0)


def weight_bytes(
    config: I1Config,
    policy: Policy,
    *,
    width: int,
    device: str,
    encoders: Mapping[str, EncoderSize] = ENCODERS,
) -> WeightBytes:
    """The weights at `width` bytes a value on a device of this type.

    On a CPU nothing is beside the device: what is not resident is mapped from its file.
    """
    resident = unpacked = 0
    blocks: dict[int, int] = {}
    prefill: dict[str, int] = {}
    for name, shape in _shapes(config).items():
        size = math.prod(shape) * width
        part = part_of(name, policy, config)
        if is_quantised(name, shape, policy):
            assert policy.weights is not None
            unpacked = max(unpacked, size)
            size = quantised_bytes(shape, policy.weights, width=width, device=device)
        if part == "streamed":
            size = num_aligned(shape) * width if device == "cuda" else size
            block = _block_of(name, config)
            assert block is not None
            blocks[block] = blocks.get(block, 0) + size
        elif part == "prefill":
            module = name.split(ADALN)[0] if ADALN in name else name.rsplit(".linear", 1)[0]
            prefill[module] = prefill.get(module, 0) + size
        else:
            resident += size
    at_a_time = min(2 if device == "cuda" else 1, len(blocks))
    read = {name: width * e.whole for name, e in encoders.items()}
    vae = width * VAE_SIZE
    largest = max(read.values())
    on_device = width * max(e.layer for e in encoders.values()) if policy.piecewise else largest
    if device == "cpu":
        on_device = largest
    return WeightBytes(
        resident=resident,
        streaming=at_a_time * max(blocks.values(), default=0),
        others=0 if policy.lends else sum(read.values()) + vae,
        prefill=max(prefill.values(), default=0),
        encoder=on_device if policy.lends else 0,
        vae=vae if policy.lends else 0,
        unpacked=unpacked,
        cpu=0 if device == "cpu" else largest + sum(blocks.values()),
        blocks=sum(blocks.values()),
    )


def streamed_bytes(config: I1Config, policy: Policy, *, width: int) -> int:
    """Bytes of the blocks that come to the device in every step."""
    return weight_bytes(config, policy, width=width, device="cpu").blocks


def need(
    config: I1Config,
    policy: Policy,
    batch: BatchSize,
    *,
    width: int,
    device: str,
    loras: int = 0,
) -> Need:
    """What drawing a batch needs at its peak: while its prompts are read or prepared, during a
    step, or while its pictures are decoded.

    Exact for weights and for what is kept of the prompts; activations are the largest set that a
    block, or the VAE, holds at once. `width` is bytes a value, `loras` bytes of their branches.
    """
    weights = weight_bytes(config, policy, width=width, device=device, encoders=batch.encoders)
    size, rows = config.size, batch.num_pictures * batch.num_branches
    read = max(config.llama_layers) + 1
    features = batch.num_text * (read * config.llama_size + config.t5_size) * width
    modulations = batch.num_steps * (12 * config.num_layers + 6 * config.num_single_layers + 2)
    kept = ((config.num_blocks + 2) * batch.num_text + modulations) * size * width
    tokens = rows * (batch.num_patches + 1 + 3 * batch.num_text)
    k = config.num_active_experts if config.num_experts else 1
    a_token = (3 * k * config.expert_size + (k + 5) * size) * width
    states = _STATES * 4 * batch.num_pictures * batch.num_patches * config.out_patch_dim
    stages = [
        (weights.encoder, 2 * features),
        (weights.prefill, rows * features),
        (0, tokens * a_token + states),
        (weights.vae, batch.num_pixels * _VAE_WIDTH * width + states),
    ]
    lent, activations = max(stages, key=sum)
    return Need(
        weights=weights.always + (batch.num_networks - 1) * weights.transformer + lent,
        loras=loras,
        prefix=rows * kept,
        activations=activations,
        runtime=runtime_bytes(device),
        cpu=weights.cpu + (batch.num_networks - 1) * (weights.blocks if weights.cpu else 0),
    )


def check_fit(
    config: I1Config, policy: Policy, *, device: torch.device, dtype: torch.dtype
) -> None:
    """MemoryExceeded where the transformer alone is more than there is room for."""

    def least(policy: Policy) -> int:
        counted = weight_bytes(config, policy, width=dtype.itemsize, device=device.type)
        return counted.transformer

    beside = streamed_bytes(config, policy, width=dtype.itemsize)
    check_room(policy, least, beside=beside, device=device)
