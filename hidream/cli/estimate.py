"""What a request will need: memory and time, by arithmetic from the model's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.folder import Folder
from hidream.lora_file import linear_layers, read_lora
from hidream.memory import POLICIES, Policy, available
from hidream.registry import Spec
from hidream.request import GenerateRequest

if TYPE_CHECKING:
    import torch

    from hidream.models.o1.config import O1Config
    from hidream.models.o1.memory import BatchSize, Need


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

    The operations are those of the decoder's linear layers and attention; the time takes a speed
    that a short matrix product of about the model's shape has on this machine. The model's load
    time is not in it. `policies` has memory and time under every policy.

    Raises UsageError for a device that is not here, InputError for a LoRA that does not fit.
    """
    from hidream.models.machine import free_memory
    from hidream.models.o1.memory import need
    from hidream.pipelines.devices import find_device, find_dtype

    config = _config(folder, spec)
    place = find_device(device)
    number = find_dtype(None if dtype == "auto" else dtype, place)
    batch = batch_of(config, request, batch_size)
    loras, lora_files = _lora_bytes(request, config, number.itemsize)
    flops, seconds = _work(config, request, batch, place, number)
    num_calls = _num_calls(request, batch)
    free, free_cpu = free_memory(place), _free_cpu()
    rows = []
    for policy in POLICIES.values():
        needed = need(config, policy, batch, width=number.itemsize, device=place.type, loras=loras)
        device_bytes, cpu_bytes = needed.total, needed.cpu + lora_files
        if place.type == "cpu":
            device_bytes, cpu_bytes = device_bytes + cpu_bytes, 0
        rows.append(
            {
                "name": policy.name,
                "memory_bytes": device_bytes,
                "cpu_bytes": cpu_bytes,
                "parts": _parts(needed),
                "fits": device_bytes <= free and cpu_bytes <= free_cpu,
                "available": available(policy),
                "seconds": round(
                    _with_streaming(seconds, config, policy, num_calls, place, number), 2
                ),
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
        "num_tokens": {
            "text": batch.num_prefix,
            "picture": batch.num_target,
            "references": batch.num_references,
        },
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


def _config(folder: Folder | None, spec: Spec) -> O1Config:
    from hidream.models.o1.config import O1_8B, O1_NANO
    from hidream.models.o1.weights import config_of

    if folder is not None:
        return config_of(folder)
    return O1_NANO if spec.name == "o1-nano" else O1_8B


def _parts(needed: Need) -> dict[str, int]:
    names = ("weights", "loras", "prefix", "activations", "runtime")
    return {name: getattr(needed, name) for name in names}


def _lora_bytes(request: GenerateRequest, config: O1Config, width: int) -> tuple[int, int]:
    """Bytes of the LoRAs' branches on the device, and of their files kept in CPU memory."""
    from hidream.models.loras import MAX_KEPT
    from hidream.models.o1.weights import shapes_of

    if not request.loras:
        return 0, 0
    layers = linear_layers(shapes_of(config))
    branches, files = 0, {}
    for path, scale in request.loras:
        file = read_lora(path, layers, request.model or "")
        files[file.path] = file.stamp[1]
        for layer in file.layers if scale else ():
            inner, outer = layers[layer.layer]
            branches += layer.rank * (inner + outer) + (outer if layer.magnitude else 0)
    return branches * width, min(sum(files.values()), MAX_KEPT)


def _evaluations(request: GenerateRequest) -> int:
    evaluations = (request.num_inference_steps or 1) * (2 if request.sampler == "heun" else 1)
    return max(1, round(evaluations * (request.strength or 1)))


def _num_calls(request: GenerateRequest, batch: BatchSize) -> int:
    """Calls of the network; both guidance branches of a batch are one."""
    return _evaluations(request) * -(-len(request.seeds) // batch.num_pictures)


def _work(
    config: O1Config,
    request: GenerateRequest,
    batch: BatchSize,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[int, float]:
    """Floating-point operations and seconds of all of a request's pictures."""
    from hidream.cli.speed import flops_a_second, seconds_a_layer

    text = config.text
    per_layer = text.head_dim * text.hidden_size * (2 * text.num_heads + 2 * text.num_kv_heads)
    per_layer += 3 * text.hidden_size * text.intermediate_size
    generated = batch.num_target + batch.num_references
    attention = 4 * generated * (generated + batch.num_prefix) * text.num_heads * text.head_dim
    forward = text.num_layers * (2 * generated * per_layer + attention)
    flops = forward * batch.num_branches * _evaluations(request) * len(request.seeds)
    rows = batch.num_pictures * batch.num_branches * generated
    speed = flops_a_second((rows, text.hidden_size, text.intermediate_size), device, dtype)
    num_calls = _num_calls(request, batch)
    seconds = flops / speed + num_calls * text.num_layers * seconds_a_layer(device, dtype)
    return flops, seconds


def _with_streaming(
    seconds: float,
    config: O1Config,
    policy: Policy,
    num_calls: int,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Seconds with blocks that come in turn: beside the computing on a GPU, before it elsewhere."""
    from hidream.cli.speed import bytes_a_second
    from hidream.models.o1.memory import streamed_bytes

    num_bytes = streamed_bytes(config, policy, width=dtype.itemsize)
    if not num_bytes:
        return seconds
    copying = num_calls * num_bytes / bytes_a_second(device, dtype)
    return max(seconds, copying) if device.type == "cuda" else seconds + copying


def _free_cpu() -> int:
    import torch

    from hidream.models.machine import free_memory

    return free_memory(torch.device("cpu"))
