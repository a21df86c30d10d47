"""What a request will need: memory and time, by arithmetic from the model's configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.folder import Folder
from hidream.lora_file import linear_layers, read_lora
from hidream.memory import POLICIES, available
from hidream.registry import Spec
from hidream.request import GenerateRequest

if TYPE_CHECKING:
    import torch

    from hidream.models.i1.memory import BatchSize as LatentBatch
    from hidream.models.machine import Need
    from hidream.models.o1.config import O1Config
    from hidream.models.o1.memory import BatchSize


@dataclass(frozen=True, kw_only=True)
class Work:
    """A request to one model, counted.

    `need(policy, width=, device=, loras=)` is its memory, `streamed(policy, width=)` the bytes of
    weights that come to the device in every call of the network, `shapes()` the network's tensors
    (it has to be built to know them). `flops` are those of a call; `sides` of a typical matrix
    product in it.
    """

    need: Callable[..., Need]
    streamed: Callable[..., int]
    shapes: Callable[[], Mapping[str, list[int]]]
    num_tokens: Mapping[str, int]
    flops: int
    sides: tuple[int, int, int]
    num_layers: int


def estimate(
    request: GenerateRequest,
    folder: Folder | None,
    spec: Spec,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 1,
    memory: str = "auto",
) -> dict[str, Any]:
    """Bytes of memory at the peak, floating-point operations and seconds of a resolved request.

    The operations are those of the network's linear layers and attention; the time takes a speed
    that a short matrix product of about the model's shape has on this machine. The model's load
    time is not in it. `policies` has memory and time under every policy.

    Raises UsageError for a device that is not here, InputError for a LoRA that does not fit.
    """
    from hidream.models.machine import free_memory
    from hidream.pipelines.devices import find_device, find_dtype

    place = find_device(device)
    number = find_dtype(None if dtype == "auto" else dtype, place)
    width = number.itemsize
    work = (_o1 if spec.family == "o1" else _i1)(request, folder, spec, batch_size)
    loras, lora_files = _lora_bytes(request, work, width)
    num_calls = _evaluations(request) * -(-len(request.seeds) // batch_size)
    flops = work.flops * _evaluations(request) * len(request.seeds) // batch_size
    seconds = _seconds(work, flops, num_calls, place, number)
    free, free_cpu = free_memory(place), _free_cpu()
    rows = []
    for policy in POLICIES.values():
        needed = work.need(policy, width=width, device=place.type, loras=loras)
        device_bytes, cpu_bytes = needed.total, needed.cpu + lora_files
        if place.type == "cpu":
            device_bytes, cpu_bytes = device_bytes + cpu_bytes, 0
        streamed = work.streamed(policy, width=width)
        rows.append(
            {
                "name": policy.name,
                "memory_bytes": device_bytes,
                "cpu_bytes": cpu_bytes,
                "parts": _parts(needed),
                "fits": device_bytes <= free and cpu_bytes <= free_cpu,
                "available": available(policy),
                "seconds": round(_with_streaming(seconds, num_calls * streamed, place, number), 2),
            }
        )
    chosen = next(row for row in rows if row["name"] == memory)
    return {
        "memory": memory,
        **{name: chosen[name] for name in ("memory_bytes", "cpu_bytes", "parts", "seconds")},
        "lora_bytes": loras + lora_files,
        "available_bytes": free,
        "flops": flops,
        "device": str(place),
        "num_tokens": dict(work.num_tokens),
        "policies": rows,
    }


def told(memory_bytes: int, available_bytes: int, seconds: float, device: str) -> str:
    """An estimate in words."""
    return (
        f"{console.size(memory_bytes)} of memory (of {console.size(available_bytes)} free), about "
        f"{console.duration(seconds)} on {device}; arithmetic, not a measurement"
    )


def batch_of(config: O1Config, request: GenerateRequest, num_pictures: int) -> BatchSize:
    """The tokens of a resolved request; its words are counted as a quarter of their letters."""
    from hidream.models.o1.memory import BatchSize

    width, height = request.width or 1, request.height or 1
    patch = config.patch_size
    count = len(request.references) + (request.layout is not None)
    side = config.budgets.side(max(count, 1), max(width, height)) // patch
    vision = config.budgets.vision_side(max(count, 1)) // config.vision.stride
    words = 16 + len(request.full_prompt.encode()) // 4
    return BatchSize(
        num_pictures=num_pictures,
        num_branches=2 if (request.guidance_scale or 0) > 1 else 1,
        num_target=width * height // patch**2,
        num_references=count * side**2,
        num_prefix=words + count * (vision**2 + 2),
        num_vision_patches=count * (vision * config.vision.merge_size) ** 2,
    )


def _o1(request: GenerateRequest, folder: Folder | None, spec: Spec, num_pictures: int) -> Work:
    from hidream.models.o1.config import O1_8B, O1_NANO
    from hidream.models.o1.memory import need, streamed_bytes
    from hidream.models.o1.weights import config_of, shapes_of

    config = O1_NANO if spec.name == "o1-nano" else O1_8B
    config = config_of(folder) if folder is not None else config
    batch, text = batch_of(config, request, num_pictures), config.text
    per_layer = text.head_dim * text.hidden_size * (2 * text.num_heads + 2 * text.num_kv_heads)
    per_layer += 3 * text.hidden_size * text.intermediate_size
    generated = batch.num_target + batch.num_references
    attention = 4 * generated * (generated + batch.num_prefix) * text.num_heads * text.head_dim
    rows = num_pictures * batch.num_branches
    return Work(
        need=partial(need, config, batch=batch),
        streamed=partial(streamed_bytes, config),
        shapes=partial(shapes_of, config),
        num_tokens={
            "text": batch.num_prefix,
            "picture": batch.num_target,
            "references": batch.num_references,
        },
        flops=rows * text.num_layers * (2 * generated * per_layer + attention),
        sides=(rows * generated, text.hidden_size, text.intermediate_size),
        num_layers=text.num_layers,
    )


def _i1(request: GenerateRequest, folder: Folder | None, spec: Spec, num_pictures: int) -> Work:
    from hidream.models.i1.config import E1_1, SIZES, I1Config
    from hidream.models.i1.memory import encoder_sizes, need, streamed_bytes
    from hidream.models.i1.weights import shapes_of

    config = SIZES.get(spec.name, E1_1)
    config = I1Config.from_dict(folder.config) if folder is not None else config
    batch = latent_batch(config.max_patches, request, spec, num_pictures)
    if folder is not None:
        batch = replace(batch, encoders=encoder_sizes(folder.path))
    size, text, caption = config.size, 2 * batch.num_text, batch.num_text
    k = config.num_active_experts if config.num_experts else 1
    expert, shared = 3 * size * config.expert_size, 3 * size * config.shared_size
    fed = k * expert + (shared + size * config.num_experts if config.num_experts else 0)
    tokens = batch.num_patches + text
    linear = config.num_single_layers * tokens * (4 * size**2 + fed)
    linear += config.num_layers * batch.num_patches * (4 * size**2 + fed)
    linear += config.num_layers * text * (4 * size**2 + expert)
    linear += config.num_blocks * caption * 2 * size**2
    attention = config.num_blocks * 4 * tokens * (tokens + caption) * size
    rows = num_pictures * batch.num_branches
    return Work(
        need=partial(need, config, batch=batch),
        streamed=partial(streamed_bytes, config),
        shapes=partial(shapes_of, config),
        num_tokens={"text": text, "picture": batch.num_patches, "references": 0},
        flops=rows * (2 * linear + attention),
        sides=(rows * tokens, size, config.expert_size),
        num_layers=config.num_blocks,
    )


def latent_batch(
    max_patches: int, request: GenerateRequest, spec: Spec, num_pictures: int
) -> LatentBatch:
    """The tokens of a resolved request to I1, or to E1, which sees the source beside the picture;
    what is larger than the network or the VAE takes is drawn, or decoded, in tiles."""
    from hidream.models.i1.memory import BatchSize
    from hidream.models.vae import MAX_WHOLE, TILE

    edits = spec.family == "e1"
    area = (request.width or 1) * (request.height or 1)
    whole = area <= MAX_WHOLE * 8**2
    guided = (request.guidance_scale or 0) > 1
    return BatchSize(
        num_pictures=num_pictures,
        num_branches=(3 if edits else 2) if guided else 1,
        num_patches=min((2 if edits else 1) * area // spec.patch_size**2, max_patches),
        num_steps=_evaluations(request),
        num_pixels=area if whole else (TILE * 8) ** 2,
        num_networks=2 if request.refine_strength else 1,
    )


def _parts(needed: Need) -> dict[str, int]:
    names = ("weights", "loras", "prefix", "activations", "runtime")
    return {name: getattr(needed, name) for name in names}


def _lora_bytes(request: GenerateRequest, work: Work, width: int) -> tuple[int, int]:
    """Bytes of the LoRAs' branches on the device, and of their files kept in CPU memory."""
    from hidream.models.loras import MAX_KEPT

    if not request.loras:
        return 0, 0
    shapes = work.shapes()
    layers, values, files = linear_layers(shapes), 0, {}
    for path, scale in request.loras:
        file = read_lora(path, layers, request.model or "", shapes=shapes)
        files[file.path] = file.stamp[1]
        for layer in file.layers if scale else ():
            inner, outer = layers[layer.layer]
            values += layer.rank * (inner + outer) + (outer if layer.magnitude else 0)
        values += sum(math.prod(shapes[name]) for name in file.whole if scale)
    return values * width, min(sum(files.values()), MAX_KEPT)


def _evaluations(request: GenerateRequest) -> int:
    evaluations = (request.num_inference_steps or 1) * (2 if request.sampler == "heun" else 1)
    return max(1, round(evaluations * (request.strength or 1)))


def _seconds(
    work: Work, flops: int, num_calls: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds of all of a request's pictures, with the weights there."""
    from hidream.cli.speed import flops_a_second, seconds_a_layer

    computing = flops / flops_a_second(work.sides, device, dtype)
    return computing + num_calls * work.num_layers * seconds_a_layer(device, dtype)


def _with_streaming(
    seconds: float, num_bytes: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds with weights that come in turn: beside the computing on a GPU, before it elsewhere.

    `num_bytes` are those of all calls.
    """
    from hidream.cli.speed import bytes_a_second

    if not num_bytes:
        return seconds
    copying = num_bytes / bytes_a_second(device, dtype)
    return max(seconds, copying) if device.type == "cuda" else seconds + copying


def _free_cpu() -> int:
    import torch

    from hidream.models.machine import free_memory

    return free_memory(torch.device("cpu"))
